"""Distributed external sort of rows by score, in bounded memory.

Each rank sorts its rows into runs, which are stored on disk if there are many. The runs of all ranks are cut into
ranges of scores, and each rank merges some of the ranges.

Legend: n rows, U unique scores, C kinds of mass (see `KINDS`), K ranges per rank, S samples of
scores.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hllm_torchrec.distributed.array_collectives import Group, all_gather, all_to_all, group_rank, world_size

KINDS = {False: 2, True: 6}
"""weighted -> C. Kinds of mass: numbers of positives and negatives; with weights also their sums of w, and of w^2."""

FRACTION_BUFFERED, FRACTION_SORTED = 16, 4
"""Buffered rows take at most 1/16 of the memory, because sorting needs about ten times their size. Sorted runs take at
most 1/4; further runs are written to disk."""

RANGE_BYTES = {False: 240, True: 600}
"""weighted -> memory in bytes per row of a range while its rows are merged and its metrics computed, with a safety
factor of two."""


@dataclass(frozen=True)
class ScoreMasses:
    """Unique scores, ascending, and the mass of the rows with each score."""

    scores: np.ndarray
    """[U], float32, float64 or int64."""
    masses: np.ndarray
    """[C, U]: integers without weights, float64 with weights."""


@dataclass
class MemoryPool:
    """Memory budget shared by all `SortedChunks` of a job, and the folder for spilled data."""

    memory: int
    """Bytes for rows on this rank, in addition to interpreter and libraries."""
    folder: Path
    buffered: int = 0
    sorted_bytes: int = 0
    spilled: int = 0
    """Bytes written to disk."""
    members: list["SortedChunks"] = field(default_factory=list)

    def reserve(self, size: int) -> None:
        """Add `size` to the buffered bytes; while these exceed the limit, sort the largest buffer into a run."""
        self.buffered += size
        while self.buffered > self.memory // FRACTION_BUFFERED:
            max(self.members, key=lambda member: member.buffered).flush()


class _SortedChunk:
    """One sorted run, in memory or in a file."""

    def __init__(self, rows: ScoreMasses, pool: MemoryPool):
        self.length, self.kinds, self.path = len(rows.scores), len(rows.masses), None
        self.score_type, self.mass_type = rows.scores.dtype, rows.masses.dtype
        self.rows: ScoreMasses | None = rows
        size = rows.scores.nbytes + rows.masses.nbytes
        if pool.sorted_bytes + size <= pool.memory // FRACTION_SORTED:
            pool.sorted_bytes += size
            return
        # Column by column (scores, then each kind of mass), so that a range of a column is contiguous in the file.
        with tempfile.NamedTemporaryFile(dir=pool.folder, suffix=".run", delete=False) as file:
            rows.scores.tofile(file)
            rows.masses.tofile(file)
        pool.spilled += size
        self.path, self.rows = Path(file.name), None

    @property
    def scores(self) -> np.ndarray:
        """Scores [U], memory-mapped if they are on disk. Use it for few lookups only: mapped pages count as memory."""
        if self.rows is not None or self.path is None:
            assert self.rows is not None
            return self.rows.scores
        return np.memmap(self.path, self.score_type, "r", shape=(self.length,))

    def slice(self, low: int, high: int) -> ScoreMasses:
        """Return the unique scores number low..high - 1, with their masses."""
        if self.path is None:
            assert self.rows is not None
            return ScoreMasses(self.rows.scores[low:high], self.rows.masses[:, low:high])
        return ScoreMasses(self._read_scores(low, high), self._read_masses(low, high))

    def mass(self, low: int, high: int) -> np.ndarray:
        """Return the sum of the masses of the unique scores number low..high - 1, [C]."""
        masses = self._read_masses(low, high) if self.rows is None else self.rows.masses[:, low:high]
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


class SortedChunks:
    """Collects the rows of this rank in any order; `split_ranges` then cuts the rows of all ranks into score ranges."""

    def __init__(self, pool: MemoryPool, score_type: np.dtype, weighted: bool):
        """Start without rows. score_type and weighted must be the same on every rank."""
        self.pool, self.score_type, self.weighted = pool, np.dtype(score_type), weighted
        self.buffered = 0
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]] = []
        self._chunks: list[_SortedChunk] = []
        pool.members.append(self)

    def add(self, scores: np.ndarray, is_positive: np.ndarray, weights: np.ndarray | None = None) -> None:
        """Add valid rows [n]: scores without NaN, bool labels, and float64 weights if weighted."""
        assert (weights is not None) == self.weighted
        if not len(scores):
            return
        self._parts.append((scores.astype(self.score_type), is_positive, weights))
        size = sum(array.nbytes for array in self._parts[-1] if array is not None)
        self.buffered += size
        self.pool.reserve(size)

    def flush(self) -> None:
        """Sort the buffered rows into a run."""
        if not self._parts:
            return
        columns = [None if column[0] is None else np.concatenate(column) for column in zip(*self._parts)]
        self._parts = []
        self.pool.buffered -= self.buffered
        self.buffered = 0
        scores, is_positive, weights = columns
        assert scores is not None and is_positive is not None
        self._chunks.append(_SortedChunk(merge_rows(scores, is_positive, weights), self.pool))

    def split_ranges(self, group: Group = None) -> "ScoreRanges":
        """Cut the runs of all ranks into ranges. Collective; nothing may be added afterwards."""
        self.flush()
        ranks = world_size(group)
        local_rows = np.array([sum(chunk.length for chunk in self._chunks)], dtype=np.int64)
        total = int(np.sum(all_gather(local_rows, group)))
        # Number of ranges per rank with which one range fits into the memory.
        per_rank = -(-total * RANGE_BYTES[self.weighted] // (ranks * max(self.pool.memory, 1)))
        splitters = _splitters(self._chunks, self.score_type, ranks * max(per_rank, 1), group)
        return ScoreRanges(self._chunks, splitters, max(per_rank, 1), KINDS[self.weighted], self.score_type, group)


class ScoreRanges:
    """Score ranges of the rows of all ranks: rank r has the ranges r * K .. (r + 1) * K - 1, in ascending order."""

    def __init__(
        self,
        chunks: list[_SortedChunk],
        splitters: np.ndarray,
        per_rank: int,
        kinds: int,
        score_type: np.dtype,
        group: Group,
    ):
        self.splitters, self.per_rank, self.group = splitters, per_rank, group
        self._chunks, self._type, self._kinds = chunks, score_type, kinds
        # side="right": rows with the score of a splitter belong to the range below it, so ties stay together.
        self._cuts = [
            np.concatenate([[0], np.searchsorted(chunk.scores, splitters, side="right"), [chunk.length]])
            for chunk in chunks
        ]
        local_masses = np.zeros((world_size(group) * per_rank, kinds))
        for chunk, cuts in zip(chunks, self._cuts):
            local_masses += np.stack([chunk.mass(low, high) for low, high in zip(cuts, cuts[1:])])
        self._masses = np.sum(all_gather(local_masses, group), axis=0)

    @property
    def totals(self) -> np.ndarray:
        """Total masses of all rows, float64 [C]; counts are exact below 2^53."""
        return self._masses.sum(axis=0)

    def __iter__(self) -> Iterator[tuple[int, ScoreMasses, np.ndarray]]:
        """Yield (index, merged rows, mass [C] of all rows below the range) for each range of this rank. Collective."""
        rank = group_rank(self.group)
        below = np.cumsum(self._masses, axis=0) - self._masses
        for step in range(self.per_rank):
            index = rank * self.per_rank + step
            yield index, self._merged(step), below[index]

    def _merged(self, step: int) -> ScoreMasses:
        """Merge range number `step` of this rank from the runs of all ranks. Collective."""
        # All ranks exchange range number `step` of every rank at the same time: index r * K + step goes to rank r.
        ranges = range(step, world_size(self.group) * self.per_rank, self.per_rank)
        parts = [[chunk.slice(cuts[k], cuts[k + 1]) for chunk, cuts in zip(self._chunks, self._cuts)] for k in ranges]
        sent = [sum(len(part.scores) for part in of_rank) for of_rank in parts]
        flat = [part for of_rank in parts for part in of_rank]
        if len(flat) == 1 and world_size(self.group) == 1:
            return with_wide_masses(flat[0])
        mass_type = np.dtype(np.int32 if self._kinds == 2 else np.float64)
        scores = np.concatenate([part.scores for part in flat] or [np.empty(0, self._type)])
        masses = np.concatenate([part.masses for part in flat] or [np.empty((self._kinds, 0), mass_type)], axis=1)
        if world_size(self.group) > 1:
            scores = all_to_all(scores, sent, self.group)
            masses = np.stack([all_to_all(row, sent, self.group) for row in masses])
        return merge_score_masses(ScoreMasses(scores, masses))


def merge_rows(scores: np.ndarray, is_positive: np.ndarray, weights: np.ndarray | None) -> ScoreMasses:
    """Sort rows [n] and combine those with equal scores. O(n log n).

    Without weights the masses are int32 [2, U]; with them float64 [6, U].
    """
    if weights is None:
        scores, positives = _sort_labelled(scores, is_positive)
        starts = _starts(scores)
        masses = np.empty((2, len(starts)), dtype=np.int32)
        ends = np.append(starts[1:], len(scores))
        # Positives per score: differences of the cumulative count at the ends of the tied stretches.
        upto = np.cumsum(positives, dtype=np.int32)[ends - 1]
        masses[0, 0], masses[0, 1:] = upto[0], upto[1:] - upto[:-1]
        np.subtract(ends - starts, masses[0], out=masses[1], casting="unsafe")
        return ScoreMasses(scores[starts], masses)
    order = np.argsort(scores, kind="stable")
    scores, positive, weights = scores[order], is_positive[order], weights[order]
    starts = _starts(scores)
    rows = np.stack([np.ones_like(weights), weights, weights**2])
    sums = [np.add.reduceat(rows * mask, starts, axis=1) for mask in (positive, ~positive)]
    return ScoreMasses(scores[starts], np.stack(sums, axis=1).reshape(6, -1))


def merge_score_masses(rows: ScoreMasses) -> ScoreMasses:
    """Merge concatenated sorted runs into one run of unique scores; counts become int64."""
    if not len(rows.scores):
        return with_wide_masses(rows)
    order = np.argsort(rows.scores, kind="stable")  # timsort merges the ascending runs in about linear time
    scores = rows.scores[order]
    starts = _starts(scores)
    masses = np.empty((len(rows.masses), len(starts)), _wide(rows.masses.dtype))
    for row, into in zip(rows.masses, masses):
        np.add.reduceat(row[order], starts, dtype=masses.dtype, out=into)
    return ScoreMasses(scores[starts], masses)


def with_wide_masses(rows: ScoreMasses) -> ScoreMasses:
    """Return the same rows with int64 counts, whose products do not overflow."""
    return ScoreMasses(rows.scores, rows.masses.astype(_wide(rows.masses.dtype), copy=False))


def _wide(kind: np.dtype) -> np.dtype:
    return np.dtype(np.int64 if kind.kind == "i" else np.float64)


def _sort_labelled(scores: np.ndarray, is_positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores in ascending order, and their labels."""
    if scores.dtype != np.float32:
        order = np.argsort(scores)
        return scores[order], is_positive[order]
    # float32 scores are sorted as integers whose last bit is the label: faster than argsort and two gathers.
    bits = (scores + np.float32(0)).view(np.int32)  # + 0 turns -0.0 into 0.0, because the two are tied
    # The bits of negative floats order in reverse: flipping all but the sign bit gives integers in float order.
    keys = (bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))).astype(np.int64)
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
    """Return the index of the first row of each unique score, [U]."""
    return np.concatenate([[0], np.flatnonzero(sorted_scores[1:] != sorted_scores[:-1]) + 1])


