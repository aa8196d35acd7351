"""Source for a user's own tables (docs/tables.md), described by a column mapping in YAML:

    name: my_shop
    events:
      path: events-*.parquet        # a file, a pattern or a folder, relative to the YAML file
      user: customer
      item: sku
      time: happened_at             # left out: the row order is used as time
      time_unit: seconds            # milliseconds, microseconds, nanoseconds, iso8601
      label: rating                 # left out: every event has label 1
      positive_from: 4              # label = value >= 4; left out: the value itself is the label
      action: kind                  # left out: every event has action 1, "event"
      actions: [click, skip, buy]   # the values of the action column; ids from 1 in this order
      labels: {click: binary}       # instead of `label`: several; also weight, sampling_rate and context, all in
                                    # `declared_columns`
      format: {separator: ";"}      # optional, also in other parts: overrides detection (`dialect.Format`)
    items:
      path: items.csv
      item: sku
      text: [title, brand]
      features: {category: "|"}     # column: separator of several values, or null
      created_at: listed_at         # optional, in the unit of `items.time_unit`
      active: on_sale               # optional: false (0, no) for items that are no longer candidates
      html: clean                   # optional: texts without tags and entities
      join: [{path: tags.csv, item: id, columns: [tags]}]   # optional: more files, joined by item id
    users:                          # optional
      path: users.csv
      user: customer
      features: {country: null}
    keep_items_without_events: true
    min_events: 0
    bad_rows: {unknown_item: drop}  # optional: handling of bad rows; their share is then not limited

An event whose label is null (Parquet) or an empty cell (CSV) is not an exposure; it is only part of the history.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from hllm_torchrec.common.yaml_files import abbreviate, read_yaml
from hllm_torchrec.data.bad_rows import BadRows
from hllm_torchrec.data.manifest_schema import is_inside
from hllm_torchrec.data.sources.base import Source
from hllm_torchrec.data.sources.declared_columns import read_declarations
from hllm_torchrec.data.sources.dialect import Format, check_format
from hllm_torchrec.data.sources.joined_items import JoinedItems
from hllm_torchrec.data.sources.table_columns import EventColumns, ItemColumns, Join, UserColumns
from hllm_torchrec.data.sources.table_rows import read_event_rows, read_item_rows, read_user_rows
from hllm_torchrec.data.sources.values import require_time_unit


@dataclass(frozen=True)
class TableMapping:
    """The complete mapping."""

    name: str
    events: EventColumns
    items: ItemColumns
    users: UserColumns | None = None
    keep_items_without_events: bool = True
    min_events: int = 0
    bad_rows: dict[str, str] = field(default_factory=dict)
    """Kind of bad row -> handling, see `BadRows`; the share of the rows of these kinds is not limited."""


def table(mapping_file: str | Path, *, append: Sequence[Path] | None = None) -> Source:
    """Build the source that a YAML mapping describes. Raises ValueError that names the wrong field.

    append: for a source with only new data: event files to read instead of those of the mapping (an empty list: those
        of the mapping). The files of items and users may then be missing.
    """
    path = Path(mapping_file)
    mapping = read_mapping(path)
    events, items, users = mapping.events, mapping.items, mapping.users
    event_files = existing_files(append) if append else _find(path, events.path, "events.path")
    new_only = append is not None  # all items and users of the new events may already be in the dataset
    item_files = _find(path, items.path, "items.path", new_only)
    user_files = _find(path, users.path, "users.path", new_only) if users else ()
    joined = [(_find(path, join.path, f"items.join[{i}].path", new_only), join) for i, join in enumerate(items.join)]
    names = dict(enumerate(map(str, events.actions), start=1)) if events.action else {1: "event"}
    declared = read_declarations(events, path)
    positive_from = declared.positive_from.get(declared.schema.labels[0].name)
    rule = "every event is positive" if declared.first is None else f"{declared.first}, 0 or 1"
    if declared.first is not None and positive_from is not None:
        rule = f"{declared.first} >= {positive_from:g}"
    return Source(
        name=mapping.name,
        event_files=event_files,
        other_files=(*item_files, *(file for files, _ in joined for file in files), *user_files),
        events=partial(read_event_rows, event_files, events, declared),
        items=partial(read_item_rows, item_files, items, JoinedItems(joined)),
        users=partial(read_user_rows, user_files, users),
        text_columns=tuple(items.text),
        item_features=tuple(items.features),
        user_features=tuple(users.features) if users else (),
        label_rule=rule,
        action_names=names,
        schema=declared.schema,
        is_labelled=declared.first is not None,
        has_timestamps=events.time is not None,
        keep_items_without_events=mapping.keep_items_without_events,
        min_events=mapping.min_events,
        policy=BadRows().changed(mapping.bad_rows, chosen=True),
        # The order of the labels matters, but dicts that differ only in the order are equal, so store the names too.
        options={"mapping": read_yaml(path)} | ({"labels": list(declared.schema.label_names)} if events.labels else {}),
    )


def read_mapping(path: Path) -> TableMapping:
    """Read the mapping in a YAML file. Raises ValueError that names the file and the wrong field."""
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
            top[name] = _part(top[name], kind, path, f"{name}.")
    mapping = TableMapping(**top)
    _check_values(mapping, path)
    return mapping


def _part(raw: Any, kind: type, path: Path, prefix: str) -> Any:
    """Convert a part of the mapping, and its nested parts, to the dataclass `kind`."""
    given = _checked(raw, kind, path, prefix)
    if "format" in given:
        given["format"] = Format(**_checked(given["format"], Format, path, f"{prefix}format."))
        if problem := check_format(given["format"]):
            raise ValueError(f"{path}: {prefix}format.{problem}")
    if "join" in given:
        given["join"] = [_part(join, Join, path, f"{prefix}join[{i}].") for i, join in enumerate(given["join"])]
    return kind(**given)


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
            quotes = ": in YAML the words on, off, yes and no need quotes" if isinstance(value, bool) else ""
            raise ValueError(f"{path}: {prefix}{name} is {abbreviate(value)}, it must be {what}{quotes}")
    return given


_KINDS: dict[Any, tuple[Any, str]] = {
    str: (str, "text"),
    str | None: (str, "text"),
    bool: (bool, "true or false"),
    int: (int, "a whole number"),
    float | None: ((int, float), "a number"),
    list[str]: (list, "a list of names"),
    list[str] | None: (list, "a list of names"),
    list[Join]: (list, "a list of files, each with path, item and columns"),
    dict[str, Any]: (dict, "a mapping of names to kinds"),
    dict[str, str]: (dict, "a mapping of kinds of bad rows to error, drop or keep"),
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
    if mapping.items.html not in ("keep", "clean"):
        raise ValueError(f"{path}: items.html is {abbreviate(mapping.items.html)}; choose one of keep, clean")
    if mapping.items.active is not None and "active" in mapping.items.text:
        raise ValueError(f"{path}: items.text has 'active', the name of the column that items.active writes; rename it")
    unknown = [kind for kind in mapping.bad_rows if kind not in BadRows().to_dict()]
    if unknown:
        known = ", ".join(BadRows().to_dict())
        raise ValueError(f"{path}: bad_rows has no kind {abbreviate(unknown[0])}; known: {known}")
    own = (*mapping.items.text, *mapping.items.features)
    for i, join in enumerate(mapping.items.join):
        for name in join.columns:
            if name not in own:
                raise ValueError(
                    f"{path}: items.join[{i}].columns has {abbreviate(name)}; list it in items.text or items.features"
                )
    for part in ("events", "items", "users"):
        for name in ("user", "item", "time", "label", "action", "weight", "sampling_rate", "created_at", "active"):
            if getattr(getattr(mapping, part), name, None) == "":
                raise ValueError(f"{path}: {part}.{name}='' must be the name of a column")
    users = mapping.users.features if mapping.users else {}
    for name in (*mapping.items.text, *mapping.items.features, *users):
        # The name becomes a file name of the dataset (`features/<name>.parquet`).
        if not isinstance(name, str) or not name or not is_inside(f"{name}.parquet") or "/" in name:
            raise ValueError(f"{path}: {abbreviate(name)} must be the name of a column, in quotes and without slashes")
    for name, separator in (*mapping.items.features.items(), *users.items()):
        if separator is not None and (not isinstance(separator, str) or not separator):
            raise ValueError(f"{path}: the separator of {name} is {abbreviate(separator)}, it must be text or null")
    if mapping.events.action is not None and not mapping.events.actions:
        raise ValueError(f"{path}: events.actions is missing; list the values of {mapping.events.action!r} there")
    if mapping.events.positive_from is not None and mapping.events.label is None:
        raise ValueError(f"{path}: events.positive_from needs events.label, the column that it compares")


def existing_files(paths: Sequence[Path]) -> tuple[Path, ...]:
    """Return `paths` as a tuple. Raises ValueError if one is not a file."""
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} is no file; correct the path")
    return tuple(paths)


def _find(mapping_file: Path, pattern: str, field_name: str, may_be_none: bool = False) -> tuple[Path, ...]:
    """The files that match a pattern, in natural order (`day-2` before `day-10`); for a folder, all files in it.

    Files whose names begin with `.` or `_` (which Spark writes next to its parts) are left out, unless the pattern is
    the name.
    """
    given = Path(pattern)
    root = Path(given.anchor) if given.is_absolute() else mapping_file.absolute().parent
    relative = str(given.relative_to(given.anchor)) if given.is_absolute() else pattern
    try:
        # A path that exists is no pattern, because browsers and copies make names like `events[1].csv`.
        literal = root / relative
        found = [literal] if literal.exists() else sorted(root.glob(relative), key=natural_key)
        files = [file for path in found for file in _files_of(path, is_named=path.name == given.name)]
    except (ValueError, NotImplementedError, IndexError, RecursionError) as error:
        raise ValueError(f"{mapping_file}: {field_name}={pattern!r} is not a path ({error}); correct it") from error
    if not files and not may_be_none:
        raise ValueError(f"{mapping_file}: {field_name}={pattern!r} matches no file under {root}; correct the path")
    return tuple(dict.fromkeys(files))


def _files_of(path: Path, *, is_named: bool) -> list[Path]:
    if path.is_file():
        return [path] if is_named or not path.name.startswith((".", "_")) else []
    inside = (file for file in path.rglob("*") if file.is_file())
    shown = [file for file in inside if not any(part.startswith((".", "_")) for part in file.relative_to(path).parts)]
    return sorted(shown, key=natural_key)


def natural_key(path: Path) -> list[tuple[int, int, str]]:
    """Sort key of a path, in which numbers are compared by value."""
    parts = re.split(r"(\d+)", str(path))
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts]
