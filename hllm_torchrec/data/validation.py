"""Reading of a dataset's Parquet files with validation; errors name file, row group, row and field.

`prepare` writes only valid files, but files can be damaged, or written by other programs. Without validation, an id
outside of its table or a time in milliseconds would cause an index error in a kernel, or no error at all.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hllm_torchrec.common.machine_errors import is_machine_error, path_in_errors
from hllm_torchrec.data.bad_rows import MAX_SECOND, describe_time
from hllm_torchrec.data.event_schema import EventSchema
from hllm_torchrec.data.events import sequence_schema

REMEDY = "prepare the dataset again"


@dataclass(frozen=True)
class TableRows:
    """Number of rows of the tables that ids index, the unknown id 0 included, and the declared event columns."""

    items: int
    users: int
    actions: int
    schema: EventSchema = field(default_factory=EventSchema)


@contextmanager
def error_location(location: object, remedy: str = REMEDY) -> Iterator[None]:
    """Context manager that converts errors of Arrow and numpy into a ValueError with `location` and `remedy`.

    The block must only read files, so that the file or the machine causes every failure in it. An error of the machine
    (too little memory, too many open files) is not reported as damage: an OSError only gets `location` added. A
    ValueError whose message already has `location` is raised unchanged.
    """
    try:
        with path_in_errors(str(location)):
            yield
    except Exception as error:  # decoders of damaged bytes raise almost anything
        if is_machine_error(error) or (type(error) is ValueError and str(location) in str(error)):
            raise
        raise ValueError(f"{location} cannot be read ({_reason(error)}); {remedy}") from error


def _reason(error: BaseException) -> str:
    """The first line of an error, at most 200 characters."""
    lines = str(error).strip().splitlines()
    kind = "" if type(error) in (ValueError, OSError) else f"{type(error).__name__}: "
    return f"{kind}{lines[0][:200]}" if lines else type(error).__name__


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet file, or only `columns`.

    Raises:
        ValueError: the file does not exist, is damaged, or does not have a column.
    """
    with error_location(path):
        with pq.ParquetFile(path, memory_map=True) as file:
            _require_columns(columns or (), file.schema_arrow.names)
            table = file.read(columns=None if columns is None else list(columns))
        # Strings are read by offsets, which, if they are damaged, could point outside of the buffer.
        table.validate(full=True)
        return table if columns is None else table.select(list(columns))


def _require_columns(wanted: Sequence[str], present: Sequence[str]) -> None:
    """Raise ValueError for missing columns."""
    missing = [name for name in wanted if name not in present]
    if missing:
        raise ValueError(f"no column {', '.join(missing)}; it has {', '.join(present) or 'none'}")


def read_sequences(path: Path, index: int, columns: Sequence[str] | None, rows: TableRows) -> pa.Table:
    """Read and check `columns` (None: all) of one row group of sequences, in the types of `sequence_schema`.

    Raises:
        ValueError: the file is damaged or has a wrong layout, or a value is not allowed: an id outside its table, a
            time outside 1970..2099 or before the previous time, a label that its kind does not allow.
    """
    place, schema = f"{path}, row group {index}", sequence_schema(rows.schema.columns)
    wanted = list(columns or schema.names)
    with error_location(place):
        with pq.ParquetFile(path) as file:
            _require_columns(wanted, file.schema_arrow.names)
            table = file.read_row_group(index, columns=wanted, use_threads=False)
        table.validate(full=True)
    for name in wanted:
        found, due = table.schema.field(name).type, schema.field(name).type
        if not _is_same(found, due):
            raise ValueError(f"{place}: column {name} is {found}, it must be {due}; {REMEDY}")
    _check_heads(place, table, rows)
    _check_lists(place, table, rows)
    return table


def _is_same(found: pa.DataType, due: pa.DataType) -> bool:
    """True if two types are equal, ignoring the name of a list's element field."""
    if pa.types.is_list(due):
        return bool(pa.types.is_list(found) and found.value_type == due.value_type)
    return bool(found == due)


def _check_heads(place: str, table: pa.Table, rows: TableRows) -> None:
    for name, limit in (("user_id", rows.users), ("target_start", 2**31)):
        if name in table.column_names:
            column = table[name]
            if column.null_count:
                row = int(np.flatnonzero(column.is_null().to_numpy())[0])
                raise ValueError(f"{place}, row {row}: {name} is null; {REMEDY}")
            values = column.to_numpy()
            _refuse(place, name, (values < 0) | (values >= limit), values, None, f"it must lie in 0..{limit - 1}")


