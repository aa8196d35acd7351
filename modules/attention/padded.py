"""Softmax attention over padded histories, each followed by one query: shapes alone decide, so it can be exported.

Legend: B users, T padded history positions, H heads, G key-value heads, E width of a head.
"""

import torch
from torch import Tensor

from hllm_torchrec.modules.attention.text import grouped_attention


class PaddedPlan:
    """`TextPlan` for B * (T + 1) rows, user by user: T history positions, the first `lengths` of them real, one query.

    A history position sees those before it and itself, the query its user's real ones and itself. What the padding
    computes is seen by nobody else.

    Args:
        lengths: [B] int64.
        padded: T.
        longest: upper bound of the rows that one row sees, compared with a layer's sliding window.
    """

    def __init__(self, lengths: Tensor, padded: int, longest: int) -> None:
        self.longest = longest
        self.sequence = padded + 1
        at = torch.arange(self.sequence, device=lengths.device)
        query = at[:, None] == padded
        own = at[:, None] == at
        causal = ~query & (at[:, None] >= at)
        real = query & (at < lengths[:, None, None])
        self.mask = (own | causal | real)[:, None]  # [B, 1, T + 1, T + 1]
        self.position_ids = torch.where(at == padded, lengths[:, None], at).flatten()[None]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
        """See `TextPlan`; called once per layer."""
        q, k, v = (x.unflatten(0, (-1, self.sequence)) for x in (query, key, value))
        return grouped_attention(q, k, v, self.mask, False, scaling, dropout)
