"""Similarity of an item's text to the texts of a history, beside the similarity that the user encoder learns.

    user vector   [ h / |h|,  w c / |c| ]      c_t = sum over j <= t of gamma^(t - j) e_j / |e_j|
    item vector   [ x / |x|,  w e / |e| ]
    cosine        (cos(h, x) + w^2 cos(c, e)) / (1 + w^2)

h is the user encoder's output, x the item in the space of features, e its standardised or whitened text embedding in
full width. Weight w and decay gamma are learned. The text's part needs no training to be good for items that have few
events or none, and no bottleneck of the user encoder's width; the learned part adds to it what texts do not say. As the
sum is one cosine of two vectors, the loss, the index and stored user vectors need not know of it.

Legend: T history positions of all users, n rows, D width of the user encoder, E of the text embedding.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hllm_torchrec.modules.jagged import position_in_sequence
from hllm_torchrec.modules.precision import widen


class TextSimilarity(nn.Module):
    """Weight w and decay gamma; `weight` (w^2) and `decay` are their initial values."""

    def __init__(self, weight: float, decay: float = 0.7) -> None:
        super().__init__()
        self.initial = weight, decay
        self.log_weight = nn.Parameter(torch.empty(1))  # [1]: FSDP2 refuses 0-d parameters
        self.decay_logit = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the initial values (also after `to_empty` on a module built on the meta device)."""
        weight, decay = self.initial
        nn.init.constant_(self.log_weight, math.log(weight) / 2)
        nn.init.constant_(self.decay_logit, math.log(decay / (1 - decay)))

    def history(self, texts: Tensor, seq_offsets: Tensor) -> Tensor:
        """c [T, E], float32 or wider, of the text embeddings [T, E] of histories with `seq_offsets` [B + 1]."""
        unit = F.normalize(widen(texts), dim=-1)
        return decayed_sums(unit, seq_offsets, widen(self.decay_logit).sigmoid())

    def join(self, learned: Tensor, texts: Tensor) -> Tensor:
        """Vectors [n, D + E] of the learned vectors [n, D] and of texts or histories [n, E]."""
        unit = F.normalize(widen(learned), dim=-1), F.normalize(widen(texts), dim=-1)
        return torch.cat([unit[0], widen(self.log_weight).exp() * unit[1]], dim=-1)


def decayed_sums(x: Tensor, seq_offsets: Tensor, decay: Tensor) -> Tensor:
    """y_t = sum over j <= t of decay^(t - j) x_j within each sequence: x, y [T, E]; seq_offsets [B + 1]; decay [1].

    By doubling: after k steps a row holds the sum over its latest 2^k positions, so the longest sequence of n positions
    takes log2(n) steps of T x E operations.
    """
    position = position_in_sequence(seq_offsets, x.shape[0])
    longest = int(position.max()) + 1 if position.numel() else 0
    total, shift = x, 1
    while shift < longest:
        earlier = F.pad(total[:-shift], (0, 0, shift, 0)) * (position >= shift)[:, None]
        total = total + decay**shift * earlier
        shift *= 2
    return total
