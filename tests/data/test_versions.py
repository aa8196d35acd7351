"""Compacting, pruning and pinning of a dataset's versions; new bases by --extend and --overwrite."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from hllm_torchrec.data import dataset_compaction
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.dataset_compaction import compact
from hllm_torchrec.data.pins import pin_version, pinned_versions
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.versions import kept_versions, remove_versions, write_lock
from hllm_torchrec.data.vocabulary import compute_marks, dataset_marks, map_problems
from hllm_torchrec.launch.dataset import main
from tests.data.test_append import append, everything, shop, without_cleanup
from tests.helpers.schedules import acting_before, schedules
from tests.helpers.source_files import ITEMS, memory_source, random_events


def grown(tmp_path, days=3, **options):
    root = tmp_path / "out"
    prepare(memory_source(tmp_path / "base", random_events(100), ITEMS), root, **options)
    for n in range(days):
        append(
            root,
            tmp_path / str(n),
            [(f"new{n}", f"x{n}", 5, 60 + n), ("u1", "i1", 5, 3 + n)],
            [f"x{n}", ("i2", f"t{n}")],
        )
    return root


@pytest.mark.parametrize("rule", ["time", "leave_one_out", "leave_last"])
def test_a_compacted_version_is_what_it_folds(tmp_path, rule, monkeypatch):
    monkeypatch.setattr(dataset_compaction, "EVENTS_AT_ONCE", 40)
    root = grown(tmp_path, split=rule)
    before = Dataset.open(root)
    texts, groups = (
        before.items_fingerprint,
        [before.sequences([group]).user_ids for group in before.row_groups("train")],
    )
    seen = everything(before)
    assert compact(root) == 5 and compact(root) is None
    after = Dataset.open(root)
    assert everything(after) == seen == everything(Dataset.open(root, 4))
    assert after.items_fingerprint == texts  # its token stores are taken
    for group, users in zip(after.row_groups("train"), groups, strict=True):
        np.testing.assert_array_equal(after.sequences([group]).user_ids, users)
    assert len(after.manifest["base"]["event_files"]) > 1
    assert dataset_marks(after) == compute_marks(after)
    append(root, tmp_path / "later", [("u1", "x0", 5, 99), ("new9", "i1", 5, 2)])
    assert Dataset.open(root).manifest["counts"]["events"] == 108
    assert everything(Dataset.open(root, 5)) == seen


def test_pruning_keeps_the_newest_and_what_runs_pin_and_touches_nothing_else(tmp_path, capsys):
    root = grown(tmp_path)
    compact(root)
    (root / "vectors").mkdir()
    (root / "vectors" / "mine.npy").write_text("mine")
    (root / "appends" / "notes.txt").write_text("mine, too")
    for run, version in (("kept", 2), ("gone", 3)):
        (tmp_path / run).mkdir()
        (tmp_path / run / "config.yaml").write_text("x: 1")
        assert pin_version(root, version, tmp_path / run)
    shutil.rmtree(tmp_path / "gone")
    seen = {version: everything(Dataset.open(root, version)) for version in (2, 5)}
    assert main(["info", str(root)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("version 2:")]
    assert line.startswith("version 2: 102 events, 25 users, 16 items; +2 events; 1 appends, ")
    assert line.endswith(f" MB; pinned by {tmp_path / 'kept'}")
    assert main(["prune", str(root)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("removed 3 versions, ") and printed.endswith(f"; pinned: 2 ({tmp_path / 'kept'})\n")
    assert list(kept_versions(root)) == [2, 5]
    assert {version: everything(Dataset.open(root, version)) for version in (2, 5)} == seen
    assert (root / "vectors" / "mine.npy").is_file() and (root / "appends" / "notes.txt").is_file()
    assert not (root / "appends" / "00003").exists() and not (root / "sequences").exists()
    assert pinned_versions(root) == {2: [str(tmp_path / "kept")]}
    shutil.rmtree(tmp_path / "kept")
    assert main(["prune", str(root)]) == 0
    assert list(kept_versions(root)) == [5] and not (root / "items.parquet").exists()
    assert everything(Dataset.open(root)) == seen[5]
    assert append(root, tmp_path / "later", [("u1", "i1", 5, 99)])["version"] == 6


def test_a_full_export_is_a_new_base_that_keeps_ids_and_readers(tmp_path):
    root = grown(tmp_path)
    (root / "vectors").mkdir()
    (root / "vectors" / "mine.npy").write_text("mine")
    old, seen = Dataset.open(root), everything(Dataset.open(root))
    groups, before = old.row_groups("train"), old.sequences(old.row_groups("train"))
    events = [*random_events(100), *[(f"new{n}", f"x{n}", 5, 60 + n) for n in range(3)], *[("u1", "i1", 5, 9)] * 4]
    full = memory_source(tmp_path / "full", events, [*reversed(ITEMS), "x2", "x1", "x0", "brand-new"])
    with pytest.raises(
        ValueError, match=r"the source has 3 events, the dataset 106: --extend is for a full export.*--append"
    ):
        prepare(memory_source(tmp_path / "day", events[:3], ITEMS), root, extend=True)
    assert Dataset.open(root).version == 4
    prepare(full, root, extend=True)
    new = Dataset.open(root)
    assert (new.version, new.num_items, new.num_users) == (5, old.num_items + 1, old.num_users)
    assert new.items["raw_item_id"].to_pylist() == [*old.items["raw_item_id"].to_pylist(), "brand-new"]
    assert map_problems(dataset_marks(old), new, dataset_marks(old)) == []
    assert np.array_equal(old.sequences(groups).item_ids, before.item_ids) and everything(old) == seen
    assert everything(Dataset.open(root, 4)) == seen
    assert (root / "vectors" / "mine.npy").is_file()
    # What it holds is what preparing it alone gives, up to ids.
    alone = everything(Dataset.open(prepare(full, tmp_path / "alone")))
    assert everything(new)[0] == alone[0]


def test_another_dataset_takes_the_place_in_one_step_and_the_old_files_go(tmp_path):
    root = grown(tmp_path)
    for name in ("mine.npy", "factors.npy"):
        (root / "vectors").mkdir(exist_ok=True)
        (root / "vectors" / name).write_text("mine")
    old = dataset_marks(Dataset.open(root))
    other = memory_source(tmp_path / "other", random_events(200, seed=5), [*reversed(ITEMS)])
    with pytest.raises(ValueError, match=r"holds another dataset .*--overwrite.*--extend"):
        prepare(other, root)
    prepare(other, root, overwrite=True)
    dataset = Dataset.open(root)
    assert (dataset.version, dataset.items["raw_item_id"].to_pylist()) == (5, ITEMS[::-1])
    assert map_problems(old, dataset, ["items"])[0].startswith("items: ")
    assert (
        list(kept_versions(root)) == [5] and not (root / "appends").exists() and not (root / "items.parquet").exists()
    )
    assert [path.name for path in (root / "vectors").iterdir()] == ["mine.npy"]  # factors were fitted to other items
    assert everything(dataset)[0] == everything(Dataset.open(prepare(other, tmp_path / "alone")))[0]


def test_overwriting_keeps_the_versions_that_runs_pin(tmp_path):
    root, run = grown(tmp_path, days=2), tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").touch()
    pin_version(root, 2, run)
    seen = everything(Dataset.open(root, 2))
    prepare(memory_source(tmp_path / "other", random_events(80, seed=5), ITEMS[::-1]), root, overwrite=True)
    assert list(kept_versions(root)) == [2, 4]
    assert everything(Dataset.open(root, 2)) == seen


@pytest.mark.slow
@pytest.mark.parametrize("action", ["append", "compact", "overwrite"])
def test_a_reader_sees_one_version_whatever_replaces_the_dataset(tmp_path, action):
    before, after, root = grown(tmp_path, days=1), tmp_path / "after", tmp_path / "read"
    shutil.copytree(before, after)
    if action == "append":
        append(after, tmp_path / "day", [("new", "x", 5, 99)], ["x"])
    elif action == "compact":
        compact(after)
    else:
        prepare(memory_source(tmp_path / "other", random_events(80, seed=5), ITEMS[::-1]), after, overwrite=True)

    def put(state):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(state, root)

    versions = [everything(Dataset.open(state)) for state in (before, after)]
    results = dict(schedules(lambda: everything(Dataset.open(root)), lambda: put(after), root, lambda: put(before)))
    assert len(results) > 10
    for k, found in results.items():
        gone = action == "overwrite" and isinstance(found, ValueError | FileNotFoundError)
        assert gone or found in versions, (k, found)
    assert versions[1] in results.values() and (action == "overwrite" or versions[0] in results.values())


def test_the_first_source_again_is_reused_unless_it_is_to_replace_what_was_appended(tmp_path):
    root, source = grown(tmp_path), memory_source(tmp_path / "base", random_events(100), ITEMS)
    prepare(source, root)
    assert Dataset.open(root).version == 4
    with pytest.raises(ValueError, match=r"the source has 100 events, the dataset 106: --extend is for a full export"):
        prepare(source, root, extend=True)
    prepare(source, root, overwrite=True)
    assert (Dataset.open(root).version, Dataset.open(root).manifest["counts"]["events"]) == (5, 100)


@pytest.mark.slow
def test_killed_anywhere_compacting_and_pruning_go_on(tmp_path):
    saved, root = grown(tmp_path, days=2), tmp_path / "killed"
    seen = everything(Dataset.open(saved))
    shutil.copytree(saved, root)

    def fold_and_prune():
        compact(root)
        with write_lock(root):
            remove_versions(root, {2})

    fold_and_prune()
    files = {p.relative_to(root) for p in root.rglob("*")}

    class Killed(BaseException):
        pass

    def die():
        dead.append(True)
        raise Killed

    k, dead = 1, [True]
    while dead:
        dead.clear()
        shutil.rmtree(root)
        shutil.copytree(saved, root)
        try:
            with without_cleanup(), acting_before(k, die, root):
                fold_and_prune()
        except Killed:
            pass
        for version in kept_versions(root):
            if version in (3, 4):
                assert everything(Dataset.open(root, version)) == seen, k
        fold_and_prune()
        assert {p.relative_to(root) for p in root.rglob("*")} == files, k
        k += 5  # every fifth access
    assert k > 60


def test_pins_of_a_read_only_dataset_are_left_out(tmp_path, monkeypatch):
    root = shop(tmp_path)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert pin_version(root, 1, tmp_path / "run") is False
    monkeypatch.undo()
    elsewhere = str(tmp_path / "no disk" / "runs" / "run")  # of another machine, or of a disk that is not mounted
    for run in (tmp_path / "gone", "s3://bucket/run", elsewhere):
        assert pin_version(root, 1, run)
    assert sorted(pinned_versions(root)[1]) == sorted(["s3://bucket/run", elsewhere])
    (next((root / "pins").iterdir())).write_text("{")
    with pytest.raises(ValueError, match=r"pins/.*\.json is damaged .*remove it if its run is gone"):
        pinned_versions(root)
