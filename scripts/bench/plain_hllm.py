"""Plain implementation of the training step as in HLLM's public code, for comparison in the benches.

Each user has the S + 1 items of a piece, padded on the left with random items, and S + 1 separate negatives. Every
occurrence of an item is encoded: the complete texts, with the prompt, are packed, with causal attention within each
item (one attention call per item replaces flash-attn's variable-length kernel). The vocabulary head runs on every token
although its output is not used. The users' item embeddings are input to a second Llama, padded on the left. Positives
are compared with the negatives of all users. Masking is by id as in `hllm_torchrec.modules.losses.objectives`, so that
both sides compute the same loss.

Legend: B users, S history positions, n item occurrences, P tokens of all occurrences, D width, H heads of width d.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from bench_loss import plain as plain_info_nce
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.token_store import TokenStore
from hllm_torchrec.models.backbones import build_backbone
from hllm_torchrec.models.hllm import HLLM
from hllm_torchrec.modules.losses.objectives import Exclusion, LogitScale

ONE_BY_ONE = "plain_one_by_one"


@dataclass(frozen=True)
class Sample:
    """One user's piece: `items` [m <= S + 1] in order, `padding` [S + 1 - m] random items, `negatives` [S + 1]."""

    user_id: int
    items: Ints
    timestamps: Ints
    padding: Ints
    negatives: Ints

    @property
    def positives(self) -> Ints:
        """[S + 1]: padding, then the items."""
        return np.concatenate([self.padding, self.items])


def pieces_of(dataset: Dataset, history: int) -> Iterator[tuple[int, Ints, Ints]]:
    """Yield (user, items, timestamps) of the training part: pieces of history + 1 events, cut from each user's end.

    The remaining events at a user's beginning are a piece if they are at least two, and at least half of a full piece.
    """
    size = history + 1
    for group in dataset.row_groups("train"):
        for row in dataset.sequences([group]).pieces():
            items, times = row.item_ids, row.timestamps
            for end in range(len(items), 0, -size):
                start = max(0, end - size)
                if end - start >= max(2, size / 2):
                    yield row.user_id, items[start:end], times[start:end]


def draw_samples(dataset: Dataset, history: int, users: int) -> list[Sample]:
    """Random pieces, each with padding and negatives drawn uniformly from the items that are not in the piece."""
    rng = np.random.default_rng(0)
    pieces = list(pieces_of(dataset, history))
    samples = []
    for index in rng.choice(len(pieces), users, replace=len(pieces) < users):
        user, items, times = pieces[index]
        others = np.setdiff1d(np.arange(1, dataset.num_items), items)
        drawn = rng.choice(others, 2 * (history + 1) - len(items))
        samples.append(Sample(user, items, times, *np.split(drawn, [history + 1 - len(items)])))
    return samples


@dataclass(frozen=True)
class Texts:
    """Packed texts of n items: token_ids [P], with 0 for [ITEM]; lengths [n], including [ITEM]."""

    token_ids: Tensor
    lengths: list[int]

    @classmethod
    def of(cls, items: Ints, tokens: TokenStore) -> "Texts":
        """The texts of `items`; a repeated item is repeated."""
        packed, cu_seqlens = tokens.gather(items)
        texts = [np.append(text, 0) for text in np.split(packed, cu_seqlens[1:-1])]
        return cls(torch.from_numpy(np.concatenate(texts)), [len(text) for text in texts])


@dataclass(frozen=True)
class PlainBatch:
    """Batch of the published loader: texts of all positives and negatives, B x (S + 1) each.

    valid: [B, S] bool, False at padding; next_ids: the target item of each valid position; negative_ids: [B x (S + 1)].
    """

    positives: Texts
    negatives: Texts
    valid: Tensor
    next_ids: Tensor
    negative_ids: Tensor
    exclude: Exclusion

    @property
    def tokens(self) -> int:
        """Number of tokens of positives and negatives."""
        return sum(self.positives.lengths) + sum(self.negatives.lengths)


