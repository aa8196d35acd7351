"""`CreativeHead`: losses of personalized texts from user vectors, by the Creative LLM and the Item-User Predictor.

    L_write = - sum_n w_n sum_i log p(r_ni | prompt_n with U_n, r_n,<i) / sum_n w_n Y_n
    L_match = [sum over own pairs softplus(-z) + sum over sampled pairs softplus(z)] / pairs
    L_recon = L_write with the user's profile as response, a separate prompt (`profile.prompt`) and soft token
    L_align = symmetric InfoNCE of W' U_n and the Creative LLM's hidden state of a learned token after the profile

U_n, w_n, r_ni: user vector, weight and token i of the response of creative n; z: logits of user-item pairs; W':
projection of user vectors for L_align, separate from the soft prompt's.

Legend: Q queries, N creatives, K sampled items, U unique items, D user width, E item width, Y_n tokens of response n.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from hllm_torchrec.config.creative import CreativeConfig
from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.distributed.collectives import all_gather_variable
from hllm_torchrec.modules.creative.creative_llm import CreativeLLM, CreativeOutput, PackedTexts
from hllm_torchrec.modules.creative.match_head import MatchHead
from hllm_torchrec.modules.creative.soft_prompt import SoftPrompt
from hllm_torchrec.modules.losses.objectives import LogitScale, mean_cosine
from hllm_torchrec.modules.losses.symmetric_nce import SymmetricNceOutput, symmetric_nce
from hllm_torchrec.modules.precision import widen

MOMENTUM = 0.1
"""Weight of a step's mean in the running mean of user vectors, which is subtracted outside of training."""


@dataclass
class CreativeLosses:
    """Losses summed over a micro-batch of this rank, 0-d tensors.

    negatives: number of negatives in L_align, summed over the creatives, detached; mean_cosine: mean cosine similarity
    over the pairs of user vectors, detached; None if there are fewer than two creatives.
    """

    write: Tensor
    match: Tensor
    recon: Tensor
    align: Tensor
    negatives: Tensor
    mean_cosine: Tensor | None


