"""Amazon reviews of 2014, 2018 and 2023, for example Books; the edition is detected from the contents of the files.

Events are ratings as CSV or reviews as JSON lines:

| edition | ratings | reviews |
|---|---|---|
| 2014 | `user,item,rating,timestamp`, no header | `reviewerID`, `asin`, `overall`, `unixReviewTime` |
| 2018 | `item,user,rating,timestamp`, no header | the same |
| 2023 | header, `user_id,parent_asin,rating,timestamp` | `user_id`, `parent_asin`, `rating`, `timestamp` |

Times are seconds, or milliseconds (2023, detected from their magnitude). Metadata: one product per line, as JSON or as
the Python literal of the 2014 files (read with `ast.literal_eval`, which executes no code). Label: rating >= 4. Action:
the rating, 1..5. Text: title, description, by default without HTML. Items and users are filtered by a 5-core. As in the
published protocol, an item without metadata is kept, without text. Files may be compressed.
"""

import re
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from hllm_torchrec.common.text_files import Utf8File
from hllm_torchrec.data.bad_rows import BadRows
from hllm_torchrec.data.sources.base import Chunk, Source, event_table, require_files
from hllm_torchrec.data.sources.columnar import parse_record, read_csv, text_lines
from hllm_torchrec.data.sources.dialect import Format
from hllm_torchrec.data.sources.values import parse_float, parse_seconds, rating_labels, without_html
from hllm_torchrec.data.validation import error_location

_ROWS_PER_CHUNK = 16_384
_SAMPLE_ROWS = 1000
_MILLISECONDS_FROM = 1e11
"""Threshold of the units: until the year 5138 seconds are below it; since 1973 milliseconds are above it."""
_ITEM_ID = re.compile(r"B[0-9A-Z]{9}|[0-9]{9}[0-9X]")
"""An ASIN: the product code B..., or for a book its ISBN."""
_HEADERS = {"user_id": "user", "parent_asin": "item", "asin": "item", "item_id": "item"}
_KEYS = {
    "user": ("user_id", "reviewerID"),
    "item": ("parent_asin", "asin"),
    "rating": ("rating", "overall"),
    "timestamp": ("timestamp", "unixReviewTime"),
}
"""Column -> its possible keys in reviews, the newest edition's key first."""
POLICY = BadRows(unknown_item="keep", duplicate_item="drop")


def amazon(ratings: str | Path, metadata: str | Path, *, html: str = "clean") -> Source:
    """One category of the Amazon reviews: its file of ratings or reviews and its metadata file.

    html: "clean" removes HTML tags and entities from texts, "keep" leaves texts unchanged.
    """
    event_file, item_file = Path(ratings), Path(metadata)
    require_files([event_file, item_file], "Amazon reviews")
    if html not in ("clean", "keep"):
        raise ValueError(f"html={html!r} is not one of clean, keep; choose one of them")
    return Source(
        name="amazon-" + event_file.stem.removeprefix("ratings_").lower(),
        event_files=(event_file,),
        other_files=(item_file,),
        events=partial(_events, event_file, item_file),
        items=partial(_items, item_file, html),
        text_columns=("title", "description"),
        item_features=("categories",),
        label_rule="rating >= 4",
        action_names={rating: f"rating {rating}" for rating in range(1, 6)},
        keep_items_without_events=False,
        min_events=5,
        policy=POLICY,
        options={"html": "clean"} if html == "clean" else {},
        license_note="Amazon review data (c) J. McAuley, UCSD: for research; cite its papers.",
    )


class _Layout(NamedTuple):
    """Layout of an event file: the CSV's columns (None for JSON lines) and the unit of its times."""

    columns: dict[str, str] | None
    """"user", "item", "rating", "timestamp" -> the column's name."""
    names: list[str] | None
    """Columns of a file without a header."""
    time_unit: str


def _events(path: Path, item_file: Path) -> Iterator[Chunk]:
    layout = _detect(path, item_file)
    read = _read_reviews(path) if layout.columns is None else _read_ratings(path, layout)
    said = f"users in {layout.columns['user']}, items in {layout.columns['item']}, " if layout.columns else ""
    for rows, table, size, dialect in read:
        time = table["timestamp"].combine_chunks()
        label, action = rating_labels(table["rating"])
        seconds = parse_seconds(time, layout.time_unit)
        text = table["rating"].cast(pa.string())
        events = event_table(rows, table["user"], table["item"], seconds, time, label, action, text)
        yield Chunk(path, events, size, f"{dialect}; {said}times in {layout.time_unit}")


