"""Source for any CSV or Parquet files, described by a column mapping in YAML:

    name: my_shop
    events:
      path: events-*.parquet        # a file or a pattern, relative to the YAML file; .csv, .tsv or .parquet
      user: customer
      item: sku
      time: happened_at             # left out: the row order is used as time
      time_unit: seconds            # milliseconds, microseconds, iso8601
      label: rating                 # left out: every event has label 1
      positive_from: 4              # label = value >= 4; left out: the value itself is the label
      action: kind                  # left out: every event has action 1, "event"
      actions: [click, skip, buy]   # the values of the action column; ids from 1 in this order
    items:
      path: items.csv
      item: sku
      text: [title, brand]
      features: {category: "|"}     # column: separator of several values, or null
      created_at: listed_at         # optional, in the unit of `time_unit` below
    users:                          # optional
      path: users.csv
      user: customer
      features: {country: null}
    keep_items_without_events: true
    min_events: 0

An event whose label is null (Parquet) or an empty cell (CSV) is not an exposure: it is history only.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hllm_torchrec.common.yaml_files import abbreviate, read_yaml
from hllm_torchrec.data.manifest_schema import is_inside
from hllm_torchrec.data.sources.base import (
    Chunk,
    Source,
    as_id_strings,
    event_table,
    parse_float,
    parse_seconds,
    require_time_unit,
)
from hllm_torchrec.data.sources.columnar import read_columns
from hllm_torchrec.data.validation import error_location

_CONVERT = "convert the column, or correct the mapping"


@dataclass(frozen=True)
class EventColumns:
    """The `events` part of the mapping."""

    path: str
    user: str
    item: str
    time: str | None = None
    time_unit: str = "seconds"
    label: str | None = None
    positive_from: float | None = None
    action: str | None = None
    actions: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ItemColumns:
    """The `items` part of the mapping."""

    path: str
    item: str
    text: list[str]
    features: dict[str, str | None] = field(default_factory=dict)
    created_at: str | None = None
    time_unit: str = "seconds"


@dataclass(frozen=True)
class UserColumns:
    """The `users` part of the mapping."""

    path: str
    user: str
    features: dict[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class TableMapping:
    """The complete mapping."""

    name: str
    events: EventColumns
    items: ItemColumns
    users: UserColumns | None = None
    keep_items_without_events: bool = True
    min_events: int = 0


def table(mapping_file: str | Path, *, append: Sequence[Path] | None = None) -> Source:
    """Build the source that a YAML mapping describes. Raises ValueError naming the field of a mistake in it.

    append: event files to read instead of those of the mapping (none: its own), for a source of new data only: then
    there may be no files of items and users.
    """
    path = Path(mapping_file)
    mapping = read_mapping(path)
    events, items, users = mapping.events, mapping.items, mapping.users
    event_files = existing_files(append) if append else _find(path, events.path, "events.path")
    item_files = _find(path, items.path, "items.path", append is not None)
    user_files = _find(path, users.path, "users.path", append is not None) if users else ()
    names = dict(enumerate(map(str, events.actions), start=1)) if events.action else {1: "event"}
    rule = "every event is positive" if events.label is None else f"{events.label}, 0 or 1"
    if events.label is not None and events.positive_from is not None:
        rule = f"{events.label} >= {events.positive_from:g}"
    return Source(
        name=mapping.name,
        event_files=event_files,
        other_files=(*item_files, *user_files),
        events=partial(_events, event_files, events),
        items=partial(_items, item_files, items),
        users=partial(_users, user_files, users),
        text_columns=tuple(items.text),
        item_features=tuple(items.features),
        user_features=tuple(users.features) if users else (),
        label_rule=rule,
        action_names=names,
        has_timestamps=events.time is not None,
        keep_items_without_events=mapping.keep_items_without_events,
        min_events=mapping.min_events,
        options={"mapping": read_yaml(path)},
    )


def read_mapping(path: Path) -> TableMapping:
    """Read the mapping in a YAML file. Raises ValueError naming the file and the field of a mistake."""
    if not path.is_file():
        raise ValueError(f"{path}: no such mapping file; `table` needs a YAML file that names the columns")
    try:
        raw = read_yaml(path)
    except ValueError as error:
        raise ValueError(f"{path} is {error}") from error
    parts = {"events": EventColumns, "items": ItemColumns, "users": UserColumns}
    top = _checked(raw, TableMapping, path, "")
    for name, kind in parts.items():
        if top.get(name) is not None:
            top[name] = kind(**_checked(top[name], kind, path, f"{name}."))
    mapping = TableMapping(**top)
    _check_values(mapping, path)
    return mapping


def _checked(raw: Any, kind: type, path: Path, prefix: str) -> dict[str, Any]:
    """Check names, required fields and types of `raw`; return the keyword arguments of the dataclass `kind`."""
    if not isinstance(raw, Mapping):
        raise ValueError(
            f"{path}: {prefix.rstrip('.') or 'the file'} must be a mapping of names, not {abbreviate(raw)}"
        )
    known = {f.name: f for f in fields(kind)}
    for key in raw:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"{path}: unknown key {prefix}{str(key)[:100]}; {hint}")
    for name, f in known.items():
        if raw.get(name) is None and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"{path}: {prefix}{name} is missing; it is required")
    given = {key: value for key, value in raw.items() if value is not None}
    for name, value in given.items():
        kinds, what = _KINDS.get(known[name].type, (object, ""))
        # bool is a subclass of int: without the second condition `min_events: true` would pass.
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool and kinds is not object):
            raise ValueError(f"{path}: {prefix}{name} is {abbreviate(value)}, it must be {what}")
    return given


_KINDS: dict[Any, tuple[Any, str]] = {
    str: (str, "text"),
    str | None: (str, "text"),
    bool: (bool, "true or false"),
    int: (int, "a whole number"),
    float | None: ((int, float), "a number"),
    list[str]: (list, "a list of names"),
    dict[str, str | None]: (dict, "a mapping of columns to separators"),
}
"""Type annotation of a field -> the accepted types of its YAML value, and their description for messages."""


def _check_values(mapping: TableMapping, path: Path) -> None:
    require_time_unit(mapping.events.time_unit)
    require_time_unit(mapping.items.time_unit)
    if not mapping.items.text:
        raise ValueError(f"{path}: items.text=[] must be a list of at least one column")
    if not all(isinstance(name, str | int | float) for name in mapping.events.actions):
        raise ValueError(f"{path}: events.actions is {abbreviate(mapping.events.actions)}, it must be a list of names")
    users = mapping.users.features if mapping.users else {}
    for name in (*mapping.items.text, *mapping.items.features, *users):
        # The name becomes a file name of the dataset (`features/<name>.parquet`).
        if not isinstance(name, str) or not is_inside(f"{name}.parquet") or "/" in name:
            raise ValueError(f"{path}: {abbreviate(name)} must be the name of a column, in quotes and without slashes")
    for name, separator in (*mapping.items.features.items(), *users.items()):
        if separator is not None and (not isinstance(separator, str) or not separator):
            raise ValueError(f"{path}: the separator of {name} is {abbreviate(separator)}, it must be text or null")
    if mapping.events.action is not None and not mapping.events.actions:
        raise ValueError(f"{path}: events.actions is missing; list the values of {mapping.events.action!r} there")
    if mapping.events.positive_from is not None and mapping.events.label is None:
        raise ValueError(f"{path}: events.positive_from needs events.label, the column that it compares")


def existing_files(paths: Sequence[Path]) -> tuple[Path, ...]:
    """The paths of files. Raises ValueError for one that is no file."""
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} is no file; correct the path")
    return tuple(paths)


def _find(mapping_file: Path, pattern: str, field_name: str, may_be_none: bool = False) -> tuple[Path, ...]:
    given = Path(pattern)
    root = Path(given.anchor) if given.is_absolute() else mapping_file.absolute().parent
    relative = str(given.relative_to(given.anchor)) if given.is_absolute() else pattern
    try:
        found = tuple(sorted(p for p in root.glob(relative) if p.is_file()))
    except (ValueError, NotImplementedError, IndexError, RecursionError) as error:
        raise ValueError(f"{mapping_file}: {field_name}={pattern!r} is not a path ({error}); correct it") from error
    if not found and not may_be_none:
        raise ValueError(f"{mapping_file}: {field_name}={pattern!r} matches no file under {root}; correct the path")
    return found


def _events(files: tuple[Path, ...], columns: EventColumns) -> Iterator[Chunk]:
    wanted = [columns.user, columns.item, columns.time, columns.label, columns.action]
    for path in files:
        for rows, data, size in read_columns(path, [name for name in wanted if name is not None]):
            with error_location(path, _CONVERT):
                seconds = text = None
                if columns.time is not None:
                    time = data[columns.time].combine_chunks()
                    seconds, text = parse_seconds(time, columns.time_unit), time
                label = _labels(data, columns)
                action = _actions(data, columns, path, rows)
                events = event_table(rows, data[columns.user], data[columns.item], seconds, text, label, action)
            yield Chunk(path, events, size)


def _labels(data: pa.Table, columns: EventColumns) -> pa.Array:
    """float32 labels; null without a label (not an exposure), NaN if it is not a number or not 0 or 1."""
    if columns.label is None:
        return pa.array(np.ones(len(data), np.float32))
    raw = data[columns.label]
    absent = pc.is_null(raw)
    if pa.types.is_string(raw.type) or pa.types.is_large_string(raw.type):
        absent = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(raw), ""), True)
    value = parse_float(pc.cast(raw, pa.float64()) if pa.types.is_boolean(raw.type) else raw)
    if columns.positive_from is not None:
        value = np.where(np.isnan(value), np.nan, value >= columns.positive_from)
    value = np.where((value == 0) | (value == 1), value, np.nan)
    return pa.array(value.astype(np.float32), mask=absent.to_numpy(zero_copy_only=False))


def _actions(data: pa.Table, columns: EventColumns, path: Path, rows: np.ndarray) -> np.ndarray:
    """int32 ids by the mapping's list; 0 for null or blank. Raises ValueError for a value that is not listed."""
    if columns.action is None:
        return np.ones(len(data), np.int32)
    raw = pc.utf8_trim_whitespace(pc.fill_null(data[columns.action].cast(pa.string()), ""))
    listed = pa.array([str(name) for name in columns.actions], pa.string())
    ids = pc.add(pc.fill_null(pc.index_in(raw, value_set=listed), -1), 1).to_numpy().astype(np.int32)
    unlisted = (ids == 0) & pc.not_equal(raw, "").to_numpy(zero_copy_only=False)
    if unlisted.any():
        first = int(np.flatnonzero(unlisted)[0])
        raise ValueError(
            f"{path}, row {rows[first]}: {columns.action}={raw[first].as_py()!r} is not in events.actions "
            f"({', '.join(map(str, columns.actions))}); add it there"
        )
    return ids