class CreativeHead(nn.Module):
    """Soft prompt, Item-User Predictor and losses; the Creative LLM itself is `HLLM.creative`.

    Args:
        section: `creative` of the configuration.
        user_width, item_width: D, E.
        width: width of the Creative LLM.
        word_scale: RMS of the entries of its word embeddings.
    """

    def __init__(
        self, section: CreativeConfig, user_width: int, item_width: int, width: int, word_scale: float
    ) -> None:
        super().__init__()
        self.section = section
        soft = section.soft
        scale = word_scale if soft.scale == "words" else None
        self.soft_prompt = SoftPrompt(user_width, width, soft.tokens, soft.hidden, scale, soft.normalize)
        self.recon: SoftPrompt | None = None
        if section.losses.recon:
            self.recon = SoftPrompt(user_width, width, 1, 0, scale, soft.normalize)
        self.align: _Alignment | None = None
        if section.losses.align:
            self.align = _Alignment(section, user_width, width, word_scale)
        self.match: MatchHead | None = None
        if section.losses.match:
            match = section.match
            self.match = MatchHead(user_width, item_width, match.width, match.kind, match.blocks)

    @property
    def needs_statistics(self) -> bool:
        """True if user vectors are normalized and their statistics have not been measured yet."""
        return any(one.normalize is not None and not bool(one.normalize.measured) for one in self._soft_prompts())

    def measure(self, users: Tensor) -> None:
        """Fit the normalization of user vectors on `users` [n, D]."""
        for one in self._soft_prompts():
            if one.normalize is not None:
                one.normalize.measure(users)

    def _centered(self, users: Tensor, is_unknown: Tensor) -> Tensor:
        """Shift users [N, D] so that the normalization subtracts the mean over the step's users on all ranks.

        While the Creative LLM is poor, its gradients move all user vectors in the same direction: on MovieLens by half
        of their spread per step. A running mean would lag behind. The gradient also flows through the step's
        mean, so that its component along the common direction cancels. Also updates the running mean. Collective.
        """
        everyone = all_gather_variable(torch.cat([widen(users), (~is_unknown)[:, None].to(widen(users).dtype)], 1))
        rows, known = everyone[:, :-1], everyone[:, -1:].detach()
        mean = (rows * known).sum(0) / known.sum().clamp(min=1)
        for one in self._soft_prompts():
            if one.normalize is not None:
                one.normalize.mean.lerp_(mean.detach().to(one.normalize.mean.dtype), MOMENTUM * bool(known.any()))
        assert self.soft_prompt.normalize is not None
        return users + (self.soft_prompt.normalize.mean - mean).to(users.dtype)

    def _soft_prompts(self) -> list[SoftPrompt]:
        return [module for module in self.modules() if isinstance(module, SoftPrompt)]

    def forward(self, llm: CreativeLLM, users_QD: Tensor, items: Tensor | None, batch: HybridBatch) -> CreativeLosses:
        """Compute the losses of a batch of creatives; items: embeddings [U, E] of the unique items. Collective."""
        creative = batch.creative
        assert creative is not None and batch.request_query is not None
        users = raw = users_QD[batch.request_query]
        is_unknown = is_null = batch.query_visible[batch.request_query] == 0
        if self.training and self.section.soft.normalize != "none":
            users = self._centered(users, is_unknown)
        if self.training and self.section.soft.dropout:
            is_null = is_null | (torch.rand(is_null.shape, device=is_null.device) < self.section.soft.dropout)
        output = self.write(llm, users, is_null, creative.texts)
        match = users.new_zeros(())
        if self.match is not None:
            assert items is not None and batch.request_index is not None
            match = self._match(users, items, batch.request_index, batch.negative_index, creative.may_match)
        recon = align = negatives = users.new_zeros(())
        if creative.profiles is not None and self.recon is not None:
            profiles = llm(creative.profiles, self.recon(users, is_unknown))
            recon = (profiles.nll * creative.weights).sum()
        if creative.profiles is not None and self.align is not None:
            found = self.align(llm, users, is_unknown, creative.profiles.responses(), creative.user_ids)
            align, negatives = found.loss_sum, (found.effective_negatives * found.count).detach()
        similarity = mean_cosine(raw.detach()) if raw.shape[0] > 1 else None
        # The term 0 * users keeps the user encoder in the graph if all creatives are null or the rank has none, because
        # every rank must take part in the collectives of the backward pass.
        write = (output.nll * creative.weights).sum() + 0.0 * users.sum()
        return CreativeLosses(write, match, recon, align, negatives, similarity)

    def write(self, llm: CreativeLLM, users: Tensor, is_null: Tensor, texts: PackedTexts) -> CreativeOutput:
        """Score responses given the user vectors [N, D], or given the learned null tokens where `is_null` [N]."""
        return llm(texts, self.soft_prompt(users, is_null))

    def _match(self, users: Tensor, items: Tensor, own: Tensor, negatives: Tensor, may_match: Tensor) -> Tensor:
        assert self.match is not None
        sampled = may_match.nonzero()
        everyone = torch.arange(users.shape[0], device=users.device)
        pairs = torch.cat([torch.stack([everyone, own], 1), torch.stack([sampled[:, 0], negatives[sampled[:, 1]]], 1)])
        logits = self.match(users, items, pairs)
        labels = (torch.arange(logits.numel(), device=logits.device) < users.shape[0]).to(logits.dtype)
        return binary_cross_entropy_with_logits(logits, labels, reduction="sum")


class _Alignment(nn.Module):
    """L_align; see the module docstring."""

    def __init__(self, section: CreativeConfig, user_width: int, width: int, word_scale: float) -> None:
        super().__init__()
        self.users = SoftPrompt(user_width, width, normalize=section.soft.normalize)
        self.token = nn.Parameter(torch.randn(1, width) * word_scale)
        self.scale = LogitScale(section.profile.temperature)

    def forward(
        self, llm: CreativeLLM, users: Tensor, is_unknown: Tensor, profiles: PackedTexts, user_ids: Tensor
    ) -> SymmetricNceOutput:
        """Compute the loss of users [N, D] and their profiles; negatives are other users of all ranks. Collective."""
        mine = self.users(users, is_unknown)[:, 0]
        theirs = llm(profiles, self.token.expand(user_ids.numel(), 1, -1)).last
        # Both in one exchange: collectives with gradients must run in the same order on all ranks.
        rows = all_gather_variable(torch.cat([widen(mine), widen(theirs)], 1))
        all_mine, all_theirs = rows.chunk(2, dim=1)
        everyone = all_mine, all_theirs, all_gather_variable(user_ids)
        found = symmetric_nce(mine, theirs, user_ids, self.scale(), everyone)
        # The term 0 * rows lets a rank without creatives take part in the backward pass of the exchange.
        return replace(found, loss_sum=found.loss_sum + 0.0 * rows.sum())
