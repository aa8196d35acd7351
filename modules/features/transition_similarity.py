"""Transition scores of a history (ridge regression of the next item), added to the cosine that the user encoder learns.

    user vector   [ h / |h|,  w c, 0 ]      c_t = sum over j <= t of gamma^(t - j) S[j]
    item vector   [ x / |x|,  T[i] ]        all rows of T have the same norm
    product       cos(h, x) + w [c, 0] . T[i]

S and T are the factors of a regression of the next item on the history (`hllm_torchrec.data.transitions`). The vectors
h and x may already be joined with those of another similarity, such as that of texts. All item vectors have the same
norm, so the cosine and the product give the same ranking. This term has no trained parameters and is not used in
training.

Legend: P history positions of B users, n rows, N items at the time of the fit, R rank.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from hllm_torchrec.modules.features.text_similarity import decayed_sums


class TransitionSimilarity:
    """Similarity with weight w, decay gamma in [0, 1] per event, and S [N, R], T [N, R + 1] on the model's device."""

    def __init__(self, weight: float, decay: float, source: Tensor, target: Tensor) -> None:
        self.weight, self.decay, self.source, self.target = weight, decay, source, target

    @property
    def width(self) -> int:
        """R + 1."""
        return self.target.shape[1]

    def history(self, item_ids: Tensor, seq_offsets: Tensor) -> Tensor:
        """Weighted decayed sums [w c, 0], [P, R + 1], of histories of items [P] with `seq_offsets` [B + 1]."""
        sums = decayed_sums(self.source[self._rows(item_ids)], seq_offsets, self.decay)
        return F.pad(self.weight * sums, (0, 1))

    def items(self, item_ids: Tensor) -> Tensor:
        """Rows [n, R + 1] of T for items [n]; items that were added after the fit get the unknown item's row."""
        return self.target[self._rows(item_ids)]

    def _rows(self, item_ids: Tensor) -> Tensor:
        return torch.where(item_ids < len(self.target), item_ids, 0)
