"""Events and users' sequences of events as columns; `Events` is the single definition of the columns of every event.

Columns that a source declares (further labels, weights, context: `data.event_schema`) are in `extra`, by name, from
preparation to scoring.

Legend: n events of one user, T events of R users, concatenated; X exposures.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray

from hllm_torchrec.common.arrays import Floats, Ints
from hllm_torchrec.data.jagged_arrays import concat_ranges, offsets_from_lengths


def _column(single: str, stored: pa.DataType, dtype: type[np.generic], unknown: float) -> Any:
    return field(metadata={"single": single, "stored": stored, "dtype": dtype, "unknown": unknown})


@dataclass(frozen=True)
class Events:
    """Events of one user, or the concatenated events of several users, sorted by time within a user.

    All columns are [n]. A field's metadata becomes its entry of `EVENT_COLUMNS`. extra: declared columns by name,
    float32 (NaN: unknown) or int64 (0: unknown); empty if the dataset has none or they were not read.
    """

    item_ids: Ints = _column("item", pa.int64(), np.int64, 0)
    """0: an unknown item."""
    timestamps: Ints = _column("timestamp", pa.int64(), np.int64, 0)
    """Seconds UTC."""
    labels: Floats = _column("label", pa.float32(), np.float32, np.nan)
    """0 or 1; NaN if the event is not an exposure."""
    actions: Ints = _column("action", pa.int32(), np.int64, 0)
    """0: unknown."""
    extra: dict[str, NDArray[Any]] = field(default_factory=dict, kw_only=True, repr=False)

    def __len__(self) -> int:
        return int(self.timestamps.size)

    @property
    def columns(self) -> dict[str, Any]:
        """The constructor's arguments: the columns by name, and `extra` if it is not empty."""
        return {name: getattr(self, name) for name in _NAMES} | ({"extra": self.extra} if self.extra else {})

    def __getitem__(self, chosen: slice | NDArray[Any]) -> "Events":
        """The events of a slice (as views), or at indices or a mask (as copies)."""
        extra = {name: values[chosen] for name, values in self.extra.items()}
        return Events(*[getattr(self, name)[chosen] for name in _NAMES], extra=extra)

    @classmethod
    def of_columns(cls, columns: Mapping[str, ArrayLike]) -> "Events":
        """Build events from all columns by name (declared ones go to `extra`), converted to the columns' dtypes."""
        extra = {name: np.asarray(values) for name, values in columns.items() if name not in _NAMES}
        return Events(*(columns[name] for name in _NAMES), extra=extra).as_arrays()  # type: ignore[arg-type]

    @classmethod
    def at(cls, timestamps: ArrayLike, **known: Any) -> "Events":
        """Events at the given seconds; columns that are not given hold their unknown value."""
        times = np.asarray(timestamps, np.int64)
        values: dict[str, Any] = {column.name: np.full(times.size, column.unknown) for column in EVENT_COLUMNS}
        return Events(**(values | known | {"timestamps": times})).as_arrays()

    def column(self, column: "EventColumn") -> NDArray[Any]:
        """A column of `extra`; filled with its unknown value if it was not read."""
        return self.extra.get(column.name, _unknown(np.dtype(column.dtype), len(self)))

    def as_arrays(self) -> "Events":
        """Convert the columns, which may be any sequences of numbers, to arrays of the columns' dtypes."""
        extra = {name: np.asarray(values) for name, values in self.extra.items()}
        extra = {name: values.astype(_extra_dtype(values.dtype), copy=False) for name, values in extra.items()}
        return Events(*(np.asarray(getattr(self, column.name), column.dtype) for column in EVENT_COLUMNS), extra=extra)

    @classmethod
    def concat(cls, parts: Iterable["Events"]) -> "Events":
        """Concatenate all parts (at least one); an extra column that a part lacks gets its unknown value there."""
        kept = list(parts)
        unknown = {name: values[:0] for part in kept for name, values in part.extra.items()}
        extra = {
            name: np.concatenate([part.extra.get(name, _unknown(empty.dtype, len(part))) for part in kept])
            for name, empty in unknown.items()
        }
        return Events(*[np.concatenate([getattr(part, name) for part in kept]) for name in _NAMES], extra=extra)


@dataclass(frozen=True)
class EventColumn:
    """Description of an event column.

    name: name in `Events` and, as a list column, in sequence files; single: name in the tables of preparation, which
    have one row per event; stored: Arrow type in files; dtype: numpy dtype in memory; unknown: the value that stands
    for "unknown".
    """

    name: str
    single: str
    stored: pa.DataType
    dtype: type[np.generic]
    unknown: float


EVENT_COLUMNS = tuple(EventColumn(column.name, **column.metadata) for column in fields(Events) if column.metadata)
_NAMES = tuple(column.name for column in EVENT_COLUMNS)
_HEADS = (pa.field("user_id", pa.int64()), pa.field("target_start", pa.int32()))


def sequence_schema(columns: Iterable[EventColumn]) -> pa.Schema:
    """Schema of sequence files of these event columns: a row holds a user's complete history up to the part's end."""
    return pa.schema([*_HEADS, *(pa.field(column.name, pa.list_(column.stored)) for column in columns)])


SEQUENCE_SCHEMA = sequence_schema(EVENT_COLUMNS)
"""Schema of the sequence files of a dataset without declared columns."""


def _extra_dtype(given: np.dtype[Any]) -> type[np.generic]:
    return np.float32 if given.kind == "f" else np.int64


def _unknown(dtype: np.dtype[Any], size: int) -> NDArray[Any]:
    """[size] the unknown value of an extra column; stride 0: one value in memory."""
    return np.broadcast_to(np.array(np.nan if dtype.kind == "f" else 0, dtype), size)


