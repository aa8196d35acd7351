"""Declared columns of events in a table mapping: labels of several kinds, weight, sampling rate and request context.

    events:
      labels:                       # instead of `label`; events that have the first label are exposures
        click: binary
        like: {kind: binary, given: click}              # defined only where click is 1
        watch_seconds: {kind: regression, transform: log1p}
        stars: {kind: ordinal, values: [1, 2, 3, 4, 5], column: rating}
        good: {kind: binary, column: rating, positive_from: 4}
      weight: importance            # optional: a column of numbers of at least 0
      sampling_rate: kept           # optional: column with the sampling rate of exposures with first label 0
      context: {device: categorical, position: categorical, price: {kind: numeric, column: euros}}

Each name is also the name of the source's column, unless `column` gives another one.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hllm_torchrec.common.yaml_files import abbreviate
from hllm_torchrec.data.event_schema import (
    CONTEXT_KINDS,
    LABEL_KINDS,
    SAMPLING_RATE,
    TRANSFORMS,
    WEIGHT,
    WHOLE_FLOAT,
    ContextColumn,
    EventSchema,
    LabelColumn,
    schema_problems,
)
from hllm_torchrec.data.sources.dialect import NULL_WORDS
from hllm_torchrec.data.sources.table_columns import EventColumns
from hllm_torchrec.data.sources.values import as_texts, parse_float, parse_labels
from hllm_torchrec.data.validation import error_location

_CONVERT = "convert the column, or correct the mapping"
_LABEL_KEYS = ("kind", "column", "transform", "values", "given", "positive_from")
_CONTEXT_KEYS = ("kind", "column")


@dataclass(frozen=True)
class DeclaredColumns:
    """The event schema of a mapping, and the source's column for each column of the schema.

    columns: column of `EventSchema.extra` -> the source's column; positive_from: binary label -> smallest number that
    becomes 1; first: the source's column of the first label, None if every event is positive.
    """

    schema: EventSchema
    columns: Mapping[str, str]
    positive_from: Mapping[str, float]
    first: str | None

    @cached_property
    def names(self) -> list[str]:
        """The source's columns that are read, without repetitions."""
        first = [self.first] if self.first else []
        return list(dict.fromkeys([*first, *self.columns.values()]))

    def first_label(self, data: pa.Table, path: Path) -> tuple[np.ndarray | pa.Array, pa.ChunkedArray | None]:
        """(first label of the rows, float32; its text in the file); without a label column, (ones, None)."""
        if self.first is None:
            return np.ones(len(data), np.float32), None
        name = self.schema.labels[0].name
        with error_location(f"{path}, column {self.first}", _CONVERT):
            return parse_labels(data[self.first], self.positive_from.get(name)), data[self.first]

    def extra(self, data: pa.Table, path: Path) -> dict[str, pa.Array]:
        """The columns of `EventSchema.extra` for the rows: null where a cell is empty, NaN where it cannot be read."""
        schema, found = self.schema, {}
        for label in schema.labels[1:]:
            with error_location(f"{path}, column {self.columns[label.column]}", _CONVERT):
                values = data[self.columns[label.column]]
                found[label.column] = _label(values, label, self.positive_from.get(label.name))
        for name in (WEIGHT, SAMPLING_RATE):
            if name in self.columns:
                with error_location(f"{path}, column {self.columns[name]}", _CONVERT):
                    found[name] = _numbers(data[self.columns[name]])
        for one in schema.context:
            values = data[self.columns[one.column]]
            with error_location(f"{path}, column {self.columns[one.column]}", _CONVERT):
                found[one.column] = _categories(values) if one.kind == "categorical" else _numbers(values)
        return found


def _label(values: pa.ChunkedArray, label: LabelColumn, positive_from: float | None) -> pa.Array:
    """float32 values of a label, in the form in which they are stored."""
    if label.kind == "binary":
        return parse_labels(values, positive_from)
    if label.kind == "regression":
        return _numbers(values)
    texts = _categories(values)
    index = pc.index_in(texts, value_set=pa.array([_text(value) for value in label.values], pa.string()))
    number = pc.if_else(texts.is_valid(), pc.fill_null(index.cast(pa.float32()), np.nan), pa.scalar(None, pa.float32()))
    return number.cast(pa.float32())


def _text(value: float | str) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _numbers(values: pa.ChunkedArray) -> pa.Array:
    """float32 numbers: null for empty cells and words for a missing value, NaN for other texts."""
    with np.errstate(over="ignore"):  # infinite: out of the range of any column
        number = parse_float(values).astype(np.float32)
    absent = _is_absent(values)
    # NaN in a float column means a missing value (null), unlike a text that is not a number.
    return pa.array(number, mask=absent)


def _categories(values: pa.ChunkedArray) -> pa.Array:
    """Trimmed texts; null for empty cells and words for a missing value. 12.0 is read as "12"."""
    texts = pc.utf8_trim_whitespace(as_texts(values))
    texts = pc.replace_substring_regex(texts, WHOLE_FLOAT, r"\1")
    return pc.if_else(pa.array(_is_absent(values)), pa.scalar(None, pa.string()), texts)


