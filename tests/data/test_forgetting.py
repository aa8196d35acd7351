"""Forgetting: a dataset without a user or an item equals one that never had them, in every version, and grows on."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hllm_torchrec.data.append import append_events
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.dataset_compaction import compact
from hllm_torchrec.data.forgetting import Names, forget
from hllm_torchrec.data.item_factors import item_vectors
from hllm_torchrec.data.manifest import listed_files
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.split import Split
from hllm_torchrec.data.versions import kept_versions, remove_superseded, write_lock
from hllm_torchrec.data.vocabulary import compute_marks, dataset_marks, map_problems, vector_mark
from tests.helpers import task_shop
from tests.helpers.source_files import ITEMS, PARTS, memory_source, random_events, sequences

SPLIT = Split("date", train_until=30, valid_until=35)
USER, ITEM = "user-to-forget", "item-to-forget"
BOTH = Names([USER], [ITEM])
CATALOGUE = [*ITEMS, ITEM]


def some_events(count: int = 300) -> list[tuple]:
    """Events in which USER and ITEM take part."""
    named = [(USER if u == "u3" else u, ITEM if i == "i4" else i, *rest) for u, i, *rest in random_events(count)]
    return list({(event[0], event[1], event[3]): event for event in named}.values())


def left(events: list[tuple], without: tuple[str, ...]) -> list[tuple]:
    return [event for event in events if event[0] not in without and event[1] not in without]


def make(folder: Path, without: tuple[str, ...] = ()) -> Path:
    """A dataset of a base and an append, from events that do not name `without`."""
    every, catalogue = some_events(), [item for item in CATALOGUE if item not in without]
    base = memory_source(folder / "0", left(every[:200], without), catalogue)
    root = prepare(base, folder / "out", split=SPLIT, partitions=2)
    last = (USER, ITEM, 5, 1 + max(event[3] for event in every))
    append_events(memory_source(folder / "1", left([*every[200:], last], without), catalogue), root)
    return root


def everything(root: Path, version: int | None = None) -> dict[str, Any]:
    return {part: sequences(Dataset.open(root, version), part) for part in PARTS}


def bytes_of(root: Path) -> Iterator[Path]:
    """Files in which one of the ids occurs, as bytes or decoded."""
    from hllm_torchrec.lifecycle.remaining_bytes import files_with

    return files_with([root], [USER, ITEM])


@pytest.mark.parametrize("erase", [False, True])
@pytest.mark.parametrize("names", [Names([USER]), Names((), [ITEM]), BOTH])
def test_every_version_equals_one_that_never_had_the_ids(tmp_path: Path, names: Names, erase: bool) -> None:
    root, other = make(tmp_path / "a"), make(tmp_path / "b", (*names.users, *names.items))
    before = Dataset.open(root)
    report = forget(root, names, erase=erase)
    assert report.version == 3 and report.found["events"] > 2 and list(kept_versions(root)) == [1, 2, 3]
    assert everything(root) == everything(other) == everything(root, 2)
    assert everything(root, 1) == everything(other, 1)
    after, never = Dataset.open(root), Dataset.open(other)
    for name in ("events", "exposures", "positives"):
        assert after.manifest["counts"][name] == never.manifest["counts"][name]
    assert after.manifest["seconds"] == never.manifest["seconds"]
    assert (after.num_users, after.num_items) == (before.num_users, before.num_items)
    assert sorted(after.training_item_counts()[1:]) == sorted(
        [0] * len(names.items) + never.training_item_counts()[1:].tolist()
    )
    assert compute_marks(after) == dataset_marks(after) == dataset_marks(before)
    assert not map_problems(dataset_marks(before), after, ["items", "users"])
    assert forget(root, names, erase=erase).version is None


def test_events_with_declared_columns_are_forgotten_with_them(tmp_path: Path) -> None:
    root = task_shop.prepared(tmp_path).root
    before = {user: Dataset.open(root).user_events(user) for user in (1, 2)}
    users, items = Dataset.open(root).users["raw_user_id"], Dataset.open(root).items["raw_item_id"]
    item = before[2].item_ids[0]
    forget(root, Names([users[0].as_py()], [items[int(item) - 1].as_py()]))
    after = Dataset.open(root)
    assert len(after.user_events(1)) == 0
    kept = before[2].item_ids != item
    for name, values in before[2].extra.items():
        np.testing.assert_array_equal(after.user_events(2).extra[name], values[kept], err_msg=name)
    assert before[2].extra and 0 < kept.sum() < kept.size


def test_bytes_stay_until_prune_or_are_erased_at_once(tmp_path: Path) -> None:
    one, other = make(tmp_path / "a"), make(tmp_path / "b")
    forget(one, BOTH)
    newest = {one / name for name in listed_files(Dataset.open(one).manifest)}
    assert set(bytes_of(one)) and not set(bytes_of(one)) & newest
    with write_lock(one):
        assert remove_superseded(one) > 0
    assert not list(bytes_of(one)) and everything(one, 1)
    report = forget(other, BOTH, erase=True)
    assert report.freed > 0 and not list(bytes_of(other))
    assert everything(other) == everything(one) and everything(other, 1) == everything(one, 1)
    third = make(tmp_path / "c")
    forget(third, BOTH)
    assert forget(third, BOTH, erase=True).freed > 0 and not list(bytes_of(third))


@pytest.mark.parametrize("erase", [False, True])
def test_later_sources_cannot_bring_an_id_back(tmp_path: Path, erase: bool) -> None:
    root, other = make(tmp_path / "a"), make(tmp_path / "b", (USER, ITEM, "unborn"))
    forget(root, Names([USER, "unborn"], [ITEM]), erase=erase)
    day = [
        (USER, "i1", 5, 60),
        ("u1", ITEM, 5, 61),
        ("unborn", "i2", 4, 62),
        ("fresh", "i2", 4, 62),
        ("u1", "i3", 1, 63),
    ]
    entry = append_events(memory_source(tmp_path / "day", day, CATALOGUE), root)
    assert entry is not None and entry["dropped"] == {"forgotten_item": 2, "forgotten_user": 2}
    append_events(memory_source(tmp_path / "day-b", left(day, (USER, ITEM, "unborn")), ITEMS), other)
    assert everything(root) == everything(other)
    assert compact(root) == 5 and everything(root) == everything(other)
    every = [*some_events(), *day]
    prepare(memory_source(tmp_path / "all", every, CATALOGUE), root, split=SPLIT, extend=True, allow_fewer=True)
    prepare(memory_source(tmp_path / "all-b", left(every, (USER, ITEM, "unborn")), ITEMS), tmp_path / "n", split=SPLIT)
    assert everything(root) == everything(tmp_path / "n")
    assert Dataset.open(root).num_items == Dataset.open(tmp_path / "n").num_items + 1
    every = [*every, (USER, "i1", 5, 99)]
    prepare(memory_source(tmp_path / "more", every, CATALOGUE), root, split=SPLIT, overwrite=True)
    assert everything(root) == everything(tmp_path / "n")
    assert Dataset.open(root).num_items == Dataset.open(tmp_path / "n").num_items
    names = Dataset.open(root).users["raw_user_id"].to_pylist()
    assert USER not in names and "unborn" not in names


def test_a_dataset_of_an_earlier_release_and_one_of_another_numbering_forget(tmp_path: Path) -> None:
    """Versions of other numbers (`--overwrite` while a run pins the older) lose the id by their own number."""
    old = shutil.copytree(Path("tests/artifacts/saved/dataset"), tmp_path / "old")
    dataset = Dataset.open(old)
    users = dataset.users["raw_user_id"].to_pylist()
    before = sequences(dataset, "train")
    busy = max(before, key=lambda user: len(before[user][1]))
    forget(old, Names([busy]), erase=True)
    assert sequences(Dataset.open(old), "train") == {user: rows for user, rows in before.items() if user != busy}
    assert len(Dataset.open(old).users) == len(users)

    root = make(tmp_path / "a")
    kept = everything(root, 2)
    from hllm_torchrec.data.pins import pin_version

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    pin_version(root, 2, tmp_path / "run")
    shuffled = memory_source(tmp_path / "o", some_events()[::-1], CATALOGUE[::-1])
    prepare(shuffled, root, split=SPLIT, overwrite=True)
    forget(root, Names([USER]))
    for version in kept_versions(root):
        found = everything(root, version)
        assert all(USER not in found[part] for part in PARTS)
        if version == 2:
            assert found == {part: {u: rows for u, rows in kept[part].items() if u != USER} for part in PARTS}


def test_rows_of_item_vectors_are_erased_and_runs_still_fit(tmp_path: Path) -> None:
    root = make(tmp_path / "a")
    dataset = Dataset.open(root)
    vectors = np.random.default_rng(0).normal(size=(dataset.num_items, 3)).astype(np.float32)
    (root / "vectors").mkdir()
    np.save(root / "vectors" / "mine.npy", vectors)
    (root / "tokens" / "some").mkdir(parents=True)
    number = dataset.items["raw_item_id"].to_pylist().index(ITEM) + 1
    report = forget(root, Names((), [ITEM]), erase=True)
    after = Dataset.open(root)
    found = item_vectors(after, "mine")
    assert not found[number].any() and np.array_equal(np.delete(found, number, 0), np.delete(vectors, number, 0))
    assert vector_mark(found, after.tombstones.digests("vectors/mine")) == vector_mark(vectors)
    assert report.found["rows of vectors"] == 1 and not (root / "tokens").exists()
    assert not any(vectors[number].tobytes() in path.read_bytes() for path in root.rglob("*") if path.is_file())


def test_files_that_the_manifest_lists_besides_stay(tmp_path: Path) -> None:
    """As of `hllm seal`, which lists everything that it finds."""
    root = prepare(memory_source(tmp_path / "0", some_events(), CATALOGUE), tmp_path / "out")
    (root / "contract.yaml").write_text("name: shop\n")
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["files"]["contract.yaml"] = {"bytes": 11, "sha256": "0" * 64}
    (root / "manifest.json").write_text(json.dumps(manifest))
    forget(root, BOTH, erase=True)
    for version in (1, 2):
        assert "contract.yaml" in Dataset.open(root, version).manifest["files"]
        assert not [name for name in listed_files(Dataset.open(root, version).manifest) if name.startswith("sequences")]
    assert (root / "contract.yaml").is_file() and not (root / "items.parquet").exists()
    assert not list(bytes_of(root))


def test_a_dry_run_finds_the_same_and_changes_nothing(tmp_path: Path) -> None:
    root = make(tmp_path / "a")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    planned = forget(root, BOTH, erase=True, dry_run=True)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()} == before
    done = forget(root, BOTH, erase=True)
    assert planned.found == done.found and planned.numbers == done.numbers and planned.version is None


def test_an_open_reader_keeps_what_it_holds(tmp_path: Path) -> None:
    root = make(tmp_path / "a")
    reader = Dataset.open(root)
    before = {part: sequences(reader, part) for part in PARTS}
    forget(root, BOTH, erase=True)
    assert {part: sequences(reader, part) for part in PARTS} == before


def test_a_busy_dataset_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make(tmp_path / "a")
    monkeypatch.setenv("HLLM_LOCK_WAIT", "0")
    with write_lock(root), pytest.raises(ValueError, match="another process is writing to this dataset"):
        forget(root, BOTH)
