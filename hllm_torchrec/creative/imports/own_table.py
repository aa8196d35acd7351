"""Reader of a table of your own (Parquet, JSON lines, or text with a header): columns of a table of creatives.

    raw_user_id, raw_item_id, response                              needed
    timestamp, source, description, profile, weight, origin, part   may be missing

timestamp: seconds UTC. part: train, valid or test, the same in all rows of a user; else users are drawn.
"""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hllm_torchrec.common.text_files import Utf8File
from hllm_torchrec.data.creative_table import NEEDED, SCHEMA, dense_ids
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.sources.columnar import parse_record, read_columns, text_lines
from hllm_torchrec.data.sources.values import as_id_strings, as_texts, parse_float, parse_seconds
from hllm_torchrec.data.split import SPLITS
from hllm_torchrec.data.validation import error_location
from hllm_torchrec.evaluation.prediction_files import column_names

_PART = "part"
_LATEST = 4_102_444_800
"""2100."""
_UNREADABLE = -1
"""Stands for a timestamp or weight that is no number."""
UNKNOWN_USER, UNKNOWN_ITEM, EMPTY, WRONG = "unknown user", "unknown item", "empty text", "wrong timestamp or weight"


def read_own_table(paths: Sequence[Path]) -> pa.Table:
    """The rows of files, in the types of `SCHEMA`, with `part` if a file has it.

    Raises:
        ValueError: a file is damaged, or lacks a needed column.
    """
    tables = []
    for path in paths:
        names = _names(path)
        wanted = [*NEEDED, *(name for name in (*SCHEMA.names, _PART) if name in names and name not in NEEDED)]
        for _, table, *_ in read_columns(path, wanted):
            with error_location(path, "give a table with a text in each row"):
                tables.append(pa.table({name: _column(name, table[name]) for name in wanted}))
    if not tables:
        raise ValueError(f"{paths[0]}: has no rows; give a table with a text in each row")
    return pa.concat_tables(tables, promote_options="default")


def _names(path: Path) -> list[str]:
    with Utf8File(path) as file:
        if not file.read(1).lstrip().startswith(b"{"):
            return column_names(path, NEEDED)
    with Utf8File(path) as file:  # the first lines have every key that some line has, as `read_columns` demands
        first = islice(text_lines(path, file), 10_000)
        return list(dict.fromkeys(key for row, line in first for key in parse_record(line, path, row)))


def _column(name: str, values: pa.ChunkedArray) -> pa.Array:
    if name.endswith("_id"):
        return as_id_strings(values, name.split("_")[1])
    if name not in ("timestamp", "weight"):
        return as_texts(values)
    texts = as_texts(values)
    given = pc.fill_null(pc.not_equal(pc.utf8_trim_whitespace(texts), ""), False)
    if name == "timestamp":
        numbers = parse_seconds(values, "seconds")
    else:
        floats = parse_float(values)
        numbers = pa.array(floats.astype(np.float32), mask=np.isnan(floats))
    # What is there but no number must not become "no timestamp", which sees all events.
    wrong = pc.and_(given, pc.is_null(numbers))
    return pc.if_else(wrong, pa.scalar(_UNREADABLE, numbers.type), numbers)


def reasons_of(rows: pa.Table, dataset: Dataset) -> list[str]:
    """For each row the reason to leave it out, or ""."""
    found = np.full(len(rows), "", object)
    for name, reason in (("raw_user_id", UNKNOWN_USER), ("raw_item_id", UNKNOWN_ITEM)):
        known = (dataset.users if "user" in name else dataset.items)[name].cast(pa.string()).combine_chunks()
        found[~pc.is_in(rows[name], value_set=known).to_numpy(zero_copy_only=False)] = reason
    texts = rows["response"].to_pylist()
    found[[not (text or "").strip() for text in texts]] = EMPTY
    for name in ("timestamp", "weight"):
        if name in rows.column_names:
            values = pc.fill_null(rows[name], 0).to_numpy().astype(np.float64)
            found[~((values >= 0) & (values < _LATEST))] = WRONG
    return found.tolist()


def check_rows(rows: pa.Table, reasons: Sequence[str], dataset: Dataset) -> None:
    """Raise ValueError naming the first row that cannot be used."""
    for kind, reason in (("user", UNKNOWN_USER), ("item", UNKNOWN_ITEM)):
        if reason in reasons:
            dense_ids(rows[f"raw_{kind}_id"], dataset, kind, "--files")  # names the row, and the nearest id
    for row, reason in enumerate(reasons):
        if reason:
            raise ValueError(f"--files, row {row}: {reason}; correct it, or leave such rows out by --drop-bad")


def parts_of(rows: pa.Table, drawn: Sequence[str]) -> list[str]:
    """Part of each row: its own, or the drawn one. Raises ValueError for another word."""
    if _PART not in rows.column_names:
        return list(drawn)
    own = rows[_PART].to_pylist()
    for row, part in enumerate(own):
        if part is not None and part not in SPLITS:
            raise ValueError(f"--files, row {row}: part {part!r}: must be one of {', '.join(SPLITS)}")
    return [part or other for part, other in zip(own, drawn, strict=True)]


def unseen_rows(rows: pa.Table, dataset: Dataset) -> int:
    """Number of rows that see no event: their users are as unknown to a model as new ones."""
    if "timestamp" not in rows.column_names:
        return 0
    users = dense_ids(rows["raw_user_id"], dataset, "user", "--files")
    times = rows["timestamp"].to_pylist()
    first: dict[int, int | None] = {}
    for user in np.unique(users).tolist():
        events = dataset.user_events(user)
        first[user] = int(events.timestamps[0]) if len(events) else None
    return sum(
        first[user] is None or (second is not None and second <= first[user])
        for user, second in zip(users.tolist(), times, strict=True)
    )