def _detect(path: Path, item_file: Path) -> _Layout:
    """Detect the layout of an event file. Raises ValueError if it is not an Amazon rating or review file."""
    with Utf8File(path) as file:
        lines = [line.decode(errors="replace").strip() for _, line in islice(text_lines(path, file), _SAMPLE_ROWS)]
    if not lines:
        raise ValueError(f"{path} has no rows; fetch it again")
    if lines[0].startswith("{"):
        record = parse_record(lines[0].encode(), path, 1)
        times = [record.get(key) for key in _KEYS["timestamp"]]
        return _Layout(None, None, _time_unit(pa.array([str(t) for t in times if t is not None], pa.string())))
    cells = [line.replace('"', "").split(",") for line in lines]
    header = [_HEADERS.get(name, name) for name in cells[0]]
    if set(_KEYS) <= set(header):
        named = dict(zip(header, cells[0]))
        times = [row[header.index("timestamp")] for row in cells[1:] if len(row) == len(header)]
        return _Layout({name: named[name] for name in _KEYS}, None, _time_unit(pa.array(times, pa.string())))
    if len(cells[0]) != 4 or any(name in cells[0] for name in ("rating", "timestamp")):
        raise ValueError(
            f"{path}: its first line is {lines[0][:80]!r}; an Amazon rating file has user, item, rating and timestamp, "
            "or a header with user_id, parent_asin, rating, timestamp. Give such a file, or use --source table"
        )
    rows = [row for row in cells if len(row) == 4]
    names = list(_KEYS) if _users_are_first(rows, item_file) else ["item", "user", "rating", "timestamp"]
    return _Layout({name: name for name in _KEYS}, names, _time_unit(pa.array([row[3] for row in rows], pa.string())))


def _users_are_first(rows: list[list[str]], item_file: Path) -> bool:
    """True for the column order of 2014: decided by the form of the ids, or else by the ids of the metadata."""
    of_item = [sum(_ITEM_ID.fullmatch(row[column]) is not None for row in rows) for column in (0, 1)]
    if of_item[0] == of_item[1]:
        with Utf8File(item_file) as file:
            lines = islice(text_lines(item_file, file), 20 * _SAMPLE_ROWS)
            known = {_item_id(parse_record(line, item_file, row)) for row, line in lines}
        of_item = [sum(row[column] in known for row in rows) for column in (0, 1)]
    return of_item[0] <= of_item[1]


def _time_unit(times: pa.Array) -> str:
    number = parse_float(times)
    number = number[~np.isnan(number)]
    return "milliseconds" if len(number) and np.median(number) > _MILLISECONDS_FROM else "seconds"


def _read_ratings(path: Path, layout: _Layout) -> Iterator[tuple[np.ndarray, pa.Table, int, str]]:
    assert layout.columns is not None
    for chunk in read_csv(path, list(layout.columns.values()), Format(separator=",", header=layout.names)):
        table = chunk.table.select(list(layout.columns.values())).rename_columns(list(layout.columns))
        yield chunk.rows, table, chunk.size, chunk.dialect


def _read_reviews(path: Path) -> Iterator[tuple[np.ndarray, pa.Table, int, str]]:
    for rows, records, size in _records(path):
        columns = {}
        for name, keys in _KEYS.items():
            found = (next((record[key] for key in keys if record.get(key) is not None), None) for record in records)
            columns[name] = pa.array([None if value is None else str(value) for value in found], pa.string())
        yield np.array(rows, np.int64), pa.table(columns), size, "JSON lines"


def _records(path: Path) -> Iterator[tuple[list[int], list[dict[str, Any]], int]]:
    """Yield (row numbers, records, number of bytes read) in chunks of lines."""
    rows: list[int] = []
    records: list[dict[str, Any]] = []
    done = 0
    with Utf8File(path) as file:
        for row, line in text_lines(path, file):
            rows.append(row)
            records.append(parse_record(line, path, row))
            if len(rows) == _ROWS_PER_CHUNK:
                yield rows, records, file.tell() - done
                rows, records, done = [], [], file.tell()
    if rows:
        yield rows, records, path.stat().st_size - done


def _item_id(record: dict[str, Any]) -> str | None:
    """Id of the item that reviews refer to; in the 2023 edition the parent product of all variants."""
    found = record.get("parent_asin") or record.get("asin")
    return None if found is None else str(found)


def _items(path: Path, html: str) -> Iterator[Chunk]:
    for rows, records, size in _records(path):
        items = []
        for row, record in zip(rows, records, strict=True):
            with error_location(f"{path}, row {row}", "fetch it again"):
                items.append(_fields(record, html))
        yield Chunk(path, _item_table(path, rows, items), size, "JSON lines" + "; without HTML" * (html == "clean"))


def _fields(record: dict[str, Any], html: str) -> tuple[str | None, str, str, list[str]]:
    """(raw id, title, description, categories); `description` and `categories` are lists in some editions."""
    categories = _flat(record.get("categories", record.get("category")))
    title, description = (" ".join(_flat(record.get(key))) for key in ("title", "description"))
    if html == "clean":
        title, description = without_html(title), without_html(description)
        categories = [plain for category in categories if (plain := without_html(category))]
    return _item_id(record), title, description, list(dict.fromkeys(categories))


def _flat(value: Any) -> list[str]:
    """The texts in a value that is a text, a list of texts, a list of lists of texts, or None."""
    if isinstance(value, list | tuple):
        return [text for part in value for text in _flat(part)]
    return [str(value)] if value is not None and str(value).strip() else []


def _item_table(path: Path, rows: list[int], items: list[tuple[str | None, str, str, list[str]]]) -> pa.Table:
    ids, titles, descriptions, categories = zip(*items, strict=True)
    # JSON's "\ud800" gives half of a surrogate pair, which Arrow cannot encode as UTF-8.
    with error_location(f"{path}, rows {rows[0]}..{rows[-1]}", "fetch it again"):
        return pa.table(
            {
                "raw_item_id": pa.array(ids, pa.string()),
                "title": pa.array(titles, pa.string()),
                "description": pa.array(descriptions, pa.string()),
                "feature_categories": pa.array(categories, pa.list_(pa.string())),
                "row": np.array(rows, np.int64),
            }
        )
