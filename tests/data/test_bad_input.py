"""Dirty data: what is allowed comes through unchanged, what is not is named by file, row group or row, and field."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from hllm_torchrec.data.bad_rows import MAX_SECOND
from hllm_torchrec.data.batch_spec import BatchSpec
from hllm_torchrec.data.collate import Collator
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.item_factors import item_vectors
from hllm_torchrec.data.loader import Loader, LoaderSpec
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.sources.table_mapping import table
from hllm_torchrec.data.token_store import TokenStore, build_token_store
from hllm_torchrec.store import EmbeddingStore
from tests.helpers import fixtures

PART = "sequences/train/part-00000.parquet"
UNICODE = (
    "👩‍👩‍👧 family",
    "שלום עולם",
    "\u202eright to left",
    "zero\u200bwidth",
    "nul\x00inside",
    "é e\u0301",
    "ﷺ",
    "𝒳",
)


def shop(
    folder: Path, events: list[tuple[Any, Any, Any, Any]], items: list[tuple[Any, str]], unit: str = "seconds"
) -> Path:
    """A mapping of Parquet tables of (user, item, time, label) and (item, title)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows, columns in (("events", events, "utyl"), ("items", items, "ix")):
        data = {column: _column([row[i] for row in rows]) for i, column in enumerate(columns)}
        pq.write_table(pa.table(data), folder / f"{name}.parquet")
    described = {"path": "events.parquet", "user": "u", "item": "t", "time": "y", "label": "l", "time_unit": unit}
    mapping = {"name": "dirty", "events": described}
    mapping["items"] = {"path": "items.parquet", "item": "i", "text": ["x"]}
    (folder / "mapping.yaml").write_text(yaml.safe_dump(mapping))
    return folder / "mapping.yaml"


def _column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except OverflowError:
        return pa.array(values, pa.uint64())


def prepared(folder: Path, events: list[Any], items: list[Any], unit: str = "seconds") -> Dataset:
    return Dataset.open(prepare(table(shop(folder, events, items, unit)), folder / "out"))


def plain(count: int = 20, **changes: Any) -> list[Any]:
    """Events of one user and ten items, the fourth changed."""
    names = ("user", "item", "time", "label")
    rows = [("u", f"i{n % 10}", 1_400_000_000 + n, float(n % 2)) for n in range(count)]
    rows[3] = tuple(changes.get(name, value) for name, value in zip(names, rows[3], strict=True))
    return rows


ITEMS = [(f"i{n}", f"title {n}") for n in range(10)]


# --- sources ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"time": 1_400_000_000_000},
            r"row 4: the time '1400000000000' is beyond 2099.*looks like milliseconds.*Set the",
        ),
        ({"time": -1}, r"row 4: the time '-1' \(second -1\) is outside 1970-01-01\.\.2099-12-31 UTC.*bad_time=drop"),
        ({"time": MAX_SECOND + 1}, r"row 4: the time '4102444800' is beyond 2099"),
        ({"time": None}, r"row 4: the time None is not a number or date of the stated unit"),
        ({"label": 0.5}, r"row 4: the label \(l, 0 or 1\) is not a number in its range.*nan_label=drop"),
        ({"label": -1.0}, r"row 4: the label .*is not a number in its range"),
        ({"label": float("nan")}, r"row 4: the label .*is not a number in its range"),
        ({"label": float("inf")}, r"row 4: the label .*is not a number in its range"),
        ({"item": "i10"}, r"row 4: item 'i10' is not in the item file.*unknown_item=drop"),
        ({"user": " "}, r"row 4: the user id or the item id is missing"),
    ],
)
def test_a_bad_event_is_named_by_file_and_row(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"events\.parquet, {message}"):
        prepared(tmp_path, plain(**changes), ITEMS)
    assert not (tmp_path / "out").exists()


