"""Metrics of predicted probabilities, computed from sums over batches and ranks, and the reliability curve."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from hllm_torchrec.distributed.array_collectives import gather_objects
from hllm_torchrec.metrics.metric import ProbabilityMetric
from hllm_torchrec.metrics.score_chunks import SortedChunks

BINS = 10

PROBABILITY_FLOOR = float(np.finfo(np.float32).eps)
"""Log loss clips probabilities to [floor, 1 - floor], as scikit-learn does for float32. Predictions are stored as
float32, in which the sigmoid of 18 is rounded to 1."""


def row_log_loss(is_positive: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Binary cross-entropy of each row in nats, [n]."""
    clipped = np.clip(probabilities, PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
    losses: np.ndarray = -np.log(np.where(is_positive, clipped, 1 - clipped))
    return losses


def base_entropy(sums: Mapping[str, float]) -> float:
    """Log loss of always predicting the base rate; `nan` with only one class."""
    rate = sums["positives"] / sums["weight"]
    return -rate * math.log(rate) - (1 - rate) * math.log(1 - rate) if 0 < rate < 1 else math.nan


LOG_LOSS = ProbabilityMetric(
    "log_loss",
    "log loss",
    "mean binary cross-entropy in nats",
    value=lambda sums: sums["log_loss"] / sums["weight"],
    terms={"log_loss": row_log_loss},
)
NORMALIZED_ENTROPY = ProbabilityMetric(
    "normalized_entropy",
    "NE",
    "normalized entropy, log loss over that of always predicting the base rate (He et al. 2014): useful below 1",
    value=lambda sums: sums["log_loss"] / sums["weight"] / base_entropy(sums),
    terms={"log_loss": row_log_loss},
)
BRIER = ProbabilityMetric(
    "brier",
    "Brier",
    "mean squared difference of probability and label",
    value=lambda sums: sums["squared_error"] / sums["weight"],
    terms={"squared_error": lambda is_positive, probabilities: (probabilities - is_positive) ** 2},
)
CALIBRATION = ProbabilityMetric(
    "calibration",
    "calibration",
    "sum of probabilities over number of positives: right at 1",
    value=lambda sums: sums["predicted"] / sums["positives"] if sums["positives"] else math.nan,
    terms={"predicted": lambda is_positive, probabilities: probabilities},
)
ECE = ProbabilityMetric(
    "ece",
    "ECE",
    "expected calibration error: mean gap of probability and observed rate over ten bins of equally many rows",
    value=lambda sums: sums["calibration_error"],  # computed by `reliability`, which needs the rows in order of score
)


@dataclass(frozen=True)
class ReliabilityCurve:
    """Bins of rows with similar predicted probability, in ascending order; empty bins are left out."""

    mean_probability: np.ndarray
    observed_rate: np.ndarray
    rows: np.ndarray


@dataclass
class ProbabilitySums:
    """Weighted sums over rows. The sums of each batch are stored and added exactly, so their order does not matter."""

    metrics: list[ProbabilityMetric]
    parts: list[dict[str, float]] = field(default_factory=list)
    """Per batch: sums of weight, of positives' weight, and of weight x each term of the metrics."""

    def add(self, is_positive: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None) -> None:
        """Add rows: bool [n], float64 in 0..1 [n], weights > 0 [n]."""
        weight = np.ones(len(is_positive)) if weights is None else weights
        columns = {"weight": np.ones_like(weight), "positives": is_positive}
        terms = {name: term for metric in self.metrics for name, term in metric.terms.items()}
        columns |= {name: term(is_positive, probabilities) for name, term in terms.items()}
        self.parts.append({name: float(weight @ column) for name, column in columns.items()})

    def values(self, calibration_error: float) -> dict[str, float]:
        """Return key -> metric of the rows of all ranks; `nan` if undefined. Collective.

        calibration_error: the ECE, from `reliability`.
        """
        names = {"weight", "positives", *(name for metric in self.metrics for name in metric.terms)}
        local = {name: math.fsum(part[name] for part in self.parts) for name in names}
        gathered = gather_objects(local)
        sums = {name: math.fsum(part[name] for part in gathered) for name in names}
        sums["calibration_error"] = calibration_error
        return {metric.key: metric.value(sums) if sums["weight"] else math.nan for metric in self.metrics}


def reliability(chunks: SortedChunks) -> tuple[ReliabilityCurve, float]:
    """Compute the mean predicted probability and the observed rate per bin, and the expected calibration error (ECE).

    The ECE is the mean gap between the two over the bins, weighted by the bins' weights. Collective.

    Bins have equal numbers of rows, not equal width: with a click rate of 1%, nearly all rows would be in one of ten
    bins of equal width. Rows with equal probabilities are always in the same bin, so the result does not depend on the
    order of rows. Means and rates within a bin are weighted by the rows' weights.

    Args:
        chunks: the rows, with their probability as score.
    """
    ranges = chunks.split_ranges()
    rows = int(ranges.totals[:2].sum())
    sums = np.zeros((4, BINS))  # rows, weight, weight x probability, weight of positives
    for _, tied, below in ranges:
        counts = tied.masses[0] + tied.masses[1]
        # All rows of a score are in the bin of its last row, which is row (upto - 1) of 0..rows - 1.
        upto = below[:2].sum() + np.cumsum(counts)
        bin_indices = np.minimum((upto - 1) * BINS // max(rows - 1, 1), BINS - 1).astype(np.int64)
        positives = tied.masses[2] if chunks.weighted else tied.masses[0]
        weights = tied.masses[2] + tied.masses[3] if chunks.weighted else counts
        for row, values in enumerate((counts, weights, weights * tied.scores.astype(np.float64), positives)):
            sums[row] += np.bincount(bin_indices, values, BINS)
    total = np.sum(gather_objects(sums), axis=0)
    count, weight, predicted, positive = total[:, total[0] > 0]
    curve = ReliabilityCurve(predicted / weight, positive / weight, count.astype(np.int64))
    if not rows:
        return curve, math.nan
    error = np.average(abs(curve.observed_rate - curve.mean_probability), weights=weight)
    return curve, float(error)
