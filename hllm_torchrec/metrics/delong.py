"""Influence of each row on the AUC, and DeLong's test of models on the same rows, computed from the influences."""

import math
from collections.abc import Sequence

import numpy as np

from hllm_torchrec.distributed.array_collectives import gather_objects
from hllm_torchrec.metrics.exact_auc import RankStatistics
from hllm_torchrec.metrics.intervals import PairedDifference, wald_difference


def influence(
    placements: np.ndarray, is_positive: np.ndarray, weights: np.ndarray | None, statistics: RankStatistics
) -> np.ndarray:
    """Compute the influence w (V - AUC) / W of each row [n] on the AUC.

    w is the weight of the row, V its placement (`exact_auc.Placements`), W the total weight of its class. The sum over
    a set of rows is, to first order, their contribution to the AUC.
    """
    positives, negatives = statistics.weight
    share = (1.0 if weights is None else weights) / np.where(is_positive, positives, negatives)
    return share * (placements - statistics.interval.auc)


class PairedSums:
    """Accumulates the influences of all models' rows, for DeLong's test of each model against the first."""

    def __init__(self, statistics: Sequence[RankStatistics]):
        """Start with empty sums. statistics: one for each model; the first model is the reference."""
        self._statistics = statistics
        self._squares = np.zeros((2, len(statistics)))
        self._total: np.ndarray | None = None

    def add(self, is_positive: np.ndarray, influences_Mn: np.ndarray) -> None:
        """Add rows of this rank: labels [n], and each model's influences [M, n]."""
        # Squares per class (positives, negatives), because the variance has a separate n / (n - 1) for each.
        differences = influences_Mn - influences_Mn[0]
        for index, rows in enumerate((is_positive, ~is_positive)):
            self._squares[index] += (differences[:, rows] ** 2).sum(axis=1)

    def delong(self, model: int) -> PairedDifference:
        """Return the AUC of a model minus that of the reference, with its interval; see `auc.delong_test`.

        Rows are assumed to be independent. The first call is collective.
        """
        if self._total is None:
            self._total = np.sum(gather_objects(self._squares), axis=0)
        first, other = self._statistics[0], self._statistics[model]
        counts = (other.positives, other.rows - other.positives)
        if min(counts) < 2:
            return wald_difference(other.interval.auc - first.interval.auc, math.nan)
        variance = sum(square * rows / (rows - 1) for square, rows in zip(self._total[:, model], counts))
        return wald_difference(other.interval.auc - first.interval.auc, math.sqrt(variance))
