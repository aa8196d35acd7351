"""Fuzz: a user's own tables (CSV and Parquet) and their YAML mapping, through `prepare`."""

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from hllm_torchrec.data.bad_rows import BadRows
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.sources.table_mapping import table
from tests.fuzz.mutations import FEWER, Target, byte_changes, change_bytes, check_reader, edit, edits
from tests.helpers import fixtures

FILES = ("events.csv", "items.csv", "users.csv", "events.parquet", "items.parquet")
CELLS = (
    None, "", " ", "-1", "0", "1.5", "nan", "inf", "1e400", "1400000000000", "-86400", "4102444800",
    "9223372036854775808", "u1\x00", "\u202e\u200b", "👩‍👩‍👧", "x" * 100_000, '"', "a,b", "1\n2",
)  # fmt: skip
ELSEWHERE = "/etc/passwd"
"""A file that a changed mapping may name."""
TYPES = (pa.int64(), pa.float64(), pa.bool_(), pa.binary(), pa.timestamp("ns"), pa.list_(pa.string()), pa.date32())
LENIENT = BadRows("drop", "drop", "drop", "drop", "drop", "drop", "drop")


@cache
def good() -> tuple[Path, dict[str, Any], dict[str, bytes]]:
    """The shop's folder with its tables as CSV and as Parquet, its mapping, and the files' bytes."""
    folder = fixtures.folder() / "fuzz-sources"
    mapping = yaml.safe_load(fixtures.write_shop(folder).read_text())
    for name in ("events", "items"):
        pq.write_table(pa.csv.read_csv(folder / f"{name}.csv"), folder / f"{name}.parquet")
    return folder, mapping, {name: (folder / name).read_bytes() for name in FILES}


def check(mutation: Any) -> None:
    folder, mapping, whole = good()
    for name, data in whole.items():
        (folder / name).write_bytes(data)
    kind, lenient, *rest = mutation
    document = mapping
    match kind, *rest:
        case ("mapping", changes):
            document = edit(mapping, changes)
        case ("bytes", name, changes):
            (folder / name).write_bytes(change_bytes(whole[name], changes))
        case ("cell", name, column, row, cell):
            rows = pa.csv.read_csv(folder / f"{name}.csv", convert_options=_TEXT).to_pylist()
            rows[row % len(rows)][list(rows[0])[column % len(rows[0])]] = cell
            pa.csv.write_csv(pa.Table.from_pylist(rows), folder / f"{name}.csv")
        case ("type", name, column, arrow):
            whole_table = pq.read_table(folder / f"{name}.parquet")
            at = column % whole_table.num_columns
            field = whole_table.column_names[at]
            new = whole_table.set_column(at, field, _as(whole_table[field], arrow))
            pq.write_table(new, folder / f"{name}.parquet")
    parquet = kind == "type" or (kind == "bytes" and rest[0].endswith(".parquet"))
    if parquet:
        document = document | {key: mapping[key] | {"path": f"{key}.parquet"} for key in ("events", "items")}
    path = folder / "mapping.yaml"
    path.write_bytes(yaml.safe_dump(document, allow_unicode=False).encode())
    check_reader(lambda: use(path, lenient), [str(folder), "tiny-shop", "split", "no item is left", ELSEWHERE])


_TEXT = pa.csv.ConvertOptions(
    column_types=dict.fromkeys(
        ("customer", "sku", "second", "rating", "kind", "title", "brand", "genres"), pa.string()
    ),
    strings_can_be_null=False,
)


def _as(values: pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
    try:
        return values.combine_chunks().cast(kind, safe=False)
    except pa.ArrowException:
        return pa.nulls(len(values), kind)


def use(path: Path, lenient: bool) -> None:
    """Prepare a dataset, and open it."""
    output = path.with_name("prepared")
    shutil.rmtree(output, ignore_errors=True)
    Dataset.open(prepare(table(path), output, policy=LENIENT if lenient else None)).items  # noqa: B018


TARGET = Target(
    "sources",
    st.one_of(
        st.tuples(st.just("mapping"), st.booleans(), edits()),
        st.tuples(st.just("bytes"), st.booleans(), st.sampled_from(FILES), byte_changes()),
        st.tuples(
            st.just("cell"),
            st.booleans(),
            st.sampled_from(("events", "items", "users")),
            st.integers(0, 9),
            st.integers(0, 500),
            st.sampled_from(CELLS),
        ),
        st.tuples(
            st.just("type"), st.booleans(), st.sampled_from(("events", "items")), st.integers(0, 9),
            st.sampled_from(TYPES),
        ),
    ),
    check,
)  # fmt: skip


@pytest.mark.slow
@FEWER
@example(("bytes", False, "events.parquet", [("cut", 0.5, 1)]))
@example(("cell", False, "events", 2, 5, "1400000000000"))
@example(("cell", False, "events", 2, 5, "-86400"))
@example(("cell", False, "events", 6, 418, "x" * 100_000))
@example(("cell", False, "events", 4, 72, "x" * 100_000))
@example(("cell", True, "events", 1, 202, "0"))
@example(("mapping", True, [([23, 16, 11], "set", ELSEWHERE)]))
@example(("type", False, "events", 3, pa.list_(pa.string())))
@given(TARGET.inputs)
def test_tables_are_prepared_or_refused_by_file_and_row(mutation: Any) -> None:
    check(mutation)