def test_the_first_and_the_last_second_are_times(tmp_path: Path) -> None:
    events = [("u", f"i{n % 10}", second, 1.0) for n, second in enumerate([0, *range(1, 19), MAX_SECOND])]
    data = prepared(tmp_path, events, ITEMS)
    times = [t for g in data.row_groups("test") for t in data.read_row_group(g.path, g.index)["timestamps"][0].as_py()]
    assert times[0] == 0 and times[-1] == MAX_SECOND


def test_ids_of_any_integer_are_text(tmp_path: Path) -> None:
    numbers = np.array([0, 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1], np.uint64)
    events = [(int(numbers[n % 6]), int(numbers[n % 6]), 1_400_000_000 + n, 1.0) for n in range(24)]
    data = prepared(tmp_path, events, [(int(n), f"title {n}") for n in numbers])
    assert sorted(data.items["raw_item_id"].to_pylist()) == sorted(str(n) for n in numbers)
    below = prepared(tmp_path / "below", [(-1, -(2**63), 1_400_000_000 + n, 1.0) for n in range(20)], [(-(2**63), "x")])
    assert below.items["raw_item_id"].to_pylist() == ["-9223372036854775808"]
    assert below.users["raw_user_id"].to_pylist() == ["-1"]


def test_unicode_comes_through_unchanged(tmp_path: Path) -> None:
    events = [(UNICODE[n % 8], UNICODE[n % 8], 1_400_000_000 + n, 1.0) for n in range(24)]
    data = prepared(tmp_path, events, [(text, text) for text in UNICODE])
    assert sorted(data.items["raw_item_id"].to_pylist()) == sorted(UNICODE)
    assert data.text(["x"])["x"].to_pylist() == data.items["raw_item_id"].to_pylist()
    assert sorted(data.users["raw_user_id"].to_pylist()) == sorted(UNICODE)
    store = EmbeddingStore.create(tmp_path / "s", 1, "fp32")
    with store.writer() as writer:
        writer.upsert(list(UNICODE), torch.arange(8.0)[:, None])
        writer.commit()
    assert store.snapshot().gather(list(UNICODE))[0].flatten().tolist() == list(range(8))


def test_half_a_surrogate_pair_is_no_text(tmp_path: Path) -> None:
    mapping = fixtures.write_shop(tmp_path)
    whole = (tmp_path / "items.csv").read_bytes()
    (tmp_path / "items.csv").write_bytes(whole.replace(b"s5", b"\xed\xa0\x80"))
    with pytest.raises(ValueError, match=r"items\.csv, after row 1: .*invalid UTF8.*fetch it again"):
        prepare(table(mapping), tmp_path / "out")