def plain_batch(samples: Sequence[Sample], tokens: TokenStore) -> PlainBatch:
    """The batch of `samples`, with the same ids excluded from the negatives as in a `HybridBatch`."""
    inputs = [torch.from_numpy(sample.items[:-1]) for sample in samples]
    offsets = torch.tensor([0, *np.cumsum([len(ids) for ids in inputs])])
    positions = torch.arange(samples[0].negatives.size - 1)
    negatives = np.concatenate([sample.negatives for sample in samples])
    return PlainBatch(
        Texts.of(np.concatenate([sample.positives for sample in samples]), tokens),
        Texts.of(negatives, tokens),
        torch.stack([positions >= sample.padding.size for sample in samples]),
        torch.from_numpy(np.concatenate([sample.items[1:] for sample in samples])),
        torch.from_numpy(negatives),
        Exclusion(torch.cat(inputs), offsets, torch.repeat_interleave(torch.arange(len(samples)), offsets.diff())),
    )


class PlainHLLM(nn.Module):
    """Item LLM and User LLM, two Llamas, as in the published code.

    Args:
        item_shape, user_shape: Hugging Face configs.
        head: whether the models have vocabulary heads, which then run on every token.
    """

    def __init__(self, item_shape: dict[str, Any], user_shape: dict[str, Any], head: bool) -> None:
        super().__init__()
        self.item_llm = build_backbone(None, item_shape, attention=ONE_BY_ONE)
        self.user_llm = build_backbone(None, user_shape, word_embeddings=False, attention="sdpa")
        self.item_token = nn.Parameter(torch.zeros(item_shape["hidden_size"]))
        self.logit_scale = LogitScale()
        self.heads = nn.ModuleList(
            nn.Linear(shape["hidden_size"], shape["vocab_size"], bias=False)
            for shape in (item_shape, user_shape)
            if head
        )

    def copy_weights(self, model: HLLM) -> None:
        """Copy the weights of `model`, whose item and user width are equal."""
        assert model.item_llm is not None
        self.item_llm.load_state_dict(model.item_llm.backbone.state_dict())
        self.user_llm.load_state_dict(model.user.backbone.state_dict())
        self.logit_scale.load_state_dict(model.logit_scale.state_dict())
        self.item_token.data.copy_(model.item_llm.item_token)

    def forward(self, batch: PlainBatch) -> Tensor:
        """Mean of Eq. (1) over the batch's predictions: 0-d."""
        return self.loss(batch, self.encode(batch.positives), self.encode(batch.negatives))

    def encode(self, texts: Texts) -> Tensor:
        """Item embedding E [n, D] of every occurrence."""
        item_rows = torch.tensor(texts.lengths).cumsum(0) - 1
        words = self.item_llm.get_input_embeddings()(texts.token_ids.long())
        words[item_rows] = self.item_token
        positions = torch.cat([torch.arange(length) for length in texts.lengths])
        hidden = self.item_llm(
            inputs_embeds=words[None], position_ids=positions[None], use_cache=False, plain_lengths=texts.lengths
        ).last_hidden_state
        self._vocabulary(0, hidden)
        return hidden[0, item_rows]

    def loss(self, batch: PlainBatch, positives: Tensor, negatives: Tensor) -> Tensor:
        """Mean of Eq. (1) from the item embeddings E of all occurrences: 0-d."""
        users, steps = batch.valid.shape
        by_user = positives.view(users, steps + 1, -1)
        hidden = self.user_llm(
            inputs_embeds=by_user[:, :-1], attention_mask=batch.valid.long(), use_cache=False
        ).last_hidden_state
        self._vocabulary(1, hidden)
        total = plain_info_nce(
            hidden[batch.valid],
            by_user[:, 1:][batch.valid],
            negatives,
            self.logit_scale(),
            batch.next_ids,
            batch.negative_ids,
            batch.exclude,
        )
        return total / batch.next_ids.numel()

    def _vocabulary(self, which: int, hidden: Tensor) -> None:
        """Compute the logits of every token, as the published code does, and discard them."""
        if self.heads:
            self.heads[which](hidden)


def one_by_one(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    plain_lengths: list[int],
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers: [1, H, P, d] -> [1, P, H, d], causal within each item."""
    parts = zip(*(x.split(plain_lengths, dim=2) for x in (query, key, value)), strict=True)
    done = [F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling) for q, k, v in parts]
    return torch.cat(done, dim=2).transpose(1, 2), None


AttentionInterface.register(ONE_BY_ONE, one_by_one)
AttentionMaskInterface.register(ONE_BY_ONE, lambda *_, **__: None)
