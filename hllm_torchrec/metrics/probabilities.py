"""Metrics of probabilities that add up over batches and ranks: log loss, normalised entropy, Brier, calibration,
and the reliability curve from score ranges."""

import math
from dataclasses import dataclass, field

import numpy as np

from hllm_torchrec.distributed.array_collectives import Group, gather_objects
from hllm_torchrec.metrics.ranking import PROBABILITY_FLOOR, ReliabilityCurve
from hllm_torchrec.metrics.score_chunks import SortedChunks

BINS = 10


@dataclass
class ProbabilitySums:
    """Weighted sums over rows; their parts of each batch are kept and added exactly, in any order."""

    parts: list[np.ndarray] = field(default_factory=list)
    """A batch's sums of weight, weight of positives, w x log loss, w x squared error, w x probability."""

    def add(self, is_positive: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None) -> None:
        """Add rows: bool [n], float64 in 0..1 [n], weights > 0 [n]."""
        weight = np.ones(len(is_positive)) if weights is None else weights
        clipped = np.clip(probabilities, PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
        loss = -np.log(np.where(is_positive, clipped, 1 - clipped))
        columns = (np.ones_like(weight), is_positive, loss, (probabilities - is_positive) ** 2, probabilities)
        self.parts.append(np.array([weight @ column for column in columns]))

    def metrics(self, group: Group = None) -> dict[str, float]:
        """`log_loss`, `normalized_entropy`, `brier` and `calibration` of the rows of all ranks, `nan` where they are
        undefined (see `metrics.ranking`). Collective."""
        own = [math.fsum(part[place] for part in self.parts) for place in range(5)]
        weight, positives, loss, error, predicted = (math.fsum(column) for column in zip(*gather_objects(own, group)))
        if not weight:
            return dict.fromkeys(("log_loss", "normalized_entropy", "brier", "calibration"), math.nan)
        rate = positives / weight
        entropy = -rate * math.log(rate) - (1 - rate) * math.log(1 - rate) if 0 < rate < 1 else math.nan
        return {
            "log_loss": loss / weight,
            "normalized_entropy": loss / weight / entropy,
            "brier": error / weight,
            "calibration": predicted / positives if positives else math.nan,
        }


def reliability(chunks: SortedChunks, group: Group = None, bins: int = BINS) -> tuple[ReliabilityCurve, float]:
    """The curve of `ranking.reliability_curve` and its expected calibration error, of rows of all ranks. Collective.

    A bin has about equally many rows; means and rates within it are weighted by the rows' weights.

    Args:
        chunks: of the rows with their probability as score.
    """
    ranges = chunks.split_ranges(group)
    rows = int(ranges.totals[:2].sum())
    sums = np.zeros((4, bins))  # rows, weight, weight x probability, weight of positives
    for _, tied, below in ranges:
        counts = tied.masses[0] + tied.masses[1]
        upto = below[:2].sum() + np.cumsum(counts)
        places = (
            np.minimum((upto - 1) * bins // max(rows - 1, 1), bins - 1).astype(np.int64)
            if rows > 1
            else (np.full(len(counts), bins - 1))
        )
        positives = tied.masses[2] if chunks.weighted else tied.masses[0]
        weights = tied.masses[2] + tied.masses[3] if chunks.weighted else counts
        for row, values in enumerate((counts, weights, weights * tied.scores.astype(np.float64), positives)):
            sums[row] += np.bincount(places, values, bins)
    total = np.sum(gather_objects(sums, group), axis=0)
    count, weight, predicted, positive = total[:, total[0] > 0]
    curve = ReliabilityCurve(predicted / weight, positive / weight, count.astype(np.int64))
    if not rows:
        return curve, math.nan
    error = np.average(abs(curve.observed_rate - curve.mean_probability), weights=weight)
    return curve, float(error)
