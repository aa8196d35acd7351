"""Reader of a custom table of personalized texts (Parquet, JSON lines, or text with a header) for a dataset.

    raw_user_id, raw_item_id, response                              required columns
    timestamp, source, description, profile, weight, origin, part   optional columns

timestamp: seconds UTC. part: train, valid or test, the same in all rows of a user; without it, parts are drawn by user.
"""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hllm_torchrec.common.text_files import Utf8File
from hllm_torchrec.common.yaml_files import abbreviate
from hllm_torchrec.data.creative_table import NEEDED, SCHEMA, dense_ids
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.sources.columnar import parse_record, read_columns, text_lines
from hllm_torchrec.data.sources.values import as_id_strings, as_texts, parse_float, parse_seconds
from hllm_torchrec.data.split import SPLITS
from hllm_torchrec.data.validation import error_location
from hllm_torchrec.evaluation.prediction_files import column_names

_PART = "part"
_LATEST = 4_102_444_800
"""First second of 2100; timestamps are earlier."""
_UNREADABLE = -1
"""Replaces timestamps and weights that are not numbers, so that `reasons_of` finds them."""
UNKNOWN_USER, UNKNOWN_ITEM, EMPTY, WRONG = "unknown user", "unknown item", "empty text", "wrong timestamp or weight"


def read_text_table(paths: Sequence[Path]) -> pa.Table:
    """Read the rows of the files, with the types of `SCHEMA`, and with the column `part` if a file has it.

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
    with Utf8File(path) as file:  # `read_columns` requires that the first lines have all keys
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
    # A value that is not a number must not become null, because a row without a timestamp sees all events.
    wrong = pc.and_(given, pc.is_null(numbers))
    return pc.if_else(wrong, pa.scalar(_UNREADABLE, numbers.type), numbers)


def reasons_of(rows: pa.Table, dataset: Dataset) -> list[str]:
    """Return the reason to leave out each row; "" for valid rows."""
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
    """Raise ValueError if a row has a reason; the message names the row."""
    for kind, reason in (("user", UNKNOWN_USER), ("item", UNKNOWN_ITEM)):
        if reason in reasons:
            dense_ids(rows[f"raw_{kind}_id"], dataset, kind, "--files")  # raises, with the row and the most similar id
    for row, reason in enumerate(reasons):
        if reason:
            raise ValueError(f"--files, row {row}: {reason}; correct it, or leave such rows out by --drop-bad")


def parts_of(rows: pa.Table, drawn: Sequence[str]) -> list[str]:
    """Return the part of each row: the column `part` if it has a value, else `drawn`. Raises ValueError if unknown."""
    if _PART not in rows.column_names:
        return list(drawn)
    own = rows[_PART].to_pylist()
    for row, part in enumerate(own):
        if part is not None and part not in SPLITS:
            raise ValueError(f"--files, row {row}: part {abbreviate(part)}: must be one of {', '.join(SPLITS)}")
    return [part or other for part, other in zip(own, drawn, strict=True)]


def unseen_rows(rows: pa.Table, dataset: Dataset) -> int:
    """Count the rows that see no event: their user has none, or their second is not after the user's first event."""
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
