"""Similarity of an item's text to the texts of a history, added to the cosine that the user encoder learns.

    user vector   [ h / |h|,  sqrt(w) c / |c| ]      c_t = sum over j <= t of gamma^(t - j) e_j / |e_j|
    item vector   [ x / |x|,  sqrt(w) e / |e| ]
    cosine        (cos(h, x) + w cos(c, e)) / (1 + w)

h is the user encoder's output, x the item vector in the feature space, e the item's standardized or whitened text
embedding in its full width. This term has no trained parameters and is not used in training: if both parts were trained
together, the learned part would memorize the training events and the weight of the texts would fall, which costs
accuracy (docs/experiments.md). The text term does not depend on the item's number of events, so it also works for new
items, and it is not limited to the user encoder's width. The sum is a cosine of two concatenated vectors, so
evaluation, index and stored user vectors need no special case.

Legend: T history positions of B users, n rows, D width of the user encoder, E of the text embedding.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from hllm_torchrec.modules.jagged import position_in_sequence
from hllm_torchrec.modules.precision import widen


class TextSimilarity:
    """Similarity with weight w of the cosine of the texts, and decay gamma in [0, 1] per event."""

    def __init__(self, weight: float, decay: float) -> None:
        self.weight, self.decay = weight, decay

    def history(self, texts: Tensor, seq_offsets: Tensor) -> Tensor:
        """Decayed sums c [T, E], float32 or wider, of the text embeddings [T, E] of histories with `seq_offsets`."""
        return decayed_sums(F.normalize(widen(texts), dim=-1), seq_offsets, self.decay)

    def join(self, learned: Tensor, texts: Tensor) -> Tensor:
        """Concatenate learned vectors [n, D] and `texts` (of items, or sums of histories) [n, E]: [n, D + E]."""
        learned, texts = (F.normalize(widen(x), dim=-1) for x in (learned, texts))
        return torch.cat([learned, self.weight**0.5 * texts], dim=-1)


def decayed_sums(x: Tensor, seq_offsets: Tensor, decay: float) -> Tensor:
    """Decayed sums y_t = sum over j <= t of decay^(t - j) x_j within each sequence: x, y [T, E]; seq_offsets [B + 1].

    Computed by doubling: after k steps a row has the sum over its latest 2^k positions. So if the longest sequence has
    n positions, log2(n) steps of T x E operations are needed.
    """
    position = position_in_sequence(seq_offsets, x.shape[0])
    longest = int(position.max()) + 1 if position.numel() else 0
    total, shift = x, 1
    while shift < longest:
        earlier = F.pad(total[:-shift], (0, 0, shift, 0)) * (position >= shift)[:, None]
        total = total + decay**shift * earlier
        shift *= 2
    return total
