"""Influence of each row on the AUC, and DeLong's test of models on the same rows from it."""

import math
from collections.abc import Sequence

import numpy as np

from hllm_torchrec.distributed.array_collectives import Group, gather_objects
from hllm_torchrec.metrics.exact_auc import RankStatistics
from hllm_torchrec.metrics.intervals import PairedDifference, wald_difference


def influence(
    placements: np.ndarray, is_positive: np.ndarray, weights: np.ndarray | None, statistics: RankStatistics
) -> np.ndarray:
    """w (V - AUC) / W of each row [n], V its placement and W the weight of its class: their sum over any rows is
    what those add to the AUC, to first order."""
    positives, negatives = statistics.weight
    share = (1.0 if weights is None else weights) / np.where(is_positive, positives, negatives)
    return share * (placements - statistics.interval.auc)


class PairedSums:
    """Collects the influences of all models' rows, for DeLong's test of each against the first."""

    def __init__(self, statistics: Sequence[RankStatistics], group: Group = None):
        """`statistics`: of each model, the first one the reference."""
        self._statistics, self._group = statistics, group
        self._squares = np.zeros((2, len(statistics)))
        self._total: np.ndarray | None = None

    def add(self, is_positive: np.ndarray, influences_Mn: np.ndarray) -> None:
        """Add this rank's rows."""
        differences = influences_Mn - influences_Mn[0]
        for place, rows in enumerate((is_positive, ~is_positive)):
            self._squares[place] += (differences[:, rows] ** 2).sum(axis=1)

    def delong(self, model: int) -> PairedDifference:
        """Model minus the reference, rows as independent; see `auc.delong_test`. The first call is collective."""
        if self._total is None:
            self._total = np.sum(gather_objects(self._squares, self._group), axis=0)
        first, other = self._statistics[0], self._statistics[model]
        counts = (other.positives, other.rows - other.positives)
        if min(counts) < 2:
            return wald_difference(other.interval.auc - first.interval.auc, math.nan)
        variance = sum(square * rows / (rows - 1) for square, rows in zip(self._total[:, model], counts))
        return wald_difference(other.interval.auc - first.interval.auc, math.sqrt(variance))
