"""Cached keys and values of a history, for scoring candidates later (`history_cache`).

Legend: N history positions, n new ones, m candidates of a micro-batch, G key-value heads, E and V widths of a head's
keys and values, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ScoreCandidates = Callable[[Tensor], Tensor]
"""Function of the inputs x [m, D] of a micro-batch of candidates that returns their outputs q [m, D]."""
ScoreRequests = Callable[[Tensor, Sequence[int]], Tensor]
"""Function of the inputs x [m, D] of the candidates of several requests (concatenated) and of the number of candidates
of each request, that returns the outputs q [m, D]."""


@dataclass(frozen=True)
class KeysValues:
    """Keys [N, G, E] (after the rotary embedding, if the encoder has one) and values [N, G, V] of one layer."""

    keys: Tensor
    values: Tensor

    def first(self, number: int) -> "KeysValues":
        """Keys and values of the first `number` positions (views)."""
        return KeysValues(self.keys[:number], self.values[:number])

    def followed_by(self, keys: Tensor, values: Tensor) -> "KeysValues":
        """Append the keys [n, G, E] and values [n, G, V] of more positions; returns a copy."""
        return KeysValues(torch.cat([self.keys, keys]), torch.cat([self.values, values]))


@dataclass(frozen=True)
class HistoryCache:
    """Cache of one user's history: keys and values of every layer, and times [N] int64 seconds."""

    layers: tuple[KeysValues, ...]
    times: Tensor

    @property
    def length(self) -> int:
        """N."""
        return self.times.numel()

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.times.nbytes + sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)
