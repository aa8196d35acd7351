"""Rows kept from the only reading of prediction files, for later passes over them."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from hllm_torchrec.evaluation.prediction_rows import RowBatch

FRACTION_SPOOLED = 8
"""Kept rows of all labels take at most 1/8 of the memory; the rest is on disk."""


@dataclass
class Spool:
    """Memory for the kept rows of all labels on this rank, and the folder for those that do not fit."""

    memory: int
    """Bytes for rows, of which the kept ones take a share."""
    folder: Path
    held: int = 0
    spilled: int = 0
    """Bytes written to disk, those of other uses of the memory included."""

    @property
    def read_rows(self) -> int:
        """Number of rows that are read together."""
        return max(64, min(1 << 20, self.memory // 1024))

    @property
    def influence_rows(self) -> int:
        """Number of rows whose influences are computed together, a multiple of `read_rows`.

        Each time all placements on disk are scanned, so there are many, for up to a quarter of the memory.
        """
        return max(1, self.memory // 512 // self.read_rows) * self.read_rows


class SpooledRows:
    """Batches of a label's rows in the order in which they were added; may be read several times.

    They are in memory while the spool has room, and otherwise in one file. Their keys are not kept.
    """

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._batches: list[tuple[int, RowBatch, bool]] = []
        """(start, batch, True); or (start, a batch without rows, False): its columns are the next ones in the file."""
        self._held = 0
        self._file: IO[bytes] | None = None

    def add(self, start: int, batch: RowBatch) -> None:
        """Keep a batch; start: the number of its first row before any was left out, see `ReadRows`."""
        slices = [(names, codes.astype(np.min_scalar_type(-len(names) - 1))) for names, codes in batch.slices]
        columns = _columns(_replaced(batch, slices=slices))
        size = sum(column.nbytes for column in columns)
        if self._spool.held + size <= self._spool.memory // FRACTION_SPOOLED:
            self._spool.held += size
            self._held += size
            self._batches.append((start, _with_columns(batch, columns), True))
            return
        if self._file is None:
            self._file = tempfile.NamedTemporaryFile(dir=self._spool.folder)
        for column in columns:
            np.save(self._file, column, allow_pickle=False)
        self._spool.spilled += size
        self._batches.append((start, _with_columns(batch, [column[:0] for column in columns]), False))

    def __iter__(self) -> Iterator[tuple[int, RowBatch]]:
        """Yield (start, batch) as they were added."""
        if self._file is not None:
            self._file.seek(0)
        for start, batch, complete in self._batches:
            yield start, batch if complete else self._next_in_file(batch)

    def joined(self, size: int) -> Iterator[RowBatch]:
        """Yield the rows in larger batches, without slices: one begins where `size` divides a batch's start."""
        group: list[RowBatch] = []
        for start, batch in self:
            if start % size == 0 and group:
                yield _joined(group)
                group = []
            group.append(_replaced(batch, slices=[]))
        if group:
            yield _joined(group)

    def release(self) -> None:
        """Forget all rows, in memory and on disk."""
        self._spool.held -= self._held
        self._batches, self._held = [], 0
        if self._file is not None:
            self._file.close()
            self._file = None

    def _next_in_file(self, like: RowBatch) -> RowBatch:
        assert self._file is not None
        return _with_columns(like, [np.load(self._file, allow_pickle=False) for _ in _columns(like)])


def _columns(batch: RowBatch) -> list[NDArray[Any]]:
    """All arrays of a batch, but its keys."""
    columns = (batch.is_positive, batch.weights, batch.users, *batch.scores.values(), *batch.probabilities.values())
    return [column for column in columns if column is not None] + [codes for _, codes in batch.slices]


def _with_columns(like: RowBatch, columns: list[NDArray[Any]]) -> RowBatch:
    """The batch of which these are `_columns`."""
    left = iter(columns)
    return RowBatch(
        next(left),
        None if like.weights is None else next(left),
        users=None if like.users is None else next(left),
        scores={name: next(left) for name in like.scores},
        probabilities={name: next(left) for name in like.probabilities},
        slices=[(names, next(left)) for names, _ in like.slices],
        keys=np.empty(0, np.uint64),
    )


def _replaced(batch: RowBatch, slices: list[tuple[list[str], NDArray[Any]]]) -> RowBatch:
    columns = (batch.is_positive, batch.weights, batch.scores, batch.probabilities, batch.users, batch.keys)
    return RowBatch(*columns, slices)


def _joined(batches: list[RowBatch]) -> RowBatch:
    if len(batches) == 1:
        return batches[0]
    return _with_columns(batches[0], [np.concatenate(parts) for parts in zip(*map(_columns, batches), strict=True)])
