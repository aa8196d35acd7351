"""Rows sorted by score, in memory that an option bounds: sorted runs, on disk where they are many, cut into
ranges of scores of which every rank gets its own.

Letters: n rows, U unique scores, C kinds of mass (see `KINDS`), R ranks, K ranges of a rank.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hllm_torchrec.metrics.exchange import Group, all_gather, common_splitters, exchange, rank_in, world

KINDS = {False: 2, True: 6}
"""C: rows of (positives, negatives); with weights then also their sums of w and of w^2, in the same order."""

FRACTION_BUFFERED, FRACTION_HELD = 16, 4
"""Buffered rows take at most a sixteenth of the memory, since sorting needs some tenfold; sorted runs a quarter."""

RANGE_BYTES = {False: 240, True: 600}
"""Memory that a row of a range needs while ranges are merged and measured, times two."""


@dataclass(frozen=True)
class Tied:
    """Unique scores, ascending, and the mass of rows that each holds."""

    scores: np.ndarray
    """[U], float32 or float64."""
    masses: np.ndarray
    """[C, U]: counts are integers without weights, float64 with them."""


@dataclass
class Pool:
    """The memory that all `SortedRuns` of a job share, and the folder for what does not fit."""

    memory: int
    """Bytes for rows on this rank; interpreter and libraries come on top."""
    folder: Path
    buffered: int = 0
    held: int = 0
    spilled: int = 0
    """Bytes written to disk."""
    members: list["SortedRuns"] = field(default_factory=list)

    def note(self, size: int) -> None:
        """Count `size` more buffered bytes; sort the largest buffers into runs while there are too many."""
        self.buffered += size
        while self.buffered > self.memory // FRACTION_BUFFERED:
            max(self.members, key=lambda member: member.buffered).flush()


class _Run:
    """One sorted run, in memory or in a file."""

    def __init__(self, tied: Tied, pool: Pool):
        self.length, self.kinds, self.path = len(tied.scores), len(tied.masses), None
        self.score_type, self.mass_type = tied.scores.dtype, tied.masses.dtype
        self.tied: Tied | None = tied
        size = tied.scores.nbytes + tied.masses.nbytes
        if pool.held + size <= pool.memory // FRACTION_HELD:
            pool.held += size
            return
        with tempfile.NamedTemporaryFile(dir=pool.folder, suffix=".run", delete=False) as file:
            tied.scores.tofile(file)
            tied.masses.tofile(file)
        pool.spilled += size
        self.path, self.tied = Path(file.name), None

    @property
    def scores(self) -> np.ndarray:
        """[U], mapped if on disk: only for a few look-ups, since pages of a map count as memory."""
        if self.tied is not None or self.path is None:
            assert self.tied is not None
            return self.tied.scores
        return np.memmap(self.path, self.score_type, "r", shape=(self.length,))

    def part(self, low: int, high: int) -> Tied:
        """Rows low..high."""
        if self.path is None:
            assert self.tied is not None
            return Tied(self.tied.scores[low:high], self.tied.masses[:, low:high])
        return Tied(self._read_scores(low, high), self._read_masses(low, high))

    def mass(self, low: int, high: int) -> np.ndarray:
        """Sum over the rows low..high, [C]."""
        masses = self._read_masses(low, high) if self.tied is None else self.tied.masses[:, low:high]
        return masses.sum(axis=1)

    def _read_scores(self, low: int, high: int) -> np.ndarray:
        assert self.path is not None
        return np.fromfile(self.path, self.score_type, high - low, offset=low * self.score_type.itemsize)

    def _read_masses(self, low: int, high: int) -> np.ndarray:
        assert self.path is not None
        start, size = self.length * self.score_type.itemsize, self.mass_type.itemsize
        rows = [
            np.fromfile(self.path, self.mass_type, high - low, offset=start + (kind * self.length + low) * size)
            for kind in range(self.kinds)
        ]
        return np.stack(rows)


class SortedRuns:
    """Collects the rows of this rank in any order; `ranges` then yields them sorted, of all ranks."""

    def __init__(self, pool: Pool, score_type: np.dtype, weighted: bool):
        """`score_type` and `weighted` are the same on every rank."""
        self.pool, self.score_type, self.weighted = pool, np.dtype(score_type), weighted
        self.buffered = 0
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]] = []
        self._runs: list[_Run] = []
        pool.members.append(self)

    def add(self, scores: np.ndarray, is_positive: np.ndarray, weights: np.ndarray | None = None) -> None:
        """Add checked rows: scores of `score_type` without NaN, bool labels, float64 weights if weighted, [n]."""
        assert (weights is not None) == self.weighted
        if not len(scores):
            return
        self._parts.append((scores.astype(self.score_type), is_positive, weights))
        size = sum(array.nbytes for array in self._parts[-1] if array is not None)
        self.buffered += size
        self.pool.note(size)

    def flush(self) -> None:
        """Sort what is buffered into a run."""
        if not self._parts:
            return
        columns = [None if column[0] is None else np.concatenate(column) for column in zip(*self._parts)]
        self._parts = []
        self.pool.buffered -= self.buffered
        self.buffered = 0
        scores, is_positive, weights = columns
        assert scores is not None and is_positive is not None
        self._runs.append(_Run(merge_rows(scores, is_positive, weights), self.pool))

    def plan(self, group: Group = None) -> "Ranges":
        """Cut the runs of all ranks into ranges. Collective; nothing may be added afterwards."""
        self.flush()
        ranks = world(group)
        own = np.array([sum(run.length for run in self._runs)], dtype=np.int64)
        total = int(np.sum(all_gather(own, group)))
        per_rank = -(-total * RANGE_BYTES[self.weighted] // (ranks * max(self.pool.memory, 1)))
        splitters = _splitters(self._runs, self.score_type, ranks * max(per_rank, 1), group)
        return Ranges(self._runs, splitters, max(per_rank, 1), KINDS[self.weighted], self.score_type, group)


class Ranges:
    """Ranges of scores of the rows of all ranks: rank r has the ranges r * K .. (r + 1) * K - 1, ascending."""

    def __init__(
        self,
        runs: list[_Run],
        splitters: np.ndarray,
        per_rank: int,
        kinds: int,
        score_type: np.dtype,
        group: Group,
    ):
        self.splitters, self.per_rank, self.group = splitters, per_rank, group
        self._runs, self._type, self._kinds = runs, score_type, kinds
        self._cuts = [
            np.concatenate([[0], np.searchsorted(run.scores, splitters, side="right"), [run.length]]) for run in runs
        ]
        own = np.zeros((world(group) * per_rank, kinds))
        for run, cuts in zip(runs, self._cuts):
            own += np.stack([run.mass(low, high) for low, high in zip(cuts, cuts[1:])])
        self._masses = np.sum(all_gather(own, group), axis=0)

    @property
    def totals(self) -> np.ndarray:
        """Mass of all rows, float64 [C]; counts are exact below 2^53."""
        return self._masses.sum(axis=0)

    def __iter__(self) -> Iterator[tuple[int, Tied, np.ndarray]]:
        """Yield this rank's (index of the range, its merged rows, mass of all rows below it [C]). Collective."""
        rank = rank_in(self.group)
        below = np.cumsum(self._masses, axis=0) - self._masses
        for step in range(self.per_rank):
            index = rank * self.per_rank + step
            yield index, self._merged(step), below[index]

    def _merged(self, step: int) -> Tied:
        """The range `step` of this rank from the runs of all ranks."""
        wanted = range(step, world(self.group) * self.per_rank, self.per_rank)
        parts = [[run.part(cuts[k], cuts[k + 1]) for run, cuts in zip(self._runs, self._cuts)] for k in wanted]
        sent = [sum(len(part.scores) for part in of_rank) for of_rank in parts]
        flat = [part for of_rank in parts for part in of_rank]
        if len(flat) == 1 and world(self.group) == 1:
            return widened(flat[0])
        mass_type = np.dtype(np.int32 if self._kinds == 2 else np.float64)
        scores = np.concatenate([part.scores for part in flat] or [np.empty(0, self._type)])
        masses = np.concatenate([part.masses for part in flat] or [np.empty((self._kinds, 0), mass_type)], axis=1)
        if world(self.group) > 1:
            scores = exchange(scores, sent, self.group)
            masses = np.stack([exchange(row, sent, self.group) for row in masses])
        return merge_tied(Tied(scores, masses))


