"""Reading of the rows of a user's tables by a mapping (`table_mapping`)."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hllm_torchrec.common.yaml_files import abbreviate
from hllm_torchrec.data.sources.base import Chunk, event_table
from hllm_torchrec.data.sources.columnar import read_columns
from hllm_torchrec.data.sources.declared_columns import DeclaredColumns
from hllm_torchrec.data.sources.dialect import NULL_WORDS, Format
from hllm_torchrec.data.sources.joined_items import JoinedItems
from hllm_torchrec.data.sources.table_columns import EventColumns, ItemColumns, UserColumns
from hllm_torchrec.data.sources.values import (
    TIME_UNITS,
    Column,
    are_dates_as_numbers,
    as_id_strings,
    as_lists,
    as_texts,
    is_list,
    parse_flags,
    parse_seconds,
    rounded_example,
    without_html,
)
from hllm_torchrec.data.validation import error_location

_CONVERT = "convert the column, or correct the mapping"
_EARLY, _PLAUSIBLE = 315_532_800, 631_152_000
"""1980 and 1990 in seconds: times that are before 1980 in one unit and after 1990 in another most likely have the
other unit."""


def read_event_rows(files: tuple[Path, ...], columns: EventColumns, declared: DeclaredColumns) -> Iterator[Chunk]:
    """The events of `files`, in order. If a row is a user with lists of events, `row` counts the events of the file.

    Raises ValueError, naming file and column or row, for values that cannot be read.
    """
    wanted = [columns.user, columns.item, columns.time, columns.action, *declared.names]
    for path in files:
        done = 0
        for rows, data, size, dialect in read_columns(path, [name for name in wanted if name], columns.format):
            if is_list(data[columns.item].type):
                with error_location(path, _CONVERT):
                    data = _one_row_per_event(data, columns)
                rows, done = np.arange(done + 1, done + len(data) + 1), done + len(data)
            seconds = time = None
            if columns.time is not None:
                time = data[columns.time].combine_chunks()
                with error_location(f"{path}, column {columns.time}", _CONVERT):
                    seconds = parse_seconds(time, columns.time_unit)
                _check_unit(time, seconds, columns, path)
            label, label_text = declared.first_label(data, path)
            action = _actions(data, columns, path, rows)
            with error_location(path, _CONVERT):
                user, item = data[columns.user], data[columns.item]
                nulls = _id_nulls(columns.format)
                events = event_table(rows, user, item, seconds, time, label, action, label_text, nulls)
            for name, values in declared.extra(data, path).items():
                events = events.append_column(name, values)
            yield Chunk(path, events, size, dialect)


def _one_row_per_event(data: pa.Table, columns: EventColumns) -> pa.Table:
    """Convert rows of users, with lists of items, times, labels and actions of equal length, to rows of events."""
    lists = {name: _flat(data[name]) for name in data.column_names if is_list(data[name].type)}
    lengths = {name: pc.fill_null(pc.list_value_length(data[name]), 0) for name in lists}
    own = lengths[columns.item].combine_chunks()
    for name, other in lengths.items():
        if other.combine_chunks() != own:
            raise ValueError(f"the lists of {name} and {columns.item} differ in length")
    row = np.repeat(np.arange(len(data)), own.to_numpy())
    return pa.table({name: lists[name] if name in lists else data[name].take(row) for name in data.column_names})


def _flat(values: pa.ChunkedArray) -> pa.Array:
    flat = pc.list_flatten(values)
    return flat.combine_chunks() if isinstance(flat, pa.ChunkedArray) else flat


def _id_nulls(given: Format | None) -> tuple[str, ...]:
    return NULL_WORDS if given is None or given.nulls is None else tuple(given.nulls)


def _check_unit(time: pa.Array, seconds: pa.Array, columns: EventColumns, path: Path) -> None:
    """Raise ValueError for dates read as numbers, for rounded times, and for times read in a unit that is too fine."""
    place = f"{path}, column {columns.time}"
    if columns.time_unit != "iso8601" and are_dates_as_numbers(time):
        raise ValueError(f"{place}: {time[0]} looks like a date; set the time unit: time_unit: iso8601")
    if pa.types.is_string(time.type) and (example := rounded_example(time, share=0.5)):
        raise ValueError(
            f"{place}: times like {example[:50]} were rounded, as spreadsheets do; write them as whole numbers"
        )
    scale = TIME_UNITS[columns.time_unit]
    if scale <= 1 or pa.types.is_temporal(time.type) or seconds.null_count == len(seconds):
        return
    middle = float(np.median(seconds.drop_null().to_numpy()))
    for unit, finer in TIME_UNITS.items():
        if 0 < finer < scale and middle < _EARLY and _PLAUSIBLE <= middle * scale / finer <= 4_102_444_800:
            raise ValueError(
                f"{place}: {time[0]} in {columns.time_unit} is in {1970 + int(middle // 31_557_600)}; it looks like "
                f"{unit}. Set the time unit: time_unit: {unit}"
            )


def _actions(data: pa.Table, columns: EventColumns, path: Path, rows: np.ndarray) -> np.ndarray:
    """int32 action ids from `events.actions`; 0 for null or blank. Raises ValueError for a value not in the list."""
    if columns.action is None:
        return np.ones(len(data), np.int32)
    with error_location(f"{path}, column {columns.action}", _CONVERT):
        raw = pc.utf8_trim_whitespace(pc.fill_null(as_texts(data[columns.action]), ""))
    listed = pa.array([str(name) for name in columns.actions], pa.string())
    ids = pc.add(pc.fill_null(pc.index_in(raw, value_set=listed), -1), 1).to_numpy().astype(np.int32)
    if not (ids > 0).any() and (numbers := _whole_numbers(raw)) is not None:  # 4.0 in the file, "4" in the list
        ids = pc.add(pc.fill_null(pc.index_in(numbers, value_set=listed), -1), 1).to_numpy().astype(np.int32)
    unlisted = (ids == 0) & pc.not_equal(raw, "").to_numpy(zero_copy_only=False)
    if unlisted.any():
        first = int(np.flatnonzero(unlisted)[0])
        raise ValueError(
            f"{path}, row {rows[first]}: {columns.action}={abbreviate(raw[first].as_py())} is not in events.actions "
            f"({', '.join(map(str, columns.actions))}); add it there, in quotes"
        )
    return ids


def _whole_numbers(texts: pa.Array) -> pa.Array | None:
    """Convert texts like "4.0" to "4" if all of them are whole numbers, else return None."""
    whole = pc.match_substring_regex(texts, r"^-?\d+(\.0*)?$")
    return pc.replace_substring_regex(texts, r"\.0*$", "") if pc.all(whole).as_py() else None


def read_item_rows(files: tuple[Path, ...], columns: ItemColumns, joined: JoinedItems) -> Iterator[Chunk]:
    """The items of `files`, with the columns of the joined files."""
    others = [name for name in (columns.created_at, columns.active) if name is not None]
    own = [name for name in (*columns.text, *columns.features) if name not in joined.names]
    for path in files:
        for rows, data, size, dialect in read_columns(path, [columns.item, *own, *others], columns.format):
            with error_location(path, _CONVERT):
                ids = as_id_strings(data[columns.item], "item", _id_nulls(columns.format))
            found = joined.take(ids)
            out = {"raw_item_id": ids}
            for name in columns.text:
                with error_location(f"{path}, column {name}", _CONVERT):
                    out[name] = _clean(as_texts(found.get(name, data[name] if name in own else None)), columns.html)
            if columns.created_at is not None:
                with error_location(f"{path}, column {columns.created_at}", _CONVERT):
                    out["created_at"] = parse_seconds(data[columns.created_at].combine_chunks(), columns.time_unit)
            if columns.active is not None:
                with error_location(f"{path}, column {columns.active}", _CONVERT):
                    out["active"] = parse_flags(data[columns.active].combine_chunks())
            values = {name: found[name] if name in found else data[name] for name in columns.features}
            out |= _features(values, columns.features, path)
            yield Chunk(path, pa.table({**out, "row": rows}), size, dialect)


def _clean(texts: pa.Array, html: str) -> pa.Array:
    if html != "clean" or not pc.any(pc.match_substring_regex(texts, "[<&]")).as_py():
        return texts
    return pa.array([None if text is None else without_html(text) for text in texts.to_pylist()], pa.string())


def read_user_rows(files: tuple[Path, ...], columns: UserColumns | None) -> Iterator[Chunk]:
    """The rows of users of `files`."""
    if columns is None:
        return
    for path in files:
        for rows, data, size, dialect in read_columns(path, [columns.user, *columns.features], columns.format):
            with error_location(path, _CONVERT):
                ids = as_id_strings(data[columns.user], "user", _id_nulls(columns.format))
            features = _features({name: data[name] for name in columns.features}, columns.features, path)
            yield Chunk(path, pa.table({"raw_user_id": ids, **features, "row": rows}), size, dialect)


def _features(values: Mapping[str, Column], separators: Mapping[str, str | None], path: Path) -> dict[str, pa.Array]:
    """Each feature column as list<string>, from lists, texts split by the separator, or single values; no blanks."""
    out = {}
    for name, separator in separators.items():
        with error_location(f"{path}, column {name}", _CONVERT):
            out[f"feature_{name}"] = as_lists(values[name], separator)
    return out
