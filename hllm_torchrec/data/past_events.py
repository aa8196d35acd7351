"""`PastEvents`: the part of evidence that depends only on a user's visible events, not on the item or the second of an
exposure; and the columns of evidence that are computed from it.

Training and evaluation compute it for the exposures of a piece, which see C different numbers of events. Serving
computes it once for a user's state, with C = 1, and reads it in every request.

Legend: n events of one user that have a value, C numbers of visible events, X exposures, N items, E width of text
embeddings, J factors, D descriptors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hllm_torchrec.common.arrays import AnyFloats, Doubles, Floats, Ints
from hllm_torchrec.data.item_factors import ItemFactors

SHRINKAGE, RECENT_SHRINKAGE = 5.0, 3.0
"""Number of pseudo-events with residual 0 in the means over all events, and over the last RECENT events."""
RECENT = 10
SHARPNESS = (5.0, 10.0)
"""Weight of a neighbor: exp(sharpness * cosine)."""
TYPICAL_COSINE = 0.2
"""Cosine of the SHRINKAGE pseudo-events that shrink the neighbors' mean."""
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class PastEvents:
    """One user's events, and statistics of them: row c of an array [C] is of the first `seen[c]` events.

    items [n], residuals [n]: of the events that have a value; rated [C]: number of these that are visible; seen [C]:
    number of visible events; last [C]: second of the last visible event (see `last_seconds` for rows without one);
    means [C, 2]: see `mean_residuals`; factors [C, J], tastes [C, D]: posterior means of the user's factors and tastes,
    with width 0 if no column needs them.
    """

    items: Ints
    residuals: Doubles
    rated: Ints
    seen: Ints
    last: Ints
    means: Doubles
    factors: AnyFloats
    tastes: Doubles

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in vars(self).values())


@dataclass(frozen=True)
class Exposures:
    """X exposures of several users, one user after the other.

    pasts: the events of each user; sizes: number of exposures of each user; after [X]: row of each exposure in the
    concatenated rows [C] of all pasts; items [X]; seconds [X].
    """

    pasts: Sequence[PastEvents]
    sizes: Sequence[int]
    after: Ints
    items: Ints
    seconds: Ints

    def of_past(self, name: str) -> NDArray[Any]:
        """The rows [X, ...] of an array [C, ...] of `PastEvents` for the exposures; [1, ...] if all read one row."""
        arrays: list[NDArray[Any]] = [getattr(past, name) for past in self.pasts]
        rows = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        return rows if len(rows) == 1 else rows[self.after]


def mean_residuals(residuals: Doubles, rated: Ints) -> Doubles:
    """[C, 2]: shrunk mean of the first `rated[c]` of a user's residuals [n], and of the last RECENT of these."""
    sums = np.concatenate([[0.0], np.cumsum(residuals)])
    first = np.maximum(rated - RECENT, 0)
    recent = (sums[rated] - sums[first]) / (rated - first + RECENT_SHRINKAGE)
    return np.stack([sums[rated] / (rated + SHRINKAGE), recent], axis=1)


def last_seconds(timestamps: Ints, seen: Ints) -> Ints:
    """[C] second of the last of the first `seen[c]` events; of the first event for `seen[c]` = 0, 0 without events."""
    return timestamps[np.maximum(seen - 1, 0)] if timestamps.size else np.zeros(seen.size, np.int64)


def items_of_fit(items: Ints, fit: ItemFactors) -> Ints:
    """Replace items that were added after the fit by the unknown item 0 (mean loadings of the prior, bias 0)."""
    return np.where(items < fit.bias.size, items, 0)


def columns_of_users(asked: Exposures) -> list[Doubles]:
    """The four columns of the group "users", each [X], or [1] if it is equal for all exposures.

    The log of the gap is 0 without a visible event.
    """
    means, seen, last = (asked.of_past(name) for name in ("means", "seen", "last"))
    gap = np.log1p(np.where(seen > 0, np.maximum(asked.seconds - last, 0), 0))
    return [means[:, 0], means[:, 1], np.log1p(seen), gap]


def columns_of_neighbors(asked: Exposures, text: Floats | None) -> Doubles:
    """[2, X] similarity-weighted mean residuals minus the user's mean, one row per value of SHARPNESS.

    text: [N, E] unit text embeddings.
    """
    assert text is not None
    found, end = np.empty((len(SHARPNESS), asked.items.size)), 0
    user_mean, rated = (
        np.broadcast_to(one, asked.items.shape) for one in (asked.of_past("means")[:, 0], asked.of_past("rated"))
    )
    for past, size in zip(asked.pasts, asked.sizes, strict=True):
        history, first, end = text[past.items], end, end + size
        for start in range(first, end, _ROWS_AT_ONCE):
            some = slice(start, min(start + _ROWS_AT_ONCE, end))
            cosine = text[asked.items[some]] @ history.T
            weight, hidden = np.empty_like(cosine), None
            if (rated[some] < past.items.size).any():
                hidden = np.arange(past.items.size) >= rated[some, None]
            for row, sharpness in enumerate(SHARPNESS):
                np.exp(np.multiply(cosine, sharpness, out=weight), out=weight)
                if hidden is not None:
                    weight[hidden] = 0
                total = weight.sum(1)
                surplus = weight @ past.residuals - user_mean[some] * total
                found[row, some] = surplus / (total + SHRINKAGE * np.exp(sharpness * TYPICAL_COSINE))
    return found