def _items(files: tuple[Path, ...], columns: ItemColumns) -> Iterator[Chunk]:
    dates = [columns.created_at] if columns.created_at is not None else []
    for path in files:
        for rows, data, size in read_columns(path, [columns.item, *columns.text, *columns.features, *dates]):
            with error_location(path, _CONVERT):
                out = {"raw_item_id": as_id_strings(data[columns.item], "item")}
                out |= {name: data[name].cast(pa.string()) for name in columns.text}
                if columns.created_at is not None:
                    out["created_at"] = parse_seconds(data[columns.created_at].combine_chunks(), columns.time_unit)
                items = pa.table({**out, **_features(data, columns.features), "row": rows})
            yield Chunk(path, items, size)


def _users(files: tuple[Path, ...], columns: UserColumns | None) -> Iterator[Chunk]:
    if columns is None:
        return
    for path in files:
        for rows, data, size in read_columns(path, [columns.user, *columns.features]):
            with error_location(path, _CONVERT):
                ids = as_id_strings(data[columns.user], "user")
                users = pa.table({"raw_user_id": ids, **_features(data, columns.features), "row": rows})
            yield Chunk(path, users, size)


def _features(data: pa.Table, features: Mapping[str, str | None]) -> dict[str, pa.Array]:
    """Each feature column as list<string>: split by its separator, without blanks."""
    out = {}
    for name, separator in features.items():
        column = data[name].combine_chunks()
        if pa.types.is_list(column.type):
            cells = [[str(v) for v in cell or []] for cell in column.to_pylist()]
        else:
            texts = column.cast(pa.string()).to_pylist()
            cells = [(text or "").split(separator) if separator else [text or ""] for text in texts]
        out[f"feature_{name}"] = pa.array([[v.strip() for v in c if v.strip()] for c in cells], pa.list_(pa.string()))
    return out
