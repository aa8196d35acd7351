"""Fuzz: Parquet files of a dataset's sequences and items: bytes, truncation, types and values."""

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.loader import Loader, LoaderSpec
from tests.fuzz.mutations import FEWER, Target, byte_changes, change_bytes, check_reader
from tests.helpers import fixtures

FILES = ("sequences/train/part-00000.parquet", "items.parquet", "users.parquet", "training_item_counts.npy")
COLUMNS = ("user_id", "target_start", "item_ids", "timestamps", "labels", "actions")
SCALARS = (0, -1, 2**31 - 1, 2**62, 1_400_000_000_000, -86_400, 4_102_444_800, float("nan"), float("inf"), 0.5, None)
TYPES = (pa.int64(), pa.int32(), pa.float64(), pa.float32(), pa.string(), pa.bool_(), pa.timestamp("ms"))


@cache
def good() -> tuple[Path, dict[str, bytes], pa.Table]:
    """A copy of the shop's dataset, its files' bytes, and the first row group's sequences."""
    root = fixtures.folder() / "fuzz-sequences"
    shutil.copytree(fixtures.dataset().root, root)
    whole = {name: (root / name).read_bytes() for name in FILES}
    return root, whole, pq.read_table(root / FILES[0]).slice(0, 4)


def use(root: Path) -> None:
    """Read every file as training does: index, rows, batches."""
    data = Dataset(root, fixtures.dataset().manifest)
    collator = fixtures.Collator(data, fixtures.recipe(fixtures.config()), 0, True)
    loader = Loader(data, collator, LoaderSpec("train", batch_users=4, max_history=20, prefetch=0))
    for batch in loader.batches(0):
        assert batch.unique_items.numel() == 0 or int(batch.unique_items.max()) < data.num_items
    len(data.users), data.training_item_counts(), data.text(["title", "brand"])


def damage(mutation: Any) -> None:
    """Write the good files, one of them mutated."""
    root, whole, table = good()
    for name, data in whole.items():
        (root / name).write_bytes(data)
    match mutation:
        case ("bytes", name, changes):
            (root / name).write_bytes(change_bytes(whole[name], changes))
        case ("drop", column):
            pq.write_table(table.drop_columns([column]), root / FILES[0])
        case ("value", column, row, place, value):
            rows = table.to_pylist()
            cell = rows[row][column]
            if isinstance(cell, list) and place is not None:
                cell[place % len(cell)] = value
            else:
                rows[row][column] = value
            pq.write_table(_table(rows, table.schema, column), root / FILES[0])
        case ("type", column, kind):
            at = table.column_names.index(column)
            pq.write_table(table.set_column(at, column, _as(table[column], kind)), root / FILES[0])


def _table(rows: list[dict[str, Any]], schema: pa.Schema, column: str) -> pa.Table:
    """The rows with the column's type, or the type that its values suggest where they do not fit."""
    try:
        return pa.Table.from_pylist(rows, schema)
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        loose = schema.set(schema.get_field_index(column), pa.field(column, pa.string()))
        return pa.Table.from_pylist([row | {column: str(row[column])} for row in rows], loose)


def _as(values: pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
    """The values as another type, in lists where they were; nulls where that cannot be."""
    wanted = pa.list_(kind) if pa.types.is_list(values.type) else kind
    try:
        return values.combine_chunks().cast(wanted, safe=False)
    except pa.ArrowException:
        return pa.nulls(len(values), wanted)


def check(mutation: Any) -> None:
    damage(mutation)
    root = good()[0]
    check_reader(lambda: use(root), [str(root)])


TARGET = Target(
    "sequences",
    st.one_of(
        st.tuples(st.just("bytes"), st.sampled_from(FILES), byte_changes()),
        st.tuples(st.just("drop"), st.sampled_from(COLUMNS)),
        st.tuples(
            st.just("value"),
            st.sampled_from(COLUMNS),
            st.integers(0, 3),
            st.none() | st.integers(0, 40),
            st.sampled_from(SCALARS) | st.integers(-(2**62), 2**62),
        ),
        st.tuples(st.just("type"), st.sampled_from(COLUMNS), st.sampled_from(TYPES)),
    ),
    check,
)


@pytest.mark.slow
@FEWER
@example(("value", "item_ids", 0, 1, 10**6))
@example(("value", "item_ids", 0, 1, -1))
@example(("value", "timestamps", 1, 0, 1_400_000_000_000))
@example(("value", "labels", 1, 0, 0.5))
@example(("value", "actions", 1, 0, 99))
@example(("value", "user_id", 1, None, 10**6))
@example(("value", "target_start", 1, None, 2**31 - 1))
@example(("type", "item_ids", pa.float64()))
@example(("bytes", FILES[0], [("cut", 0.5, 1)]))
@given(TARGET.inputs)
def test_sequences_are_read_or_refused_by_file_row_group_and_row(mutation: Any) -> None:
    check(mutation)


def test_what_is_not_mutated_is_read() -> None:
    damage(())
    assert check_reader(lambda: use(good()[0]), [])
