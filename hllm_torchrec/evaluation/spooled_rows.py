"""Rows of prediction files, stored for further passes, because the files are read only once."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from hllm_torchrec.evaluation.row_batch import RowBatch

FRACTION_SPOOLED = 8
"""The stored rows of all labels together use at most 1/8 of the memory; further rows are on disk."""


@dataclass
class Spool:
    """Limit of memory for the stored rows of all labels on this rank, and the folder for rows that do not fit."""

    memory: int
    """Bytes for rows, including those that are being sorted; stored rows use at most 1 / FRACTION_SPOOLED of it."""
    folder: Path
    held: int = 0
    spilled: int = 0
    """Bytes written to disk, including those written by sorting and by the grouping by user."""

    @property
    def read_rows(self) -> int:
        """Number of rows that are read together."""
        return max(64, min(1 << 20, self.memory // 1024))

    @property
    def influence_rows(self) -> int:
        """Number of rows whose influences are computed together, a multiple of `read_rows`.

        Each such computation scans all placements on disk, so the number is large: up to a quarter of the memory is
        used.
        """
        return max(1, self.memory // 512 // self.read_rows) * self.read_rows


class SpooledRows:
    """Batches of a label's rows in the order in which they were added; may be read several times.

    They are in memory until the limit of the spool is reached; further batches are in one file. Keys are not stored.
    """

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._batches: list[tuple[int, RowBatch, bool]] = []
        """(start, batch, True); or (start, a batch without rows, False): its columns are the next ones in the file."""
        self._held = 0
        self._file: IO[bytes] | None = None

    def add(self, start: int, batch: RowBatch) -> None:
        """Store a batch; start: number of its first row, counted before rows were left out; see `ReadRows`."""
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
        """Yield (start, batch) in the order in which they were added."""
        if self._file is not None:
            self._file.seek(0)
        for start, batch, complete in self._batches:
            yield start, batch if complete else self._next_in_file(batch)

    def joined(self, size: int) -> Iterator[RowBatch]:
        """Yield the rows in larger batches without slices; a new one begins at each start that is a multiple of
        `size`."""
        group: list[RowBatch] = []
        for start, batch in self:
            if start % size == 0 and group:
                yield _joined(group)
                group = []
            group.append(_replaced(batch, slices=[]))
        if group:
            yield _joined(group)

    def release(self) -> None:
        """Delete all rows, in memory and on disk."""
        self._spool.held -= self._held
        self._batches, self._held = [], 0
        if self._file is not None:
            self._file.close()
            self._file = None

    def _next_in_file(self, like: RowBatch) -> RowBatch:
        assert self._file is not None
        return _with_columns(like, [np.load(self._file, allow_pickle=False) for _ in _columns(like)])


def _columns(batch: RowBatch) -> list[NDArray[Any]]:
    """Return all arrays of a batch except its keys."""
    columns = (batch.is_positive, batch.weights, batch.users, *batch.scores.values(), *batch.probabilities.values())
    return [column for column in columns if column is not None] + [codes for _, codes in batch.slices]


def _with_columns(like: RowBatch, columns: list[NDArray[Any]]) -> RowBatch:
    """Build a batch from its `_columns`; like: a batch with the same columns."""
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
