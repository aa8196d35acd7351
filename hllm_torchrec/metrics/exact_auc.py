"""Exact AUC, its standard error, and the other ranking metrics of any number of rows.

They are computed in one pass over the score ranges of all ranks (`score_chunks.ScoreRanges`). `MemoryPool.memory`
bounds the memory.

Legend: P and N, total weight of positives and negatives (their number without weights); U unique scores.
"""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path

import numpy as np

from hllm_torchrec.distributed.array_collectives import (
    Group,
    all_gather,
    all_to_all,
    gather_objects,
    group_rank,
    world_size,
)
from hllm_torchrec.metrics.intervals import AucInterval, logit_interval
from hllm_torchrec.metrics.metric import RankedBlock, Value
from hllm_torchrec.metrics.registry import RANK_METRICS
from hllm_torchrec.metrics.score_chunks import ScoreMasses, ScoreRanges, SortedChunks

BLOCK = 1 << 14
"""Number of unique scores processed at a time: the arrays of a block fit into the processor's cache."""

CURVE_POINTS = 200
GRID = np.sort(np.concatenate([np.linspace(0, 2, CURVE_POINTS * 3 // 4), 2 * np.logspace(-5, -1, CURVE_POINTS // 4)]))
"""Positions along the ROC curve (false plus true positive rate, 0 to 2) at which points are stored; denser near 0."""


@dataclass(frozen=True)
class RankStatistics:
    """Statistics of the order of the rows; `nan` if a class is empty."""

    interval: AucInterval
    """AUC with ties as one half, DeLong's standard error and 95% interval."""
    metrics: dict[str, Value]
    """Key of each `RankMetric` of the registry → its value."""
    curve: np.ndarray
    """Points (false positive rate, recall, precision) [3, at most CURVE_POINTS + 2], in order of descending score."""
    rows: int
    positives: int
    weight: tuple[float, float]
    """P and N."""


@dataclass
class _Sums:
    """Sums over unique scores, additive over ranges and ranks."""

    concordant: float | int = 0
    """Twice the weight of the correctly ranked pairs, where a tie counts one half: without weights an exact integer."""
    moments: np.ndarray = field(default_factory=lambda: np.zeros((2, 3)))
    """Sums of w^2, w^2 (V - 1/2) and w^2 (V - 1/2)^2 for positives and negatives, with the placement V, [2, 3]."""
    metrics: dict[str, np.ndarray] = field(
        default_factory=lambda: {metric.key: np.array(metric.start) for metric in RANK_METRICS}
    )
    corners: list[np.ndarray] = field(default_factory=list)
    """Points of the ROC curve of each range, as in `RankStatistics.curve`, but in order of ascending score."""


class Placements:
    """Placement values of each unique score, stored for `look_up`.

    The placement of a row is the share of the other class against which the row is ranked correctly (ties count one
    half). Values are stored in memory up to a share of the pool's memory, and otherwise on disk.
    """

    def __init__(self, chunks: SortedChunks, ranges: ScoreRanges):
        """Create an empty store; `rank_statistics` fills it."""
        self._pool, self._ranges = chunks.pool, ranges
        self._tables: dict[int, tuple[np.ndarray, np.ndarray] | tuple[Path, np.dtype, int]] = {}

    def add(self, index: int, scores: np.ndarray, values_2U: np.ndarray) -> None:
        """Store the placements [2, U] of a range: those of a positive row and of a negative row with each score."""
        size = scores.nbytes + values_2U.nbytes
        if self._pool.sorted_bytes + size <= self._pool.memory // 4:
            self._pool.sorted_bytes += size
            self._tables[index] = scores, values_2U
            return
        with tempfile.NamedTemporaryFile(dir=self._pool.folder, suffix=".placements", delete=False) as file:
            values_2U.tofile(file)
            scores.tofile(file)
        self._pool.spilled += size
        self._tables[index] = Path(file.name), scores.dtype, len(scores)

    def look_up(self, scores: np.ndarray, is_positive: np.ndarray) -> np.ndarray:
        """Return the placement of each row [n], whose score must be among the stored ones. Collective.

        A rank may have no rows.
        """
        group = self._ranges.group
        ranks, per_rank = world_size(group), self._ranges.per_rank
        # side="left": a score equal to a splitter belongs to the range that the splitter ends, as in `ScoreRanges`.
        index = np.searchsorted(self._ranges.splitters, scores, side="left")
        order = np.lexsort((scores, index))
        sent = np.bincount(index // per_rank, minlength=ranks).tolist()
        requested = all_to_all(scores[order], sent, group)
        answers = self._answer(requested)
        # The answers are sent back in the order in which the requests arrived: to each rank as many as it requested.
        back = [int(count) for count in _transposed(sent, group)]
        returned = np.stack([all_to_all(row, back, group) for row in answers])
        placements = np.empty(len(scores))
        placements[order] = np.where(is_positive[order], returned[0], returned[1])
        return placements

    def _answer(self, requested: np.ndarray) -> np.ndarray:
        """Return the placements [2, n] of a positive and a negative row with each score [n] of this rank's ranges."""
        index = np.searchsorted(self._ranges.splitters, requested, side="left")
        answers = np.empty((2, len(requested)))
        for table in np.unique(index):
            rows = np.flatnonzero(index == table)
            scores, values = self._load(int(table))
            columns = np.searchsorted(scores, requested[rows])
            answers[:, rows] = values[:, columns]
        return answers

    def _load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        table = self._tables[index]
        if len(table) == 2:
            return table
        path, kind, length = table
        values = np.fromfile(path, np.float64, 2 * length).reshape(2, length)
        return np.fromfile(path, kind, length, offset=values.nbytes), values


def rank_statistics(
    chunks: SortedChunks, group: Group = None, *, keep: bool = False
) -> tuple[RankStatistics, Placements]:
    """Compute the statistics of the rows of all ranks; the result is the same on every rank. Collective.

    Without weights the AUC is bitwise equal for any number of ranks and any memory (integers up to 2^63). All other
    values, and everything with weights, agree to 1e-12.

    With weights the standard error is that of fixed weights on independent rows: DeLong's with the variance of
    each class replaced by n / (n - 1) x sum of (w / W)^2 (V - AUC)^2, for n rows of total weight W.

    Args:
        keep: fill the returned `Placements`; otherwise they are empty.
    """
    ranges = chunks.split_ranges(group)
    totals, placements = ranges.totals, Placements(chunks, ranges)
    positives, negatives = (totals[2], totals[3]) if chunks.weighted else (totals[0], totals[1])
    sums = _Sums()
    for index, tied, below in ranges:
        values = _add_range(sums, tied, below, positives, negatives, keep)
        if values is not None:
            placements.add(index, tied.scores, values)
    parts = gather_objects(sums, group)
    return _finish(parts, totals, positives, negatives), placements


def _add_range(
    sums: _Sums, tied: ScoreMasses, below: np.ndarray, positives: float, negatives: float, keep: bool
) -> np.ndarray | None:
    """Add a range's unique scores to `sums`; return their placements [2, U] (positive, negative) if `keep`, else None.

    below: mass of all rows with scores below the range. The scores are processed in blocks that fit into the
    processor's cache, which is three times as fast as processing complete columns.
    """
    weighted = len(tied.masses) == 6
    kinds = slice(2, 4) if weighted else slice(0, 2)
    start = below[kinds] if weighted else below[:2].astype(np.int64)
    has_pairs = positives > 0 and negatives > 0
    values = np.full((2, len(tied.scores)), math.nan) if keep else None
    curve: list[np.ndarray] = []
    for first in range(0, len(tied.scores), BLOCK):
        part = slice(first, first + BLOCK)
        mass = tied.masses[kinds, part]
        # Per score: mass of the rows with lower scores (`under`), and with lower or equal scores (`upto`).
        upto = np.cumsum(mass, axis=1)
        upto += start[:, None]
        under = upto - mass
        start = upto[:, -1].copy()
        # A positive adds 2 for each negative with a lower score and 1 for each with the same score: under + upto.
        sums.concordant += (mass[0] * (under[1] + upto[1])).sum().item()
        if has_pairs:
            placements = np.stack([(under[1] + upto[1]) / (2 * negatives), 1 - (under[0] + upto[0]) / (2 * positives)])
            _add_moments(sums, placements, tied.masses[4:6, part] if weighted else mass)
            curve += _add_thresholds(sums, mass, under, (positives, negatives))
            if values is not None:
                values[:, part] = placements
    if curve:
        sums.corners.append(np.concatenate(curve, axis=1))
    return values


def _add_moments(sums: _Sums, placements: np.ndarray, squares: np.ndarray) -> None:
    """Add to the sums of w^2, w^2 (V - 1/2) and w^2 (V - 1/2)^2 of both classes; squares: sums of w^2, [2, U]."""
    # The moments are around 1/2, because the AUC is not known yet. With moments around 0, the subtraction in
    # `_standard_error` would lose more digits.
    centred = placements - 0.5
    sums.moments[:, 0] += squares.sum(axis=1)
    weighed = squares * centred
    sums.moments[:, 1] += weighed.sum(axis=1)
    weighed *= centred
    sums.moments[:, 2] += weighed.sum(axis=1)


def _add_thresholds(sums: _Sums, mass: np.ndarray, under: np.ndarray, total: tuple[float, float]) -> list[np.ndarray]:
    """Add the metrics of a block's thresholds, and return its points of the ROC curve.

    A threshold predicts rows with its score or a higher one as positive.
    """
    over = np.maximum(np.array(total)[:, None] - under, mass)  # >= mass, although rounding may lose rows of low weight
    block = RankedBlock(mass, total, over, over[0] / (over[0] + over[1]))
    for metric in RANK_METRICS:
        sums.metrics[metric.key] = metric.combine(sums.metrics[metric.key], metric.sums(block))
    true_rate, false_rate = over[0] / total[0], over[1] / total[1]
    # The block stores points for the grid positions after `above`, the curve's position just above the block, up to the
    # position of the block's lowest score. If it began at the position of its highest score, the division into blocks,
    # which depends on the number of ranks and on memory, would change the curve. Only the topmost block begins there.
    above = ((over[:, -1] - mass[:, -1]) / np.array(total)).sum()
    low = np.searchsorted(GRID, above, "right") if above > 0 else np.searchsorted(GRID, true_rate[-1] + false_rate[-1])
    inside = GRID[low : np.searchsorted(GRID, true_rate[0] + false_rate[0], "right")]
    return [_corners(np.stack([false_rate, true_rate, block.precision]), inside)] if inside.size else []


def _corners(curve_3U: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Return, in order of ascending score, the block's points at or next after each grid position in `inside`."""
    along = (curve_3U[0] + curve_3U[1])[::-1]  # reversed: the rates fall as the score rises
    points = np.unique(np.searchsorted(along, inside))
    return curve_3U[:, ::-1][:, points[::-1]]


def _finish(parts: Sequence[_Sums], totals: np.ndarray, positives: float, negatives: float) -> RankStatistics:
    if positives > 0 and negatives > 0:
        interval = _interval(parts, totals, positives, negatives)
        combined = {m.key: reduce(m.combine, [part.metrics[m.key] for part in parts]) for m in RANK_METRICS}
        metrics = {metric.key: metric.value(combined[metric.key]) for metric in RANK_METRICS}
        corners = np.concatenate([corner for part in parts for corner in part.corners], axis=1)[:, ::-1]
        first = np.array([[0.0], [0.0], [corners[2, 0] if corners.size else 1.0]])
        last = np.array([[1.0], [1.0], [positives / (positives + negatives)]])
        curve = np.concatenate([first, corners, last], axis=1)
    else:
        interval = AucInterval(math.nan, math.nan, math.nan, math.nan)
        metrics, curve = {metric.key: metric.undefined() for metric in RANK_METRICS}, np.empty((3, 0))
    weight = float(positives), float(negatives)
    return RankStatistics(interval, metrics, curve, int(totals[0] + totals[1]), int(totals[0]), weight)


def _interval(parts: Sequence[_Sums], totals: np.ndarray, positives: float, negatives: float) -> AucInterval:
    """Return the AUC with DeLong's interval."""
    concordant = sum(part.concordant for part in parts)
    if len(totals) == 2:
        auc = concordant / (2 * int(positives) * int(negatives))  # a ratio of integers, rounded once
    else:
        auc = concordant / 2 / positives / negatives
    moments = np.sum([part.moments for part in parts], axis=0)
    return logit_interval(float(auc), _standard_error(moments, auc, totals, (positives, negatives)))


def _standard_error(moments: np.ndarray, auc: float, totals: np.ndarray, weights: tuple[float, float]) -> float:
    """Return DeLong's standard error; `nan` if a class has fewer than two rows."""
    variance, shift = 0.0, auc - 0.5
    for (zeroth, first, second), rows, weight in zip(moments, totals[:2], weights):
        if rows < 2:
            return math.nan
        # Sum of w^2 (V - AUC)^2, computed from the moments around 1/2.
        spread = second - 2 * shift * first + shift**2 * zeroth
        variance += max(spread, 0.0) / weight**2 * rows / (rows - 1)
    return math.sqrt(variance)


def _transposed(sent: Sequence[int], group: Group) -> Sequence[int]:
    """Return the number of rows that each rank sent to this rank. Collective."""
    if world_size(group) == 1:
        return sent
    rank = group_rank(group)
    return [int(row[rank]) for row in all_gather(np.array(sent, dtype=np.int64), group)]