def merge_rows(scores: np.ndarray, is_positive: np.ndarray, weights: np.ndarray | None) -> Tied:
    """Rows [n] in any order as unique scores. O(n log n).

    Without weights the masses are int32 [2, U]; with them float64 [6, U].
    """
    if weights is None:
        scores, positives = _sort_labelled(scores, is_positive)
        starts = _starts(scores)
        masses = np.empty((2, len(starts)), dtype=np.int32)
        ends = np.append(starts[1:], len(scores))
        upto = np.cumsum(positives, dtype=np.int32)[ends - 1]
        masses[0, 0], masses[0, 1:] = upto[0], upto[1:] - upto[:-1]
        np.subtract(ends - starts, masses[0], out=masses[1], casting="unsafe")
        return Tied(scores[starts], masses)
    order = np.argsort(scores, kind="stable")
    scores, positive, weights = scores[order], is_positive[order], weights[order]
    starts = _starts(scores)
    rows = np.stack([np.ones_like(weights), weights, weights**2])
    sums = [np.add.reduceat(rows * mask, starts, axis=1) for mask in (positive, ~positive)]
    return Tied(scores[starts], np.stack(sums, axis=1).reshape(6, -1))


def merge_tied(tied: Tied) -> Tied:
    """Sorted runs one after the other as one run of unique scores; counts become int64."""
    if not len(tied.scores):
        return widened(tied)
    order = np.argsort(tied.scores, kind="stable")  # merges ascending stretches in linear time
    scores = tied.scores[order]
    starts = _starts(scores)
    masses = np.empty((len(tied.masses), len(starts)), _wide(tied.masses.dtype))
    for row, into in zip(tied.masses, masses):
        np.add.reduceat(row[order], starts, dtype=masses.dtype, out=into)
    return Tied(scores[starts], masses)


