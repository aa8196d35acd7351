"""Amazon product reviews of 2014, for example Books: `ratings_Books.csv` and `meta_Books.json.gz`.

Ratings: `user,item,rating,timestamp` without a header. Metadata: one product per line, as JSON or as the Python
literal of the published files (read with `ast.literal_eval`, which executes no code). Label: rating >= 4. Action:
the rating, 1..5. Text: title, description. Items and users are filtered by a 5-core; an item without metadata stays,
without text, as in the published protocol.
"""

import ast
import gzip
import json
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from hllm_torchrec.data.bad_rows import BadRows
from hllm_torchrec.data.sources.base import (
    Chunk,
    Source,
    event_table,
    parse_seconds,
    rating_labels,
    require_files,
)
from hllm_torchrec.data.sources.columnar import read_csv
from hllm_torchrec.data.validation import error_location

_RATING_COLUMNS = ["user", "item", "rating", "timestamp"]
_ROWS_PER_CHUNK = 16_384
POLICY = BadRows(unknown_item="keep", duplicate_item="drop")


def amazon(ratings: str | Path, metadata: str | Path) -> Source:
    """One category of the Amazon reviews: its rating file and its metadata file (`.json` or `.json.gz`)."""
    event_file, item_file = Path(ratings), Path(metadata)
    require_files([event_file, item_file], "Amazon reviews")
    return Source(
        name="amazon-" + event_file.stem.removeprefix("ratings_").lower(),
        event_files=(event_file,),
        other_files=(item_file,),
        events=partial(_events, event_file),
        items=partial(_items, item_file),
        text_columns=("title", "description"),
        item_features=("categories",),
        label_rule="rating >= 4",
        action_names={rating: f"rating {rating}" for rating in range(1, 6)},
        keep_items_without_events=False,
        min_events=5,
        policy=POLICY,
        license_note="Amazon review data (c) J. McAuley, UCSD: for research; cite its papers.",
    )


def _events(path: Path) -> Iterator[Chunk]:
    for rows, table, size in read_csv(path, _RATING_COLUMNS, names=_RATING_COLUMNS):
        time = table["timestamp"].combine_chunks()
        label, action = rating_labels(table["rating"])
        seconds = parse_seconds(time, "seconds")
        yield Chunk(path, event_table(rows, table["user"], table["item"], seconds, time, label, action), size)


def _items(path: Path) -> Iterator[Chunk]:
    rows: list[int] = []
    items: list[tuple[str | None, str, str, list[str]]] = []
    done = 0
    with path.open("rb") as raw:
        for row, line in _lines(path, raw):
            rows.append(row)
            with error_location(f"{path}, row {row}", "fetch it again"):
                items.append(_fields(parse_record(line, path, row)))
            if len(rows) == _ROWS_PER_CHUNK:
                yield Chunk(path, _item_table(path, rows, items), raw.tell() - done)
                rows, items, done = [], [], raw.tell()
    if rows:
        yield Chunk(path, _item_table(path, rows, items), path.stat().st_size - done)


def _lines(path: Path, raw: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank with their numbers from 1. Raises ValueError for a damaged gzip file."""
    row = 0
    try:
        for row, line in enumerate(gzip.open(raw) if path.suffix == ".gz" else raw, start=1):
            if line.strip():
                yield row, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}, after row {row}: {error}. The file is damaged: fetch it again") from error


def parse_record(line: bytes, path: Path, row: int) -> dict[str, Any]:
    """Parse one line, JSON or a Python literal, as a dict. Raises ValueError naming file and row if it is neither."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        try:
            record = ast.literal_eval(line.decode("utf-8").strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise ValueError(
                f"{path}, row {row}: neither JSON nor a Python literal ({error}); fetch it again"
            ) from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}, row {row}: a {type(record).__name__}, expected a dict with asin, title, ...")
    return record


def _fields(record: dict[str, Any]) -> tuple[str | None, str, str, list[str]]:
    """(raw id, title, description, categories); `description` and `categories` are lists in some editions."""
    asin = record.get("asin")
    categories = _flat(record.get("categories", record.get("category")))
    title, description = (" ".join(_flat(record.get(key))) for key in ("title", "description"))
    return None if asin is None else str(asin), title, description, list(dict.fromkeys(categories))


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