def _splitters(chunks: list[_SortedChunk], score_type: np.dtype, ranges: int, group: Group) -> np.ndarray:
    """Return scores [ranges - 1] that cut the rows of all runs of all ranks into ranges; see `common_splitters`."""
    if ranges == 1:
        return np.empty(0, score_type)
    count = 4 * ranges
    samples = np.zeros((2, count * len(chunks)))
    for index, chunk in enumerate(chunks):
        positions = ((np.arange(count) + 0.5) / count * chunk.length).astype(np.int64)
        samples[0, index * count : (index + 1) * count] = chunk.scores[positions]
        samples[1, index * count : (index + 1) * count] = chunk.length / count
    splitters = common_splitters(samples, ranges, group)
    if score_type.kind == "i":  # float64 rounds the largest int64 numbers up to 2^63, which is out of range for int64
        splitters = np.minimum(splitters, float(np.iinfo(score_type).max - 1023))
    return splitters.astype(score_type)


def common_splitters(samples_2S: np.ndarray, ranges: int, group: Group = None) -> np.ndarray:
    """Return scores [ranges - 1] that divide the rows of all ranks into ranges of about equal size. Collective.

    samples_2S: float64 (score, number of rows that the sample represents) of this rank. With 4 x ranges regular samples
    of each sorted run, a range has at most about 1.25 times the average number of rows, plus one row per run. Rows with
    equal scores are in the same range, which may therefore be larger.
    """
    gathered = np.concatenate(all_gather(samples_2S, group), axis=1)
    if not gathered.size:
        return np.zeros(ranges - 1)
    ordered = gathered[:, gathered[0].argsort(kind="stable")]
    shares = np.cumsum(ordered[1])
    quantiles = shares[-1] * np.arange(1, ranges) / ranges
    return ordered[0, np.minimum(np.searchsorted(shares, quantiles), len(shares) - 1)]
