"""Similarity of an item's text to the texts of a history, beside the similarity that the user encoder learns.

    user vector   [ h / |h|,  sqrt(w) c / |c| ]      c_t = sum over j <= t of gamma^(t - j) e_j / |e_j|
    item vector   [ x / |x|,  sqrt(w) e / |e| ]
    cosine        (cos(h, x) + w cos(c, e)) / (1 + w)

h is the user encoder's output, x the item in the space of features, e its standardised or whitened text embedding in
full width. Nothing here is trained, and the model is trained without it: trained together, the learned part memorizes
the training events and the weight of the texts falls, which costs accuracy (docs/experiments.md). The text's part is as
good for items with few events, or none, as for others, and has no bottleneck of the user encoder's width. As the sum is
one cosine of two vectors, evaluation, index and stored user vectors need not know of it.

Legend: T history positions of all users, n rows, D width of the user encoder, E of the text embedding.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from hllm_torchrec.modules.jagged import position_in_sequence
from hllm_torchrec.modules.precision import widen


class TextSimilarity:
    """Weight w of the texts' cosine, and decay gamma in [0, 1] per event."""

    def __init__(self, weight: float, decay: float) -> None:
        self.weight, self.decay = weight, decay

    def history(self, texts: Tensor, seq_offsets: Tensor) -> Tensor:
        """c [T, E], float32 or wider, of the text embeddings [T, E] of histories with `seq_offsets` [B + 1]."""
        return decayed_sums(F.normalize(widen(texts), dim=-1), seq_offsets, self.decay)

    def join(self, learned: Tensor, texts: Tensor) -> Tensor:
        """Vectors [n, D + E] of the learned vectors [n, D] and of texts or histories [n, E]."""
        learned, texts = (F.normalize(widen(x), dim=-1) for x in (learned, texts))
        return torch.cat([learned, self.weight**0.5 * texts], dim=-1)


def decayed_sums(x: Tensor, seq_offsets: Tensor, decay: float) -> Tensor:
    """y_t = sum over j <= t of decay^(t - j) x_j within each sequence: x, y [T, E]; seq_offsets [B + 1].

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
