"""Fuzz: files of predictions (CSV, Parquet) of `hllm evaluate --predictions`."""

import contextlib
import io
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from hypothesis import example, given
from hypothesis import strategies as st

from hllm_torchrec.launch.evaluate import build_parser, run
from tests.fuzz.mutations import FEW, Target, byte_changes, change_bytes, check_reader
from tests.helpers import fixtures

FILES = ("rows.csv", "rows.parquet", "own/part-00000.parquet")
COLUMNS = (
    "label", "score", "probability", "user_id", "item_id", "timestamp", "history_length", "item_is_cold", "weight",
)  # fmt: skip
CELLS = (
    None, "", "-1", "0", "2", "nan", "inf", "-inf", "1e-320", "1e400", "9223372036854775808", "-9223372036854775808",
    "1400000000000", "true", "x" * 100_000, "\x00", "👩‍👩‍👧", "\u202e", "1,2", '"',
)  # fmt: skip
TYPES = (
    pa.int64(), pa.uint64(), pa.float16(), pa.float64(), pa.string(), pa.binary(), pa.bool_(), pa.timestamp("ns"),
    pa.list_(pa.float32()), pa.dictionary(pa.int32(), pa.string()), pa.null(), pa.decimal128(38, 10),
)  # fmt: skip


@cache
def good() -> tuple[Path, dict[str, bytes], pa.Table]:
    """A folder with the same rows as CSV, Parquet and as a run writes them; their bytes; the rows."""
    folder, rng, n = fixtures.folder() / "fuzz-predictions", np.random.default_rng(0), 60
    (folder / "own").mkdir(parents=True)
    score = rng.normal(size=n).astype(np.float32)
    table = pa.table(
        {
            "label": (rng.random(n) < 0.4).astype(np.float32),
            "score": score,
            "probability": 1 / (1 + np.exp(-score)),
            "user_id": rng.integers(0, 9, n),
            "item_id": rng.integers(0, 30, n),
            "timestamp": 1_400_000_000 + np.arange(n),
            "history_length": rng.integers(0, 80, n),
            "item_is_cold": rng.random(n) < 0.2,
            "weight": np.ones(n),
        }
    )
    pa.csv.write_csv(table, folder / FILES[0])
    pq.write_table(table, folder / FILES[1], row_group_size=25)
    own = table.drop_columns(["weight"]).add_column(0, "position", pa.array(np.arange(n)))
    pq.write_table(own, folder / FILES[2])
    return folder, {name: (folder / name).read_bytes() for name in FILES}, table


def check(mutation: Any) -> None:
    folder, whole, rows = good()
    for name, data in whole.items():
        (folder / name).write_bytes(data)
    kind, name, *rest = mutation
    if kind == "bytes":
        (folder / name).write_bytes(change_bytes(whole[name], rest[0]))
    elif kind == "type":
        table = pq.read_table(folder / name)
        column = rest[0] if rest[0] in table.column_names else "label"
        at = table.column_names.index(column)
        pq.write_table(table.set_column(at, column, _as(table[column], rest[1])), folder / name)
    elif kind == "cell":
        column, row, cell = rest
        table = rows.set_column(
            COLUMNS.index(column), column, _with(rows[column].cast(pa.string()).to_pylist(), row, cell)
        )
        pa.csv.write_csv(table, folder / "rows.csv")
    named = folder / name if name != FILES[2] else folder / "own"
    check_reader(lambda: use(named), [str(folder), "label", "gate"])


def _with(cells: list[Any], row: int, cell: Any) -> pa.Array:
    cells[row] = cell
    return pa.array(cells, pa.string())


def _as(values: pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
    try:
        return values.combine_chunks().cast(kind, safe=False)
    except pa.ArrowException:
        return pa.nulls(len(values), kind)


def use(path: Path) -> None:
    """Measure the predictions, as the command does, without writing anything."""
    args = build_parser().parse_args(["--predictions", f"model={path}", "--draws", "0", "--no-tensorboard"])
    args.output = None
    with contextlib.redirect_stdout(io.StringIO()):
        run(args)


TARGET = Target(
    "predictions",
    st.one_of(
        st.tuples(st.just("bytes"), st.sampled_from(FILES), byte_changes()),
        st.tuples(st.just("type"), st.sampled_from(FILES[1:]), st.sampled_from(COLUMNS), st.sampled_from(TYPES)),
        st.tuples(
            st.just("cell"), st.just("rows.csv"), st.sampled_from(COLUMNS), st.integers(0, 59), st.sampled_from(CELLS)
        ),
    ),
    check,
)


@FEW
@example(("bytes", "rows.parquet", [("cut", 0.5, 1)]))
@example(("bytes", "own/part-00000.parquet", [("cut", 0.5, 1)]))
@example(("bytes", "rows.csv", [("cut", 0.0, 1)]))
@example(("bytes", "rows.csv", [("set", 0.5, 255)]))
@example(("type", "rows.parquet", "user_id", pa.list_(pa.float32())))
@example(("type", "rows.parquet", "user_id", pa.uint64()))
@example(("type", "rows.parquet", "timestamp", pa.string()))
@example(("type", "own/part-00000.parquet", "label", pa.string()))
@example(("cell", "rows.csv", "timestamp", 3, "1e400"))
@example(("cell", "rows.csv", "item_is_cold", 3, "x"))
@example(("bytes", "rows.csv", [("flip", 0.0, 229)]))
@example(("cell", "rows.csv", "weight", 14, "1e400"))
@given(TARGET.inputs)
def test_predictions_are_measured_or_refused_by_file_and_row(mutation: Any) -> None:
    assert "RANK" not in os.environ
    check(mutation)


def test_what_is_not_mutated_is_measured() -> None:
    check(("nothing", FILES[0]))
    for path in ("rows.csv", "rows.parquet", "own"):
        assert check_reader(lambda path=path: use(good()[0] / path), [])
