"""Types of the metrics of `hllm evaluate`, which differ in their inputs; `registry.METRICS` lists the metrics.

A metric is a function of sums over rows, batches and ranks (or of maxima: see `RankMetric.combine`).

Legend: U unique scores, n rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from hllm_torchrec.metrics.group_auc import AucPerGroup

Value = float | dict[str, float]
"""Value of a metric: a number (`nan` if undefined), or numbers by name, such as the recall at several precisions."""


@dataclass(frozen=True)
class Metric:
    """Names of a metric: key in `metrics.json` (and the TorchX tracker and TensorBoard), and title in the report."""

    key: str
    title: str
    """Title of the metric's column in the report; for a metric with several numbers, prefix of their titles."""
    meaning: str
    """Clause for the notes of the report: the meaning of the number, and its good values."""


@dataclass(frozen=True)
class RankedBlock:
    """A block of consecutive unique scores, ascending, in a pass over all rows by score.

    Masses are numbers of rows, or sums of their weights; [2, U] each, row 0 for positives, row 1 for negatives.
    """

    mass: np.ndarray
    total: tuple[float, float]
    """Total mass of each class, above 0."""
    over: np.ndarray
    """Mass of the rows with this score or a higher one: the rows that a threshold at the score predicts positive."""
    precision: np.ndarray
    """Share of positives in `over`, [U]."""


@dataclass(frozen=True)
class RankMetric(Metric):
    """A metric of the order of the rows; `nan` if they have only one class."""

    sums: Callable[[RankedBlock], np.ndarray]
    """Sums of a block, an array of any fixed shape."""
    value: Callable[[np.ndarray], Value]
    combine: Callable[[np.ndarray, np.ndarray], np.ndarray] = np.add
    """Combines the sums of two blocks or of two ranks."""
    start: float = 0.0
    names: tuple[str, ...] = ()
    """Names of the numbers, for a metric with several."""

    def undefined(self) -> Value:
        """The value for rows of only one class."""
        return dict.fromkeys(self.names, np.nan) if self.names else np.nan


@dataclass(frozen=True)
class ProbabilityMetric(Metric):
    """A metric of predicted probabilities, from weighted sums over rows."""

    value: Callable[[Mapping[str, float]], float]
    """Function of the sums by name: those of `terms`, `weight` and `positives`. Called only if there are rows."""
    terms: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = field(default_factory=dict)
    """Name → term of each row, per unit of its weight: (labels bool [n], probabilities float64 [n]) → [n]."""


@dataclass(frozen=True)
class UserMetric(Metric):
    """A metric within users: the (weighted) mean over users with rows of both classes, as a ratio of two sums."""

    ratio: Callable[[AucPerGroup], tuple[float, float]]
    """Contribution of a group of users, with all of their rows, to (numerator, denominator)."""
