"""Event files: users' complete sequences as memory-mapped columns, with random access by user and no decoding.

A file is an Arrow IPC file, uncompressed, with one record batch of one row per user, in ascending order of the user
ids: `user_id`, `valid_start` and `test_start` (the number of the user's events before each cut of the base's split;
always 0 in an append, where they have no meaning), and one list column for each column of the dataset's events
(`EventSchema.columns`). A missing label is NaN instead of null, so that all columns can be views of the file.

Legend: R rows (users), T events of all rows.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.data.events import EVENT_COLUMNS, Events
from hllm_torchrec.data.jagged_arrays import concat_ranges, offsets_from_lengths
from hllm_torchrec.data.validation import REMEDY, TableRows, check_values, error_location

STARTS = ("valid_start", "test_start")


def _file_schema(stored: Mapping[str, pa.DataType]) -> pa.Schema:
    """Schema of a file with event columns of these types."""
    heads = [pa.field("user_id", pa.int64()), *(pa.field(name, pa.int32()) for name in STARTS)]
    return pa.schema([*heads, *(pa.field(name, pa.list_(kind)) for name, kind in stored.items())])


@dataclass(frozen=True)
class EventFile:
    """An open event file; `events` are views of the mapped file.

    user_ids: [R] ascending; cuts: `valid_start` and `test_start` [R] int32, see the module docstring; offsets: [R + 1]
    int64, from 0; seconds: a lower and an upper bound of the events' seconds; None: unknown.
    """

    path: Path
    user_ids: Ints
    cuts: Sequence[NDArray[np.int32]]
    offsets: Ints
    events: Events
    seconds: Sequence[int] | None = None

    @classmethod
    def open(cls, path: Path, rows: TableRows, seconds: Sequence[int] | None = None) -> "EventFile":
        """Map a file, and check its users and offsets; cuts and events are checked when they are read.

        Raises:
            ValueError: the file is damaged or has another layout; the message names the file.
        """
        with error_location(path), pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
            names = [column.name for column in rows.schema.columns]
            schema = _file_schema({column.name: column.stored for column in rows.schema.columns})
            if not reader.schema.equals(schema) or reader.num_record_batches != 1:
                raise ValueError("it is not one batch of the columns of an event file")
            batch = reader.get_batch(0)
            batch.validate()  # the further checks of full=True are made below, for all columns together
            lists = [batch.column(name) for name in names]
            if any(column.null_count for column in batch.columns) or any(one.values.null_count for one in lists):
                raise ValueError("a value is null")
            offsets = lists[0].offsets.to_numpy()
            if any(not one.offsets.equals(lists[0].offsets) for one in lists[1:]) or offsets[0] != 0:
                raise ValueError("the list columns have different lengths per row")
        users = batch.column("user_id").to_numpy()
        cuts = [batch.column(name).to_numpy() for name in STARTS]
        values = [one.values.to_numpy() for one in lists]
        base = len(EVENT_COLUMNS)
        events = Events(*values[:base], extra=dict(zip(names[base:], values[base:], strict=True)))
        file = cls(path, users, cuts, offsets.astype(np.int64), events, seconds)
        problem = file._problem(rows)
        if problem is not None:
            raise ValueError(f"{path}: {problem}; {REMEDY}")
        return file

    def __len__(self) -> int:
        return self.user_ids.size

    @cached_property
    def lengths(self) -> Ints:
        """[R] number of events of each row, at least 1."""
        return np.diff(self.offsets)

    @cached_property
    def starts(self) -> Ints:
        """[R, 2] the cuts. Raises ValueError, which names the file, if a row does not satisfy the rule below."""
        valid, test = self.cuts
        if ((valid < 0) | (valid > test) | (test > self.lengths)).any():
            rule = "0 <= valid_start <= test_start <= number of events does not hold"
            raise ValueError(f"{self.path}: {rule}; {REMEDY}")
        return np.stack([valid, test], axis=1).astype(np.int64)

    def lengths_before(self, second: int) -> Ints:
        """[R] number of events of each row before a second."""
        first, last = self.seconds or (-math.inf, math.inf)
        if last < second:  # true for most files, since cuts are late: no event has to be read
            return self.lengths
        if first >= second:
            return np.zeros_like(self.lengths)
        return np.add.reduceat(self.events.timestamps < second, self.offsets[:-1], dtype=np.int64)

    def _problem(self, rows: TableRows) -> str | None:
        if self.user_ids.size and not 1 <= self.user_ids[0] <= self.user_ids[-1] < rows.users:
            return f"users have the ids 1..{rows.users - 1}"
        if (self.user_ids[1:] <= self.user_ids[:-1]).any():
            return "user_id must ascend"
        if (self.lengths <= 0).any() or self.offsets[-1] != len(self.events):
            return "each row must have at least one event"
        return None

    def rows_of(self, users: Ints) -> tuple[Ints, Ints]:
        """(indices in `users`, rows of the file) of the `users` that the file has, both ascending; `users` ascend."""
        first, last = np.searchsorted(self.user_ids, [users[0], users[-1] + 1])
        stored = self.user_ids[first:last]
        if stored.size < users.size:  # look up the smaller array in the larger one
            indices = np.searchsorted(users, stored)
            rows = np.flatnonzero(users[indices] == stored)
            return indices[rows], first + rows
        rows = np.minimum(np.searchsorted(stored, users), stored.size - 1)
        indices = np.flatnonzero(stored[rows] == users)
        return indices, first + rows[indices]

    def columns(self, where: slice | Ints, names: Iterable[str]) -> dict[str, NDArray[Any]]:
        """Columns of the events at `where` as they are stored, unchecked; views for a slice."""
        every = _by_name(self.events)
        if isinstance(where, slice):
            return {name: every[name][where] for name in names}
        return {name: every[name].take(where) for name in names}

    def check(self, rows: Ints, names: Iterable[str], table_rows: TableRows) -> None:
        """Raise ValueError with file, row, column and value for the first value of `rows` [k] that is not allowed."""
        first = int(rows[0]) if rows.size else 0
        place = f"{self.path}, from row {first} on" if first else str(self.path)
        lengths = self.lengths[rows]
        check_columns(place, self.columns(concat_ranges(self.offsets[rows], lengths), names), lengths, table_rows)


def check_columns(place: str, columns: Mapping[str, NDArray[Any]], lengths: Ints, rows: TableRows) -> None:
    """Raise ValueError for a value that is not allowed in sequences of `lengths` events (see `read_sequences`)."""
    ends = np.cumsum(lengths)
    for name, values in columns.items():
        if name == "labels":  # NaN: no label
            values = np.where(np.isnan(values), np.float32(0), values)
        check_values(place, name, values, ends, rows)


def _by_name(events: Events) -> dict[str, NDArray[Any]]:
    """Name -> values of all columns of events, including the declared ones."""
    return {column.name: getattr(events, column.name) for column in EVENT_COLUMNS} | events.extra


def write_event_file(path: Path, user_ids: Ints, lengths: Ints, events: Events, starts: Ints | None = None) -> None:
    """Write the sequences of `user_ids` [R], which may be in any order; `events` [T] are grouped in the same order.

    starts: [R, 2]; None: zeros, as in an append.
    """
    starts = np.zeros((user_ids.size, 2), np.int64) if starts is None else starts
    if (np.diff(user_ids) < 0).any():
        order = np.argsort(user_ids)
        events = events[concat_ranges((np.cumsum(lengths) - lengths)[order], lengths[order])]
        user_ids, lengths, starts = user_ids[order], lengths[order], starts[order]
    offsets = offsets_from_lengths(lengths)
    if offsets[-1] >= 2**31:
        raise ValueError(f"{path}: {offsets[-1]:,} events are too many for one file; prepare with more partitions")
    limits = pa.array(offsets, pa.int32())
    columns = [pa.array(user_ids, pa.int64()), *(pa.array(column, pa.int32()) for column in starts.T)]
    stored = {column.name: column.stored for column in EVENT_COLUMNS}
    stored |= {name: pa.float32() if values.dtype.kind == "f" else pa.int32() for name, values in events.extra.items()}
    for name, values in _by_name(events).items():
        columns.append(pa.ListArray.from_arrays(limits, pa.array(np.ascontiguousarray(values), stored[name])))
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = _file_schema(stored)
    with pa.ipc.new_file(str(path), schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))
