"""Keys and values that are kept of a history: see `history_cache`.

Legend: N history positions, n new ones, m candidates of a micro-batch, G key-value heads, E and V widths of a head's
keys and values, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ScoreCandidates = Callable[[Tensor], Tensor]
"""x [m, D] of a micro-batch of candidates -> q [m, D]."""


@dataclass(frozen=True)
class KeysValues:
    """Of one layer: keys [N, G, E] (rotated where the encoder rotates them), values [N, G, V]."""

    keys: Tensor
    values: Tensor

    def first(self, number: int) -> "KeysValues":
        """Of the first positions."""
        return KeysValues(self.keys[:number], self.values[:number])

    def followed_by(self, keys: Tensor, values: Tensor) -> "KeysValues":
        """With more positions at the end: keys [n, G, E], values [n, G, V]."""
        return KeysValues(torch.cat([self.keys, keys]), torch.cat([self.values, values]))


@dataclass(frozen=True)
class HistoryCache:
    """What is kept of one user's history: every layer's keys and values, and times [N] int64 seconds."""

    layers: tuple[KeysValues, ...]
    times: Tensor

    @property
    def length(self) -> int:
        """N."""
        return self.times.numel()

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return self.times.nbytes + sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)