@dataclass(frozen=True)
class Piece(Events):
    """A contiguous range of one user's events.

    first_target: index in the range of the first possible exposure; offset: index of the range's first event in the
    user's complete sequence; complete: the user's sequence to the end of the part or later; None: the range itself;
    requests: additional requests, whose seconds and items need not belong to an event.
    """

    user_id: int = field(kw_only=True)
    offset: int = field(kw_only=True, default=0)
    first_target: int = field(kw_only=True)
    complete: Events | None = field(kw_only=True, default=None, repr=False)
    requests: Events | None = field(kw_only=True, default=None, repr=False)

    @property
    def exposures(self) -> Ints:
        """[X] indices of the events to predict: the labelled events from `first_target` on."""
        return self.first_target + np.flatnonzero(~np.isnan(self.labels[self.first_target :]))

    def cut(self, start: int, end: int, first_target: int) -> Self:
        """The range [start, end) of this piece, with exposures from `first_target` on; all three index this piece."""
        first = first_target - start
        return replace(self, offset=self.offset + start, first_target=first, **self[start:end].columns)


@dataclass(frozen=True)
class RowHeads:
    """Facts of the rows of a part's sequences: users, number of events, index of the part's first event, and number of
    events before a second, all int64 [R]."""

    user_ids: Ints
    lengths: Ints
    target_start: Ints
    before: Ints


@dataclass(frozen=True)
class Sequences(Events):
    """Rows of a part's sequences: each user's complete history up to the part's end. The event columns are [T].

    user_ids: int64 [R]; target_start: int64 [R], index in the user's sequence of the first event that belongs to the
    part; offsets: int64 [R + 1], boundaries of the rows in the events, from 0; skipped: int64 [R], number of events at
    the start of each user's sequence that were not read; None: rows are complete.
    """

    user_ids: Ints = field(kw_only=True)
    target_start: Ints = field(kw_only=True)
    offsets: Ints = field(kw_only=True)
    skipped: Ints | None = field(kw_only=True, default=None)

    @property
    def lengths(self) -> Ints:
        """[R] number of events of each row."""
        return np.diff(self.offsets)

    def events_before(self, second: int) -> Ints:
        """[R] number of events of each row before a second UTC."""
        before = np.concatenate([[0], np.cumsum(self.timestamps < second)])
        return before[self.offsets[1:]] - before[self.offsets[:-1]]

    def between(self, first: int, last: int) -> "Sequences":
        """The rows `first` to `last` - 1, as views; the rows must be complete."""
        assert self.skipped is None
        if first == 0 and last == self.user_ids.size:
            return self
        start, end = self.offsets[first], self.offsets[last]
        return Sequences(
            **self[start:end].columns,
            user_ids=self.user_ids[first:last],
            target_start=self.target_start[first:last],
            offsets=self.offsets[first : last + 1] - start,
        )

    @property
    def own_events(self) -> Ints:
        """Indices of the events that belong to the part, without the history before it; the rows must be complete."""
        assert self.skipped is None
        return concat_ranges(self.offsets[:-1] + self.target_start, self.lengths - self.target_start)

    def piece(self, row: int) -> Piece:
        """A row as one piece that contains the user's complete sequence."""
        return self.cut(row, 0, int(self.offsets[row + 1] - self.offsets[row]), int(self.target_start[row]))

    def cut(self, row: int, start: int, end: int, first_target: int) -> Piece:
        """The range [start, end) of a user's sequence, with exposures from `first_target` on.

        All three are indices in the user's complete sequence; the row must contain the range.
        """
        skipped = 0 if self.skipped is None else int(self.skipped[row])
        assert skipped <= start, "events that were not read"
        first = int(self.offsets[row]) - skipped
        part = self[first + start : first + end]
        complete = self[first : int(self.offsets[row + 1])] if self.skipped is None else None
        target, user = first_target - start, int(self.user_ids[row])
        return Piece(**part.columns, user_id=user, offset=start, first_target=target, complete=complete)

    def pieces(self) -> Iterable[Piece]:
        """Iterate over all rows as pieces."""
        return (self.piece(row) for row in range(self.user_ids.size))


def decode_sequences(tables: Sequence[pa.Table]) -> Sequences:
    """Concatenate and decode tables of `sequence_schema`, or of equal subsets of its columns; no tables: no rows.

    Missing columns are filled with their unknown value, which takes no memory; missing extra columns are left out. At
    least one event column must be present.
    """
    table = pa.concat_tables(tables or [SEQUENCE_SCHEMA.empty_table()]).combine_chunks()
    heads = [field.name for field in _HEADS]
    extra_names = [name for name in table.column_names if name not in (*_NAMES, *heads)]
    first = next(name for name in (*_NAMES, *extra_names) if name in table.column_names)
    # All list columns of a row have equal lengths (`validation._check_lists`), so any of them gives the offsets.
    offsets = offsets_from_lengths(pc.list_value_length(table[first]).to_numpy())
    columns = {
        column.name: pc.list_flatten(table[column.name]).to_numpy().astype(column.dtype, copy=False)  # null: NaN
        if column.name in table.column_names
        else np.broadcast_to(np.array(column.unknown, column.dtype), offsets[-1])  # stride 0: one value in memory
        for column in EVENT_COLUMNS
    }
    flat = {name: pc.list_flatten(table[name]).to_numpy() for name in extra_names}
    extra = {name: values.astype(_extra_dtype(values.dtype), copy=False) for name, values in flat.items()}
    user_ids, target_start = (
        table[name].to_numpy().astype(np.int64, copy=False)
        if name in table.column_names
        else np.broadcast_to(np.int64(0), len(table))
        for name in heads
    )
    return Sequences(**columns, extra=extra, user_ids=user_ids, target_start=target_start, offsets=offsets)