def _check_lists(place: str, table: pa.Table, rows: TableRows) -> None:
    names = [column.name for column in rows.schema.columns if column.name in table.column_names]
    lengths: NDArray[np.int64] | None = None
    for name in names:
        if table[name].null_count:
            row = int(np.flatnonzero(table[name].is_null().to_numpy())[0])
            raise ValueError(f"{place}, row {row}: {name} is null; {REMEDY}")
        own = pc.list_value_length(table[name]).to_numpy().astype(np.int64)
        if lengths is None:
            lengths = own
        elif (own != lengths).any():
            row = int(np.flatnonzero(own != lengths)[0])
            problem = f"{name} has {own[row]} events, {names[0]} has {lengths[row]}"
            raise ValueError(f"{place}, row {row}: {problem}; {REMEDY}")
        _check_values(place, name, pc.list_flatten(table[name]), own, rows)
    if lengths is not None and "target_start" in table.column_names:
        starts = table["target_start"].to_numpy()
        _refuse(place, "target_start", starts > lengths, starts, None, "it is beyond the row's events")


def _check_values(place: str, name: str, flat: pa.ChunkedArray, lengths: NDArray[np.int64], rows: TableRows) -> None:
    """Check the concatenated elements of one list column; lengths: [n] elements of each row."""
    ends = np.cumsum(lengths)
    if pa.types.is_floating(flat.type) and name != "labels":
        check_values(place, name, flat.to_numpy(), ends, rows)  # null: NaN
        return
    if name != "labels" and flat.null_count:
        _refuse(place, name, flat.is_null().to_numpy(), np.full(len(flat), np.nan), ends, "it must not be null")
    check_values(place, name, (flat.fill_null(0) if name == "labels" else flat).to_numpy(), ends, rows)


def check_values(place: str, name: str, values: NDArray[Any], ends: NDArray[np.int64], rows: TableRows) -> None:
    """Check the concatenated elements of one event column; ends: [n] end of each row's elements.

    Raises:
        ValueError: a value is not allowed; see `read_sequences`. The caller replaces absent labels by 0.
    """
    if name == "labels":
        rule = "a label is 0 or 1, or null where the event is not an exposure"
        _refuse(place, name, (values != 0) & (values != 1), values, ends, rule)
        return
    if name in (column.name for column in rows.schema.extra):
        bad, rule = rows.schema.broken_rule(name, values)
        _refuse(place, name, bad, values, ends, rule)
        return
    if name == "timestamps":
        bad = (values < 0) | (values > MAX_SECOND)
        if bad.any():
            value = int(values[bad.argmax()])
            _refuse(place, name, bad, values, ends, describe_time(str(value), value))
        # Times ascend only within a row: compare all neighbours, then clear the first event of each row. A row that
        # starts at the end of the values is empty and has no first event.
        earlier = np.zeros(values.size, bool)
        earlier[1:] = np.diff(values) < 0
        earlier[ends[:-1][ends[:-1] < values.size]] = False
        _refuse(place, name, earlier, values, ends, "it is earlier than the one before it; events must be sorted")
        return
    limit = {"item_ids": rows.items, "actions": rows.actions}.get(name, 2**31)
    rule = f"the dataset's {'items' if name == 'item_ids' else name} have the ids 0..{limit - 1}"
    _refuse(place, name, (values < 0) | (values >= limit), values, ends, rule)


def _refuse(
    place: str,
    name: str,
    bad: NDArray[np.bool_],
    values: NDArray[np.generic],
    ends: NDArray[np.int64] | None,
    rule: str,
) -> None:
    """Raise ValueError for the first value that is `bad`; ends: end of each row's elements (None: one per row)."""
    if not bad.any():
        return
    at = int(bad.argmax())
    # side="right", because an element at the end index of a row belongs to the next row that is not empty.
    row = at if ends is None else int(np.searchsorted(ends, at, side="right"))
    inside = "" if ends is None else f"[{at - (int(ends[row - 1]) if row else 0)}]"
    raise ValueError(f"{place}, row {row}: {name}{inside} is {values[at]}; {rule}; {REMEDY}")