def _is_absent(values: pa.ChunkedArray) -> np.ndarray:
    texts = as_texts(values)
    words = pa.array(["", *(word.lower() for word in NULL_WORDS)])
    absent = pc.is_in(pc.utf8_lower(pc.utf8_trim_whitespace(pc.fill_null(texts, ""))), value_set=words)
    return np.asarray(absent.to_numpy(zero_copy_only=False))


def read_declarations(events: EventColumns, path: Path) -> DeclaredColumns:
    """The declared columns of a mapping's events.

    Raises:
        ValueError: a declaration is wrong; the message names the mapping's file and field.
    """
    if events.labels and (events.label is not None or events.positive_from is not None):
        raise ValueError(f"{path}: events.labels replaces events.label and events.positive_from; leave these out")
    labels: dict[str, dict[str, Any]]
    if not events.labels:
        entry = {"kind": "binary", "column": events.label, "positive_from": events.positive_from}
        labels = {"label": {key: value for key, value in entry.items() if value is not None}}
    else:
        labels = {
            name: _entry(name, one, "labels", LABEL_KINDS, _LABEL_KEYS, path) for name, one in events.labels.items()
        }
    context = {
        name: _entry(name, one, "context", CONTEXT_KINDS, _CONTEXT_KEYS, path) for name, one in events.context.items()
    }
    schema = EventSchema(
        tuple(_label_column(name, one, path) for name, one in labels.items()),
        events.weight is not None,
        events.sampling_rate is not None,
        tuple(ContextColumn(name, one["kind"]) for name, one in context.items()),
    )
    for problem in schema_problems(schema):
        raise ValueError(f"{path}: events.{problem}")
    first_name = schema.labels[0].name
    first = labels[first_name].get("column", first_name)
    # Keys are the dataset's columns, because a label or context may also be named `weight`.
    columns = {one.column: labels[one.name].get("column", one.name) for one in schema.labels[1:]}
    columns |= {one.column: context[one.name].get("column", one.name) for one in schema.context}
    columns |= {} if events.weight is None else {WEIGHT: events.weight}
    columns |= {} if events.sampling_rate is None else {SAMPLING_RATE: events.sampling_rate}
    positive = {name: float(one["positive_from"]) for name, one in labels.items() if "positive_from" in one}
    is_labelled = bool(events.labels) or events.label is not None
    return DeclaredColumns(schema, columns, positive, first if is_labelled else None)


def _entry(name: Any, raw: Any, part: str, kinds: tuple[str, ...], keys: tuple[str, ...], path: Path) -> dict[str, Any]:
    """The entry of a label or context as a mapping with `kind`; raw: such a mapping, or only the kind."""
    place = f"{path}: events.{part}.{name}"
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"{place}: a name has letters, digits and underscores; give the name in the file as `column`")
    entry = {"kind": raw} if isinstance(raw, str) else raw
    if not isinstance(entry, Mapping):
        raise ValueError(f"{place} is {abbreviate(raw)}, it must be a kind ({', '.join(kinds)}) or a mapping with one")
    for key in entry:
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(keys)}"
            raise ValueError(f"{place}: unknown key {abbreviate(key)}; {hint}")
    if entry.get("kind") not in kinds:
        raise ValueError(f"{place}.kind is {abbreviate(entry.get('kind'))}; choose one of {', '.join(kinds)}")
    if not isinstance(entry.get("column", name), str) or entry.get("column") == "":
        raise ValueError(f"{place}.column is {abbreviate(entry['column'])}, it must be the name of a column")
    return {key: value for key, value in entry.items() if value is not None}


def _label_column(name: str, entry: Mapping[str, Any], path: Path) -> LabelColumn:
    place, values, transform = f"{path}: events.labels.{name}", entry.get("values", []), entry.get("transform")
    if transform is not None and transform not in TRANSFORMS:
        raise ValueError(f"{place}.transform is {abbreviate(transform)}; choose one of {', '.join(TRANSFORMS)}")
    if not isinstance(values, list) or not all(type(value) in (int, float, str) for value in values):
        raise ValueError(f"{place}.values is {abbreviate(values)}, it must be a list of numbers or texts in order")
    texts = [_text(value) for value in values]
    if repeated := sorted({text for text in texts if texts.count(text) > 1}):
        raise ValueError(f"{place}.values has {repeated[0]!r} more than once; list each value once, in order")
    if not isinstance(entry.get("given", ""), str):
        raise ValueError(f"{place}.given is {abbreviate(entry['given'])}, it must be the name of another label")
    number = entry.get("positive_from")
    if number is not None and (entry["kind"] != "binary" or type(number) not in (int, float)):
        raise ValueError(f"{place}.positive_from is {abbreviate(number)}, it must be a number, of a binary label")
    return LabelColumn(name, entry["kind"], transform, tuple(values), entry.get("given"))
