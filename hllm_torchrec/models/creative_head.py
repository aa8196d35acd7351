"""`CreativeHead`: losses of personalized texts from user vectors, by the Creative LLM and the Item-User Predictor.

    L_write = - sum_n w_n sum_i log p(r_ni | prompt_n with U_n, r_n,<i) / sum_n w_n Y_n
    L_match = [sum over own pairs softplus(-z) + sum over sampled ones softplus(z)] / pairs

Legend: Q queries, N creatives, K sampled items, U unique items, D user width, E item width, Y response tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from hllm_torchrec.config.creative import CreativeConfig
from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.modules.creative.creative_llm import CreativeLLM, CreativeOutput, PackedTexts
from hllm_torchrec.modules.creative.match_head import MatchHead
from hllm_torchrec.modules.creative.soft_prompt import SoftPrompt
from hllm_torchrec.modules.losses.objectives import embedding_spread


@dataclass
class CreativeLosses:
    """Sums over a micro-batch of this rank. write, match: 0-d; spread: mean cosine of the users' vectors, detached,
    None with fewer than two creatives."""

    write: Tensor
    match: Tensor
    spread: Tensor | None


class CreativeHead(nn.Module):
    """Soft prompt and predictor of a configuration; the Creative LLM is a part of its own (`HLLM.creative`).

    Args:
        section: `creative` of the configuration.
        user_width, item_width: D, E.
        width: width of the Creative LLM.
        word_scale: RMS of its word vectors.
    """

    def __init__(
        self, section: CreativeConfig, user_width: int, item_width: int, width: int, word_scale: float
    ) -> None:
        super().__init__()
        self.section = section
        soft = section.soft
        scale = word_scale if soft.scale == "words" else None
        self.soft_prompt = SoftPrompt(user_width, width, soft.tokens, soft.hidden, scale)
        self.match: MatchHead | None = None
        if section.losses.match:
            match = section.match
            self.match = MatchHead(user_width, item_width, match.width, match.kind, match.blocks)

    def forward(self, llm: CreativeLLM, users_QD: Tensor, items: Tensor | None, batch: HybridBatch) -> CreativeLosses:
        """Losses of a batch of creatives; items: E [U, E] of the unique items."""
        creative = batch.creative
        assert creative is not None and batch.request_query is not None
        users = users_QD[batch.request_query]
        is_null = batch.query_visible[batch.request_query] == 0
        if self.training and self.section.soft.dropout:
            is_null = is_null | (torch.rand(is_null.shape, device=is_null.device) < self.section.soft.dropout)
        output = self.write(llm, users, is_null, creative.texts)
        match = users.new_zeros(())
        if self.match is not None:
            assert items is not None and batch.request_index is not None
            match = self._match(users, items, batch.request_index, batch.negative_index, creative.may_match)
        spread = embedding_spread(users.detach()) if users.shape[0] > 1 else None
        # `users` also reaches the losses where every creative is null: a rank without users takes part.
        return CreativeLosses((output.nll * creative.weights).sum() + 0.0 * users.sum(), match, spread)

    def write(self, llm: CreativeLLM, users: Tensor, is_null: Tensor, texts: PackedTexts) -> CreativeOutput:
        """Log-likelihoods of responses given users [N, D], or the learned vector where `is_null` [N]."""
        return llm(texts, self.soft_prompt(users, is_null))

    def _match(self, users: Tensor, items: Tensor, own: Tensor, negatives: Tensor, may_match: Tensor) -> Tensor:
        assert self.match is not None
        sampled = may_match.nonzero()
        everyone = torch.arange(users.shape[0], device=users.device)
        pairs = torch.cat([torch.stack([everyone, own], 1), torch.stack([sampled[:, 0], negatives[sampled[:, 1]]], 1)])
        logits = self.match(users, items, pairs)
        labels = (torch.arange(logits.numel(), device=logits.device) < users.shape[0]).to(logits.dtype)
        return binary_cross_entropy_with_logits(logits, labels, reduction="sum")
