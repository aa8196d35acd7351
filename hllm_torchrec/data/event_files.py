"""Event files: users' complete sequences as memory-mapped columns, from which any users are read without decoding.

A file is an Arrow IPC file, uncompressed, with one record batch of one row per user, in ascending order of the user
ids: `user_id`, `valid_start` and `test_start` (the user's events before the cuts of the base's split; in an append,
where they have no meaning, 0), and a list column of each column of the dataset's events (`EventSchema.columns`). Labels
have NaN for null, so that all columns are views of the file.

Legend: R rows (users), T events of all rows.
"""

from collections.abc import Iterable, Mapping
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

    user_ids: [R] ascending; starts: [R, 2], see the module docstring; offsets: [R + 1] int64, from 0.
    """

    path: Path
    user_ids: Ints
    starts: Ints
    offsets: Ints
    events: Events

    @classmethod
    def open(cls, path: Path, rows: TableRows) -> "EventFile":
        """Map a file, and check its users and offsets; events are checked when they are read.

        Raises:
            ValueError: the file is damaged or has another layout; names it.
        """
        with error_location(path), pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
            names = [column.name for column in rows.schema.columns]
            schema = _file_schema({column.name: column.stored for column in rows.schema.columns})
            if not reader.schema.equals(schema) or reader.num_record_batches != 1:
                raise ValueError("it is not one batch of the columns of an event file")
            batch = reader.get_batch(0)
            batch.validate(full=True)
            lists = [batch.column(name) for name in names]
            if any(column.null_count for column in batch.columns) or any(one.values.null_count for one in lists):
                raise ValueError("a value is null")
            offsets = lists[0].offsets.to_numpy()
            if any(not np.array_equal(one.offsets.to_numpy(), offsets) for one in lists[1:]) or offsets[0] != 0:
                raise ValueError("the list columns have different lengths per row")
        users = batch.column("user_id").to_numpy()
        starts = np.stack([batch.column(name).to_numpy() for name in STARTS], axis=1).astype(np.int64)
        values = [one.values.to_numpy() for one in lists]
        base = len(EVENT_COLUMNS)
        events = Events(*values[:base], extra=dict(zip(names[base:], values[base:], strict=True)))
        file = cls(path, users, starts, offsets.astype(np.int64), events)
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

    def _problem(self, rows: TableRows) -> str | None:
        if self.user_ids.size and not 1 <= self.user_ids[0] <= self.user_ids[-1] < rows.users:
            return f"users have the ids 1..{rows.users - 1}"
        if (np.diff(self.user_ids) <= 0).any():
            return "user_id must ascend"
        if (self.lengths <= 0).any() or self.offsets[-1] != len(self.events):
            return "each row must have at least one event"
        valid, test = self.starts.T
        if ((valid < 0) | (valid > test) | (test > self.lengths)).any():
            return "0 <= valid_start <= test_start <= number of events does not hold"
        return None

    def read(self, rows: Ints, table_rows: TableRows) -> Events:
        """The events of `rows` [k], one row after the other, as arrays of the columns' dtypes.

        Raises:
            ValueError: a value is not allowed; names file, row, column and value.
        """
        events = self.rows(rows)
        first = int(rows[0]) if rows.size else 0
        place = f"{self.path}, from row {first} on" if first else str(self.path)
        check_events(place, events, self.lengths[rows], table_rows)
        return events.as_arrays()

    def rows(self, rows: Ints) -> Events:
        """The events of `rows` [k] as they are stored, unchecked; views of the file if the rows follow each other."""
        if rows.size and rows[-1] - rows[0] == rows.size - 1 and (rows[1:] > rows[:-1]).all():
            return self.events[int(self.offsets[rows[0]]) : int(self.offsets[rows[-1] + 1])]
        return self.events[concat_ranges(self.offsets[rows], self.lengths[rows])]


def check_events(place: str, events: Events, lengths: Ints, rows: TableRows) -> None:
    """Raise ValueError for a value that is not allowed in sequences of `lengths` events (see `read_sequences`)."""
    ends = np.cumsum(lengths)
    for name, values in _by_name(events).items():
        if name == "labels":  # NaN: no label
            values = np.where(np.isnan(values), np.float32(0), values)
        check_values(place, name, values, ends, rows)


def _by_name(events: Events) -> dict[str, NDArray[Any]]:
    """All columns of events, the extra ones among them."""
    return {column.name: getattr(events, column.name) for column in EVENT_COLUMNS} | events.extra


def write_event_file(path: Path, user_ids: Ints, lengths: Ints, events: Events, starts: Ints | None = None) -> None:
    """Write the sequences of `user_ids` [R], in any order, whose `events` [T] follow each other.

    starts: [R, 2]; None: an append's.
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


def stable_order(owner: Ints, timestamps: Ints) -> Ints:
    """Order of events by (owner, second), both below 2^32; ties keep their order.

    The input is a few sorted runs, one a file, which a stable sort of one key merges in nearly linear time.
    """
    return np.argsort((owner << 32) | timestamps, kind="stable")


def consolidate(files: Iterable[EventFile], rows: TableRows) -> EventFile:
    """The events of several files as one in memory: by user, in the order of (second, file, row)."""
    kept = list(files)
    read = [file.read(np.arange(len(file)), rows) for file in kept]
    events = Events.concat([Events.at([]), *read])
    user = np.concatenate([np.zeros(0, np.int64), *(np.repeat(file.user_ids, file.lengths) for file in kept)])
    order = stable_order(user, events.timestamps)
    user = user[order]
    first = np.flatnonzero(np.diff(user, prepend=-1))
    users, counts = user[first], np.diff(first, append=user.size)
    path = kept[0].path if kept else Path()
    return EventFile(path, users, np.zeros((users.size, 2), np.int64), offsets_from_lengths(counts), events[order])