def test_a_history_of_100_000_events_and_a_text_of_a_million_characters(tmp_path: Path) -> None:
    events = [("u", f"i{n % 10}", 1_400_000_000 + n // 3, float(n % 2)) for n in range(100_000)]
    data = prepared(tmp_path, events, [*ITEMS[:9], ("i9", "word1 " * 170_000)])
    collator = Collator(data, BatchSpec(fusion="late", item_id=True, action=False), 0, True)
    loader = Loader(data, collator, LoaderSpec("train", batch_users=1, max_history=1000, prefetch=0))
    assert len(loader.pieces) >= 159  # every exposure, each seeing 500 events at least
    batch = next(loader.batches(0, first_step=100))
    assert 0 < int(batch.seq_offsets[-1]) <= 1000
    store = TokenStore.open(build_token_store(data, fixtures.tokenizer_dir(), keys=["x"], max_text_length=12))
    assert store.lengths.max() == 12


# --- a dataset's files -----------------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return shutil.copytree(fixtures.dataset().root, tmp_path / "d")


def rewrite(root: Path, change: Callable[[list[dict[str, Any]]], Any]) -> Dataset:
    """The dataset with the rows of its first file changed, in row groups of two."""
    rows = pq.read_table(root / PART)
    changed = rows.to_pylist()
    change(changed)
    pq.write_table(pa.Table.from_pylist(changed, rows.schema), root / PART, row_group_size=2)
    return Dataset(root, fixtures.dataset().manifest)


def put(row: int, name: str, value: Any, place: int | None = None) -> Callable[[list[dict[str, Any]]], None]:
    def change(rows: list[dict[str, Any]]) -> None:
        if place is None:
            rows[row][name] = value
        else:
            rows[row][name][place] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(3, "item_ids", 41, 0), r"row 1: item_ids\[0\] is 41; the dataset's items have the ids 0\.\.40"),
        (put(3, "item_ids", -5, 1), r"row 1: item_ids\[1\] is -5"),
        (put(3, "item_ids", 2**63 - 1, 0), r"row 1: item_ids\[0\] is 9223372036854775807"),
        (put(2, "user_id", 10**6), r"row 0: user_id is 1000000; it must lie in 0\.\.\d+"),
        (put(2, "user_id", -1), r"row 0: user_id is -1"),
        (put(2, "user_id", None), r"row 0: user_id is null"),
        (put(3, "timestamps", 1_400_000_000_000, 0), r"row 1: timestamps\[0\] is 14\d+; .*it looks like milliseconds"),
        (put(3, "timestamps", -1, 0), r"row 1: timestamps\[0\] is -1; .*outside 1970-01-01\.\.2099-12-31"),
        (put(3, "timestamps", MAX_SECOND, 0), r"row 1: timestamps\[1\] is \d+; it is earlier than the one before"),
        (put(3, "labels", 0.5, 0), r"row 1: labels\[0\] is 0\.5; a label is 0 or 1, or null"),
        (put(3, "labels", float("nan"), 0), r"row 1: labels\[0\] is nan"),
        (put(3, "labels", float("inf"), 0), r"row 1: labels\[0\] is inf"),
        (put(3, "actions", 7, 0), r"row 1: actions\[0\] is 7; the dataset's actions have the ids 0\.\.6"),
        (put(3, "item_ids", None, 0), r"row 1: item_ids\[0\] is nan; it must not be null"),
        (put(3, "item_ids", None), r"row 1: item_ids is null"),
        (put(3, "labels", [1.0]), r"row 1: labels has 1 events, item_ids has \d+"),
        (put(3, "target_start", 10**6), r"row 1: target_start is 1000000; it is beyond the row's events"),
    ],
)
def test_a_bad_value_is_named_by_file_row_group_row_and_field(
    change: Callable[[list[dict[str, Any]]], None], message: str, copied: Path
) -> None:
    data = rewrite(copied, change)
    group = data.row_groups("train")[1]
    with pytest.raises(ValueError, match=rf"part-00000\.parquet, row group 1, {message}.*; prepare the dataset again"):
        data.read_row_group(group.path, group.index)
    data.read_row_group(group.path, 0)  # the others are as they were


def test_a_row_without_events_is_read_and_brings_none(copied: Path) -> None:
    def empty(rows: list[dict[str, Any]]) -> None:
        rows[2] |= {"target_start": 0, "item_ids": [], "timestamps": [], "labels": [], "actions": []}

    data = rewrite(copied, empty)
    collator = Collator(data, fixtures.recipe(fixtures.config()), 0, True)
    loader = Loader(data, collator, LoaderSpec("train", batch_users=4, max_history=100, prefetch=0))
    before = Loader(fixtures.dataset(), collator, LoaderSpec("train", batch_users=4, max_history=100, prefetch=0))
    lost = len(pq.read_table(fixtures.dataset().root / PART)["item_ids"][2])
    assert int(loader.pieces.lengths.sum()) == int(before.pieces.lengths.sum()) - lost
    assert sum(batch.user_ids.numel() for batch in loader.batches(0)) == len(loader.pieces)


