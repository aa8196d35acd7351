"""Influence of each row on the AUC, and DeLong's test of models on the same rows, computed from the influences."""

import math
from collections.abc import Sequence

import numpy as np

from hllm_torchrec.distributed.array_collectives import Group, gather_objects
from hllm_torchrec.metrics.exact_auc import RankStatistics
from hllm_torchrec.metrics.intervals import PairedDifference, wald_difference


def influence(
    placements: np.ndarray, is_positive: np.ndarray, weights: np.ndarray | None, statistics: RankStatistics
) -> np.ndarray:
    """Influence w (V - AUC) / W of each row [n], with its placement V and the total weight W of its class.

    The sum over a set of rows is, to first order, their contribution to the AUC.
    """
    positives, negatives = statistics.weight
    share = (1.0 if weights is None else weights) / np.where(is_positive, positives, negatives)
    return share * (placements - statistics.interval.auc)


class PairedSums:
    """Accumulates the influences of all models' rows, for DeLong's test of each model against the first."""

    def __init__(self, statistics: Sequence[RankStatistics], group: Group = None):
        """`statistics`: one per model; the first model is the reference."""
        self._statistics, self._group = statistics, group
        self._squares = np.zeros((2, len(statistics)))
        self._total: np.ndarray | None = None

    def add(self, is_positive: np.ndarray, influences_Mn: np.ndarray) -> None:
        """Add this rank's rows."""
        # Squares per class (positives, negatives), because the variance has a separate n / (n - 1) for each.
        differences = influences_Mn - influences_Mn[0]
        for place, rows in enumerate((is_positive, ~is_positive)):
            self._squares[place] += (differences[:, rows] ** 2).sum(axis=1)

    def delong(self, model: int) -> PairedDifference:
        """AUC of a model minus the reference's, for independent rows; see `auc.delong_test`. First call: collective."""
        if self._total is None:
            self._total = np.sum(gather_objects(self._squares, self._group), axis=0)
        first, other = self._statistics[0], self._statistics[model]
        counts = (other.positives, other.rows - other.positives)
        if min(counts) < 2:
            return wald_difference(other.interval.auc - first.interval.auc, math.nan)
        variance = sum(square * rows / (rows - 1) for square, rows in zip(self._total[:, model], counts))
        return wald_difference(other.interval.auc - first.interval.auc, math.sqrt(variance))
