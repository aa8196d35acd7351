"""Softmax attention over padded histories, each followed by one query. No branch depends on values, so torch.export can
trace it.

Legend: B users, T padded history positions.
"""

import torch
from torch import Tensor

from hllm_torchrec.modules.attention.text import grouped_attention


class PaddedPlan:
    """`TextPlan` for B * (T + 1) rows: for each user T history positions, of which the first `lengths` are real, and
    then one query.

    A history position sees the positions before it and itself. The query sees its user's real positions and itself. No
    real row sees a padding position.

    Args:
        lengths: [B] int64.
        padded: T.
        longest: upper bound of the number of keys that a row sees, compared with a layer's sliding window.
    """

    def __init__(self, lengths: Tensor, padded: int, longest: int) -> None:
        self.longest = longest
        self.sequence = padded + 1
        at = torch.arange(self.sequence, device=lengths.device)
        is_query = at[:, None] == padded
        is_same = at[:, None] == at
        causal = ~is_query & (at[:, None] >= at)
        real = is_query & (at < lengths[:, None, None])
        self.mask = (is_same | causal | real)[:, None]  # [B, 1, T + 1, T + 1]
        # The query's position follows the real positions, without the padding.
        self.position_ids = torch.where(at == padded, lengths[:, None], at).flatten()[None]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
        """See `TextPlan`; called once per layer."""
        q, k, v = (x.unflatten(0, (-1, self.sequence)) for x in (query, key, value))
        return grouped_attention(q, k, v, self.mask, False, scaling, dropout)