def test_wrong_types_and_missing_columns_are_named(copied: Path) -> None:
    rows = pq.read_table(copied / PART)
    data = Dataset(copied, fixtures.dataset().manifest)
    at = rows.column_names.index("item_ids")
    wrong = rows.set_column(at, "item_ids", rows["item_ids"].cast(pa.list_(pa.float64())))
    pq.write_table(wrong, copied / PART)
    with pytest.raises(ValueError, match=r"row group 0: column item_ids is list<.*double>, it must be list<.*int64>"):
        data.read_row_group(copied / PART, 0)
    pq.write_table(rows.drop_columns(["labels"]), copied / PART)
    with pytest.raises(ValueError, match=r"row group 0 cannot be read \(no column labels; it has user_id, "):
        data.read_row_group(copied / PART, 0)
    (copied / PART).write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"part-00000\.parquet, row group 0 cannot be read"):
        data.read_row_group(copied / PART, 0)


def test_tables_of_another_length_or_order_are_named(copied: Path) -> None:
    items = pq.read_table(copied / "items.parquet")
    data = Dataset(copied, fixtures.dataset().manifest)
    pq.write_table(items.slice(0, 39), copied / "items.parquet")
    with pytest.raises(ValueError, match=r"items\.parquet has 39 rows, the manifest says 40; prepare"):
        len(data.items)
    pq.write_table(items.take([1, 0, *range(2, 40)]), copied / "items.parquet")
    with pytest.raises(ValueError, match=r"items\.parquet, row 0: item_id is 2, it must be 1"):
        len(data.items)
    (copied / "training_item_counts.npy").write_bytes(b"\x93NUMPY\x01\x00")
    with pytest.raises(ValueError, match=r"training_item_counts\.npy cannot be read"):
        data.training_item_counts()
    np.save(copied / "training_item_counts.npy", np.zeros(3, np.int64))
    with pytest.raises(ValueError, match=r"training_item_counts\.npy must be int64 \[41\], no number below 0"):
        data.training_item_counts()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_item_vectors_that_are_not_finite_are_named(value: float, copied: Path) -> None:
    (copied / "vectors").mkdir(exist_ok=True)
    vectors = np.zeros((41, 3), np.float32)
    vectors[7, 1] = value
    np.save(copied / "vectors" / "mine.npy", vectors)
    with pytest.raises(ValueError, match=r"mine\.npy: row 7 is not finite; save a number"):
        item_vectors(Dataset(copied, fixtures.dataset().manifest), "mine")


# --- stores ----------------------------------------------------------------------------------------------


def test_ids_beyond_int64_are_refused_and_those_at_its_ends_are_kept(tmp_path: Path) -> None:
    store = EmbeddingStore.create(tmp_path / "s", 1, "fp32", keys="int64")
    ends = [-(2**63), -1, 0, 2**63 - 1]
    with store.writer() as writer:
        writer.upsert(ends, torch.arange(4.0)[:, None])
        writer.commit()
        for beyond in ([2**63], [2**64], [10**30]):
            with pytest.raises(ValueError, match=r"keys: .*this store's keys are of type int64"):
                writer.upsert(beyond, torch.zeros(1, 1))
    assert store.snapshot().gather(ends)[0].flatten().tolist() == [0, 1, 2, 3]
    for wrong in ([-1], [41], [2**62]):
        with pytest.raises(ValueError, match=r"item id -?\d+ is outside 0\.\.40 of the token store"):
            fixtures.token_store().gather(np.array(wrong))
    with pytest.raises(ValueError, match=r"an item id is beyond int64"):
        fixtures.token_store().gather([2**63])  # type: ignore[arg-type]


def test_facts_of_a_token_store_are_checked(tmp_path: Path) -> None:
    root = shutil.copytree(fixtures.token_store().path, tmp_path / "t")
    facts = json.loads((root / "store.json").read_text())
    (root / "store.json").write_text(json.dumps(facts | {"vocab_size": 3}))
    with pytest.raises(
        ValueError, match=r"values\.arrow: token \d+ is outside 0\.\.2: it is damaged; delete the folder"
    ):
        store = TokenStore.open(root)
        store.gather(np.arange(len(store)))
    (root / "store.json").write_text(json.dumps(facts | {"items": None}))
    with pytest.raises(ValueError, match=r"store\.json: items is 'None', it must be a number from 0 on; delete"):
        TokenStore.open(root)
