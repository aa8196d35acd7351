"""Events and users' sequences of events as columns; `Events` is the single definition of an event's columns.

A further column (for example the device of a request) is added as a field of `Events`, with a value from each source:
preparation writes it, and loader, embedding jobs, scorer and baselines pass it on. The batch spec and the collator
define its use by a model. Datasets prepared before lack the column and are refused: they must be prepared again.

Legend: n events of one user, T events of R users one after the other.
"""

from collections.abc import Iterable, Sequence
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
    """Events of one user, or of several users one after the other, sorted by time within a user.

    All columns are [n]. A field's metadata becomes its entry of `EVENT_COLUMNS`.
    """

    item_ids: Ints = _column("item", pa.int64(), np.int64, 0)
    """0: an unknown item."""
    timestamps: Ints = _column("timestamp", pa.int64(), np.int64, 0)
    """Seconds UTC."""
    labels: Floats = _column("label", pa.float32(), np.float32, np.nan)
    """In [0, 1]; NaN if the event is not an exposure."""
    actions: Ints = _column("action", pa.int32(), np.int64, 0)
    """0: unknown."""

    def __len__(self) -> int:
        return int(self.timestamps.size)

    @property
    def columns(self) -> dict[str, Any]:
        """The columns by name."""
        return {name: getattr(self, name) for name in _NAMES}

    def __getitem__(self, chosen: slice | NDArray[Any]) -> "Events":
        """The events of a slice (as views), or at indices or a mask (as copies)."""
        return Events(*[getattr(self, name)[chosen] for name in _NAMES])

    @classmethod
    def at(cls, timestamps: ArrayLike, **known: ArrayLike) -> "Events":
        """Events at the given seconds; columns that are not given hold their unknown value."""
        times = np.asarray(timestamps, np.int64)
        values: dict[str, Any] = {column.name: np.full(times.size, column.unknown) for column in EVENT_COLUMNS}
        return Events(**(values | known | {"timestamps": times})).as_arrays()

    def as_arrays(self) -> "Events":
        """A copy with columns, which may be any sequences of numbers, as arrays of the columns' dtypes."""
        return Events(*(np.asarray(getattr(self, column.name), column.dtype) for column in EVENT_COLUMNS))

    @classmethod
    def concat(cls, parts: Iterable["Events"]) -> "Events":
        """Concatenate the events of all parts (at least one)."""
        kept = list(parts)
        return Events(*[np.concatenate([getattr(part, name) for part in kept]) for name in _NAMES])


@dataclass(frozen=True)
class EventColumn:
    """Description of an event column.

    name: its name in `Events` and, as lists, in sequence files; single: its name in the tables that preparation
    sorts, with one row per event; stored: Arrow type in files; dtype: numpy dtype in memory; unknown: the value that
    represents an unknown one.
    """

    name: str
    single: str
    stored: pa.DataType
    dtype: type[np.generic]
    unknown: float


EVENT_COLUMNS = tuple(EventColumn(column.name, **column.metadata) for column in fields(Events))
_NAMES = tuple(column.name for column in EVENT_COLUMNS)

SEQUENCE_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.int64()),
        pa.field("target_start", pa.int32()),
        *(pa.field(column.name, pa.list_(column.stored)) for column in EVENT_COLUMNS),
    ]
)
"""Schema of sequence files: a row holds a user's complete history up to the end of the part."""


@dataclass(frozen=True)
class Piece(Events):
    """A contiguous range of one user's events; `first_target` is the index in it of the first possible exposure.

    offset: index of the range's first event in the user's complete sequence; complete: that sequence, up to the end of
    the part; None: the range itself; requests: further requests, at seconds and for items that need not be events.
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
        """The range [start, end) of this piece, with exposures from `first_target` on; all are indices into it."""
        first = first_target - start
        return replace(self, offset=self.offset + start, first_target=first, **self[start:end].columns)


@dataclass(frozen=True)
class Sequences(Events):
    """Rows of a part's sequences: each user's complete history up to the part's end. The event columns are [T].

    user_ids: int64 [R]; target_start: int64 [R], index in the row of the first event that belongs to the part;
    offsets: int64 [R + 1], boundaries of the rows in the events, from 0.
    """

    user_ids: Ints = field(kw_only=True)
    target_start: Ints = field(kw_only=True)
    offsets: Ints = field(kw_only=True)

    @property
    def lengths(self) -> Ints:
        """[R] number of events of each row."""
        return np.diff(self.offsets)

    def events_before(self, second: int) -> Ints:
        """[R] number of events of each row before a second UTC."""
        before = np.concatenate([[0], np.cumsum(self.timestamps < second)])
        return before[self.offsets[1:]] - before[self.offsets[:-1]]

    @property
    def own_events(self) -> Ints:
        """Indices of the events that belong to the part itself, without the history before."""
        return concat_ranges(self.offsets[:-1] + self.target_start, self.lengths - self.target_start)

    def piece(self, row: int) -> Piece:
        """A row as one piece with the user's complete sequence."""
        return self.cut(row, 0, int(self.offsets[row + 1] - self.offsets[row]), int(self.target_start[row]))

    def cut(self, row: int, start: int, end: int, first_target: int) -> Piece:
        """The range [start, end) of a row, with exposures from `first_target` on; all three count from its start."""
        first = int(self.offsets[row])
        inside = slice(first + start, first + end)
        columns = [getattr(self, name)[inside] for name in _NAMES]
        whole = Events(*[getattr(self, name)[first : int(self.offsets[row + 1])] for name in _NAMES])
        target = first_target - start
        return Piece(*columns, user_id=int(self.user_ids[row]), offset=start, first_target=target, complete=whole)

    def pieces(self) -> Iterable[Piece]:
        """Iterate over all rows as pieces."""
        return (self.piece(row) for row in range(self.user_ids.size))


def decode_sequences(tables: Sequence[pa.Table]) -> Sequences:
    """Concatenate and decode tables of SEQUENCE_SCHEMA, or of equal subsets of its columns; no tables: no rows.

    Missing columns hold their unknown value and take no memory; at least one event column must be present.
    """
    table = pa.concat_tables(tables or [SEQUENCE_SCHEMA.empty_table()]).combine_chunks()
    first = next(name for name in _NAMES if name in table.column_names)
    # All list columns of a row have equal lengths (`validation._check_lists`), so any of them gives the offsets.
    offsets = offsets_from_lengths(pc.list_value_length(table[first]).to_numpy())
    columns = {
        column.name: pc.list_flatten(table[column.name]).to_numpy().astype(column.dtype, copy=False)  # null: NaN
        if column.name in table.column_names
        else np.broadcast_to(np.array(column.unknown, column.dtype), offsets[-1])  # stride 0: one value in memory
        for column in EVENT_COLUMNS
    }
    user_ids, target_start = (
        table[name].to_numpy().astype(np.int64, copy=False)
        if name in table.column_names
        else np.broadcast_to(np.int64(0), len(table))
        for name in ("user_id", "target_start")
    )
    return Sequences(**columns, user_ids=user_ids, target_start=target_start, offsets=offsets)