def widened(tied: Tied) -> Tied:
    """The same with counts as int64, whose products do not overflow."""
    return Tied(tied.scores, tied.masses.astype(_wide(tied.masses.dtype), copy=False))


def _wide(kind: np.dtype) -> np.dtype:
    return np.dtype(np.int64 if kind.kind == "i" else np.float64)


def _sort_labelled(scores: np.ndarray, is_positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores ascending, and their labels. float32 is sorted as integers that carry the label in the last bit."""
    if scores.dtype != np.float32:
        order = np.argsort(scores)
        return scores[order], is_positive[order]
    bits = (scores + np.float32(0)).view(np.int32)  # -0.0 becomes 0.0, of which it is a tie
    keys = (bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))).astype(np.int64)  # in the order of the floats
    del bits
    keys <<= 1
    keys |= is_positive
    keys.sort()
    positives = keys.astype(np.int8) & np.int8(1)
    keys >>= 1
    ordered = keys.astype(np.int32)
    del keys
    return (ordered ^ ((ordered >> 31) & np.int32(0x7FFFFFFF))).view(np.float32), positives


def _starts(sorted_scores: np.ndarray) -> np.ndarray:
    """Where each unique score begins, [U]."""
    return np.concatenate([[0], np.flatnonzero(sorted_scores[1:] != sorted_scores[:-1]) + 1])


def _splitters(runs: list[_Run], score_type: np.dtype, ranges: int, group: Group) -> np.ndarray:
    """The scores [ranges - 1] that cut the rows of all runs of all ranks, see `common_splitters`."""
    if ranges == 1:
        return np.empty(0, score_type)
    count = 4 * ranges
    samples = np.zeros((2, count * len(runs)))
    for index, run in enumerate(runs):
        places = ((np.arange(count) + 0.5) / count * run.length).astype(np.int64)
        samples[0, index * count : (index + 1) * count] = run.scores[places]
        samples[1, index * count : (index + 1) * count] = run.length / count
    return common_splitters(samples, ranges, group).astype(score_type)
