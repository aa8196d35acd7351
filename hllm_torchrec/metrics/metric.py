"""The three kinds of metrics of `hllm evaluate`, by what they are computed from; `registry.METRICS` lists them.

A metric is sums that add up over rows, batches and ranks, and a value of those sums. Letters: U unique scores, n rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from hllm_torchrec.metrics.group_auc import AucPerGroup

Value = float | dict[str, float]
"""What a metric gives: a number (`nan` where it is undefined), or numbers by name, such as the recall at precisions."""


@dataclass(frozen=True)
class Metric:
    """How a metric is named in `metrics.json` (also for the TorchX tracker and TensorBoard) and in the report."""

    key: str
    title: str
    """The column in the report; of numbers by name, what stands before each name."""
    meaning: str
    """One clause for the report's notes: what the number says, and what is good."""


@dataclass(frozen=True)
class RankedBlock:
    """Some unique scores, ascending, and the rows that have them, in a pass over all rows by score.

    Masses are numbers of rows, or sums of their weights; row 0 is of positives, row 1 of negatives, [2, U] each.
    """

    mass: np.ndarray
    under: np.ndarray
    """Mass of all rows with lower scores."""
    total: tuple[float, float]
    """Mass of all rows there are, of each class more than 0."""
    over: np.ndarray
    """Mass of the rows with these scores or higher: what a threshold at the score calls positive."""
    precision: np.ndarray
    """Share of positives in `over`, [U]."""


@dataclass(frozen=True)
class RankMetric(Metric):
    """A metric of the order of the rows. Of rows of one class only it is `nan`."""

    sums: Callable[[RankedBlock], np.ndarray]
    """What a block adds, an array of any fixed shape."""
    value: Callable[[np.ndarray], Value]
    combine: Callable[[np.ndarray, np.ndarray], np.ndarray] = np.add
    """How the sums of two blocks, or of two ranks, become one."""
    start: float = 0.0
    names: tuple[str, ...] = ()
    """Of the numbers, for a metric that gives several."""

    def undefined(self) -> Value:
        """What rows of one class give."""
        return dict.fromkeys(self.names, np.nan) if self.names else np.nan


@dataclass(frozen=True)
class ProbabilityMetric(Metric):
    """A metric of predicted probabilities, from weighted sums over rows."""

    value: Callable[[Mapping[str, float]], float]
    """Of the sums by name; `weight` and `positives` are there besides those of `terms`. Only called with rows."""
    terms: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = field(default_factory=dict)
    """Name → what each row adds, per unit of its weight: (bool [n], probabilities float64 [n]) → [n]."""


@dataclass(frozen=True)
class UserMetric(Metric):
    """A metric within users, the mean over those who have rows of both classes: the ratio of two sums."""

    ratio: Callable[[AucPerGroup], tuple[float, float]]
    """What some users, with all their rows, add to numerator and denominator."""
