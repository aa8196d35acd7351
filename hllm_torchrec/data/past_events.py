"""`PastEvents`: the part of evidence that depends on a user's visible events alone, not on the item or the second asked
about.

Training and evaluation compute it for the exposures of a piece, which see C different numbers of events. Serving computes
it once for a user's state, with C = 1, and reads it in every request.

Legend: n events of one user that have a value, C numbers of visible events, J factors, D descriptors.
"""

from dataclasses import dataclass

import numpy as np

from hllm_torchrec.common.arrays import Doubles, Ints
from hllm_torchrec.data.item_factors import ItemFactors

SHRINKAGE, RECENT_SHRINKAGE = 5.0, 3.0
"""Number of pseudo-events with residual 0 in the means over all events, and over the last RECENT events."""
RECENT = 10


@dataclass(frozen=True)
class PastEvents:
    """One user's events, and what row c of C tells of the first `seen[c]` of them.

    items [n], residuals [n]: of the events that have a value; rated [C]: number of these that are visible; seen [C]:
    number of visible events; last [C]: second of the last visible one, 0 without events; means [C, 2]: see
    `mean_residuals`; factors [C, J], tastes [C, D]: posterior means of the user's factors and tastes, with width 0 if
    no column needs them.
    """

    items: Ints
    residuals: Doubles
    rated: Ints
    seen: Ints
    last: Ints
    means: Doubles
    factors: Doubles
    tastes: Doubles

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in vars(self).values())


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
