"""Versions: appended days give what preparing everything at once gives, event by event, and change nothing there."""

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from hllm_torchrec.data import folding
from hllm_torchrec.data.append import append_events
from hllm_torchrec.data.bad_rows import BadRows
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.dataset_compaction import compact
from hllm_torchrec.data.event_files import EventFile
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.sources.registry import build_source
from hllm_torchrec.data.sources.table_mapping import table
from hllm_torchrec.data.split import Split
from hllm_torchrec.data.validation import TableRows
from hllm_torchrec.data.versions import write_lock
from hllm_torchrec.data.vocabulary import IdMark, compute_marks, dataset_marks, map_problems
from hllm_torchrec.launch.prepare import main
from tests.helpers.schedules import acting_before
from tests.helpers.source_files import ITEMS, PARTS, memory_source, oracle, random_events, sequences, write_csv


@contextmanager
def without_cleanup() -> Iterator[None]:
    """Context manager in which nothing is removed, as after a kill: no clean-up of the killed process runs."""
    with patch.object(shutil, "rmtree", lambda *_, **__: None), patch.object(Path, "unlink", lambda *_, **__: None):
        yield


def append(root: Path, folder: Path, events, items=(), **facts):
    return append_events(memory_source(folder, events, items, **facts), root)


def days(events, base: int, count: int):
    """The events as those of a base and of `count` further days, in order of the rows: days overlap in time."""
    share = (len(events) - base) // count
    return events[:base], [events[base + n * share : base + (n + 1) * share] for n in range(count)]


def time_oracle(base, later):
    """Parts of everything, cut at the base's cuts: an appended event of a cut's own second comes after it."""
    ordered = sorted(range(len(base)), key=lambda n: (base[n][3], n))
    cuts = [ordered[round(len(base) * share)] for share in (0.8, 0.9)]
    every = [*base, *later]
    users = {}
    for n in sorted(range(len(every)), key=lambda n: (every[n][3], n)):
        users.setdefault(every[n][0], []).append(n)
    found = {part: {} for part in PARTS}
    for user, own in users.items():
        part_of = [sum((every[n][3], n) >= (base[cut][3], cut) for cut in cuts) for n in own]
        history = [(e[1], e[3], float(e[2] >= 4), e[2]) for e in (every[n] for n in own)]
        for p, part in enumerate(PARTS):
            if p in part_of:
                found[part][user] = (part_of.index(p), history[: len(own) - part_of[::-1].index(p)])
    return found


@pytest.mark.parametrize("factor", [8, 2])
@pytest.mark.parametrize("rule", ["time", "leave_one_out", "leave_last"])
def test_appended_days_are_what_preparing_everything_gives(tmp_path, rule, factor, monkeypatch):
    monkeypatch.setattr(folding, "FACTOR", factor)
    events = [*random_events(), ("short", "i1", 5, 3), ("new", "i2", 5, 3), *random_events(200, users=40, seed=1)]
    # Known events would be left out: every (user, second, item) once.
    events = list({(e[0], e[1], e[3]): e for e in events}.values())
    base, later = days(events, 300, 4)  # with a factor of 2: folded to levels 1, 0, 2, so that all are one
    root = prepare(memory_source(tmp_path / "0", base, ITEMS), tmp_path / "out", split=rule, partitions=3)
    for n, day in enumerate(later):
        entry = append(root, tmp_path / str(n + 1), day, [f"extra{n}"])
        assert (entry["events"], entry["version"], entry["new_items"]) == (len(day), n + 2, 1)
        assert entry["late_events"] > 0
    dataset, every = Dataset.open(root), [*base, *(event for day in later for event in day)]
    expected = time_oracle(base, [e for day in later for e in day]) if rule == "time" else oracle(every, rule)
    for part in PARTS:
        assert sequences(dataset, part) == expected[part], part
    assert [one["version"] for one in dataset.manifest["appends"]] == ([2, 3, 4, 5] if factor == 8 else [5])
    assert dataset.version == 5 and dataset.num_items == len(ITEMS) + 5
    counts = np.zeros(dataset.num_items, np.int64)
    raw = dataset.items["raw_item_id"].to_pylist()
    for start, history in expected["train"].values():
        assert start == 0
        for item, *_ in history:
            counts[raw.index(item) + 1] += 1
    assert dataset.training_item_counts().tolist() == counts.tolist()


def test_an_append_moves_the_cuts_of_a_split_by_time_for_all_events(tmp_path):
    events = [("u1", "i1", 5, 10), ("u2", "i2", 4, 20), ("u1", "i3", 1, 30), ("u2", "i1", 5, 40), ("u1", "i2", 5, 50)]
    root = prepare(
        memory_source(tmp_path / "0", events, ITEMS), tmp_path / "out", split=Split(fractions=(0.6, 0.2, 0.2))
    )
    day = [("u3", "i1", 5, 60), ("u1", "i1", 2, 70), ("u2", "i3", 3, 80)]
    late = [("u3", "i2", 1, 45)]
    split = Split("date", train_until=60, valid_until=80)
    append_events(memory_source(tmp_path / "1", [*day, *late], ITEMS[:1]), root, split=split)
    dataset = Dataset.open(root)
    found = {part: {user: start for user, (start, _) in sequences(dataset, part).items()} for part in PARTS}
    assert found == {"train": {"u1": 0, "u2": 0, "u3": 0}, "valid": {"u1": 3, "u3": 1}, "test": {"u2": 2}}
    assert dataset.training_item_counts().sum() == 6
    assert Dataset.open(root, 1).manifest["split"]["rule"] == "time" and dataset.manifest["split"]["rule"] == "date"
    again = append_events(memory_source(tmp_path / "2", [("u1", "i3", 5, 90)], ITEMS[:1]), root)
    assert again is not None and list(sequences(Dataset.open(root), "test")) == ["u1", "u2"]
    # Nothing new, but other dates: a version with only these; the same call again writes nothing.
    for version, name in ((4, "2"), (5, "3")):  # the same file; another one with known events
        dates = Split("date", train_until=70 + version, valid_until=90)
        same = memory_source(tmp_path / name, [("u1", "i3", 5, 90)], ITEMS[:1])
        assert append_events(same, root, split=dates)["events"] == 0
        assert append_events(same, root, split=dates) is None
        dataset = Dataset.open(root)
        assert dataset.version == version and list(sequences(dataset, "valid")) == ["u2"]
        assert dataset.training_item_counts().sum() == 8 and dataset.manifest["counts"]["events"] == 10


@pytest.mark.parametrize(
    ("rule", "split", "message"),
    [
        (
            "leave_one_out",
            Split("date", train_until=2, valid_until=4),
            "only dates can move, and only in a dataset split by time",
        ),
        ("time", Split(), r"--append with split time: .* only dates can move"),
        (
            "time",
            Split("date", train_until=2, valid_until=10**6),
            "leave a part without events; give dates between them",
        ),
    ],
)
def test_cuts_that_cannot_move_are_refused_and_nothing_is_written(tmp_path, rule, split, message):
    root = prepare(memory_source(tmp_path / "0", random_events(), ITEMS), tmp_path / "out", split=rule)
    with pytest.raises(ValueError, match=message):
        append_events(memory_source(tmp_path / "1", [("new", "i1", 5, 500)], ITEMS[:1]), root, split=split)
    assert Dataset.open(root).version == 1


def shop(tmp_path, **facts):
    """A prepared dataset of few events, its folder."""
    return prepare(memory_source(tmp_path / "base", random_events(100), ITEMS, **facts), tmp_path / "out")


def everything(dataset):
    """All that a reader can see of a version."""
    parts = {part: sequences(dataset, part) for part in PARTS}
    return parts, dataset.items.to_pylist(), dataset.users.to_pylist(), dataset.training_item_counts().tolist()


def test_the_same_files_again_are_a_no_op_and_so_are_known_events(tmp_path, caplog):
    caplog.set_level("INFO")
    root = shop(tmp_path)
    day = [("u1", "i1", 5, 50), ("u2", "i2", 1, 51)]
    append(root, tmp_path / "1", day)
    before = (root / "manifest.json").read_bytes()
    assert append(root, tmp_path / "1", day) is None
    assert "version 2 was made from the same files: nothing to append" in caplog.text
    (tmp_path / "renamed").mkdir()
    assert append(root, tmp_path / "renamed", day[::-1]) is None  # other bytes, the same events
    assert "the source holds nothing new (known_event 2): no version is written" in caplog.text
    assert append_events(memory_source(tmp_path / "base", random_events(100), ITEMS), root) is None
    assert (root / "manifest.json").read_bytes() == before
    assert [p.name for p in (root / "appends").iterdir()] == ["00002"]


def test_an_event_of_an_earlier_version_is_left_out_and_counted(tmp_path):
    root = shop(tmp_path)
    append(root, tmp_path / "1", [("u1", "i1", 5, 50), ("u2", "i2", 1, 51)])
    entry = append(root, tmp_path / "2", [("u1", "i1", 5, 50), ("u1", "i2", 5, 50), ("u9", "i1", 5, 50)])
    assert (entry["events"], entry["dropped"]) == (2, {"known_event": 1})
    strict = BadRows(duplicate_event="error")
    with pytest.raises(ValueError, match=r"events\.csv, row 2: an earlier version has this event already"):
        append_events(
            memory_source(tmp_path / "3", [("u3", "i1", 5, 60), ("u9", "i1", 5, 50)], []), root, policy=strict
        )
    assert Dataset.open(root).version == 3


@pytest.mark.parametrize(("rating", "is_said"), [("5", True), ("as before", False)])
def test_labels_of_another_rule_are_said(rating, is_said, tmp_path):
    root = shop(tmp_path)
    ratings = [event[2] for event in random_events(100)]
    day = [(f"u{n % 9}", "i1", ratings[n] if rating == "as before" else 5, 10_000 + n) for n in range(100)]
    append(root, tmp_path / "1", day)
    notes = [note for note in Dataset.open(root).manifest["notes"] if "labels are positive" in note]
    assert bool(notes) == is_said
    if is_said:
        assert "caution: 100.0% of the 100 appended labels are positive, of the earlier ones " in notes[0]


def test_changed_texts_and_features_are_new_rows_of_their_items_alone(tmp_path):
    def source(folder, events, items, users):
        write_csv(folder / "e.csv", [("user", "item", "time"), *events])
        write_csv(folder / "i.csv", [("item", "title", "genres"), *items])
        write_csv(folder / "u.csv", [("user", "country"), *users])
        mapping = {
            "name": "t",
            "events": {"path": "e.csv", "user": "user", "item": "item", "time": "time"},
            "items": {"path": "i.csv", "item": "item", "text": ["title"], "features": {"genres": "|"}},
            "users": {"path": "u.csv", "user": "user", "features": {"country": None}},
        }
        (folder / "m.yaml").write_text(json.dumps(mapping))
        return table(folder / "m.yaml")

    items = [("i0", "zero", "a|b"), ("i1", "one", "a"), ("i2", "two", "")]
    users = [("u0", "de"), ("u1", "fr"), ("u2", "de")]
    events = [(f"u{n % 3}", f"i{n % 3}", n) for n in range(12)]
    root = prepare(source(tmp_path / "1", events, items, users), tmp_path / "out", split="leave_one_out")
    first = Dataset.open(root)
    new_items = [items[0], ("i1", "ONE", "a"), ("i2", "two", "c|a"), ("i3", "three", "c")]
    new_users = [("u0", ""), ("u1", "us"), ("u2", "de"), ("u3", "us"), ("stranger", "xx")]
    entry = append_events(source(tmp_path / "2", [("u3", "i3", 50), ("u0", "i1", 51)], new_items, new_users), root)
    assert [entry[f"{kind}_{what}"] for what in ("items", "users") for kind in ("new", "changed")] == [1, 2, 1, 1]
    dataset = Dataset.open(root)
    assert dataset.items.to_pylist() == [
        {"item_id": 1, "raw_item_id": "i0", "title": "zero", "feature_genres": [1, 2]},
        {"item_id": 2, "raw_item_id": "i1", "title": "ONE", "feature_genres": [1]},
        {"item_id": 3, "raw_item_id": "i2", "title": "two", "feature_genres": [3, 1]},
        {"item_id": 4, "raw_item_id": "i3", "title": "three", "feature_genres": [3]},
    ]
    assert [row["feature_country"] for row in dataset.users.to_pylist()] == [[1], [3], [1], [3]]
    assert dataset.feature_values("genres").to_pylist() == ["a", "b", "c"]
    assert dataset.feature_values("country").to_pylist() == ["de", "fr", "us"]  # the stranger has no event
    assert dataset.feature_ids("item", "genres")[0].tolist() == [1, 2, 1, 3, 1, 3]
    assert dataset.text(["title"])["title"].to_pylist() == ["zero", "ONE", "two", "three"]
    marks = {name: IdMark.from_json(mark) for name, mark in dataset.manifest["vocabulary"].items()}
    assert marks == compute_marks(dataset)
    assert map_problems(dataset_marks(first), dataset, marks) == []
    assert first.items["title"].to_pylist() == ["zero", "one", "two"]  # opened before, read after


@pytest.mark.parametrize("first", [True, False])
def test_creation_times_may_come_and_go(tmp_path, first, monkeypatch):
    monkeypatch.setattr(folding, "FACTOR", 2)

    def source(name: str, times: bool, events, items):
        write_csv(tmp_path / name / "events.csv", [("user", "item", "time"), *events])
        rows = [(item, title, 7)[: 2 + times] for item, title in items]
        write_csv(tmp_path / name / "items.csv", [("item", "title", "made")[: 2 + times], *rows])
        items = {"path": "items.csv", "item": "item", "text": ["title"]} | ({"created_at": "made"} if times else {})
        path = tmp_path / name / "shop.yaml"
        events = {"path": "events.csv", "user": "user", "item": "item", "time": "time"}
        path.write_text(json.dumps({"name": "shop", "events": events, "items": items}))
        return table(path)

    events = [(f"u{n % 3}", f"i{n % 4}", n) for n in range(30)]
    root = prepare(source("0", first, events, [(f"i{n}", f"t{n}") for n in range(4)]), tmp_path / "out")
    append_events(source("1", not first, [("u1", "new", 40)], [("new", "n"), ("i1", "changed")]), root)
    times = {True: [7, 7, 7, 7, None], False: [None, 7, None, None, 7]}[first]
    for step in (lambda: append_events(source("2", first, [("u2", "i1", 50)], []), root), lambda: compact(root)):
        assert Dataset.open(root).items["created_at"].to_pylist() == times
        assert Dataset.open(root).text(["title"])["title"].to_pylist() == ["t0", "changed", "t2", "t3", "n"]
        step()
    assert Dataset.open(root).items["created_at"].to_pylist() == times


def test_a_reader_keeps_its_version_and_any_version_can_be_opened(tmp_path):
    root = shop(tmp_path)
    first, seen = Dataset.open(root), []
    groups = first.row_groups("train")
    before = first.sequences(groups)
    for n in range(3):
        seen.append(everything(Dataset.open(root)))
        append(root, tmp_path / str(n), [(f"new{n}", f"x{n}", 5, 60 + n), ("u1", "i1", 5, 3)], [f"x{n}"])
    assert np.array_equal(first.sequences(groups).item_ids, before.item_ids)
    assert everything(first) == seen[0]
    for n in range(3):
        dataset = Dataset.open(root, n + 1)
        assert (dataset.version, everything(dataset)) == (n + 1, seen[n])
    with pytest.raises(ValueError, match=r"out: no version 7; it has 1, 2, 3, 4\. Choose one of them"):
        Dataset.open(root, 7)


def test_what_cannot_grow_event_by_event_is_refused(tmp_path):
    def refused(match, source=None, **options):
        root = tmp_path / f"r{len(list(tmp_path.iterdir()))}"
        prepare(memory_source(tmp_path / "b", random_events(200), ITEMS, **options.pop("facts", {})), root, **options)
        with pytest.raises(ValueError, match=match):
            append_events(source or memory_source(tmp_path / "d", [("u1", "i1", 5, 60)], []), root)
        assert Dataset.open(root).version == 1 and not (root / "appends").exists()

    refused("a k-core needs all events", min_events=2)
    refused("held-out items measure cold start", split=Split(hold_out_items=0.1))
    refused("events without timestamps", facts={"has_timestamps": False})
    other = memory_source(tmp_path / "o", [("u1", "i1", 5, 60)], [], action_names={1: "x"})
    refused(r"the actions of the source are .*prepare all data again \(--extend\)", other)
    refused("the label rule of the source", memory_source(tmp_path / "o", [("u", "i1", 5, 60)], [], label_rule="x"))


@pytest.mark.slow
def test_killed_anywhere_nothing_is_lost_and_the_next_append_goes_on(tmp_path):
    """The writer dies before each of its file accesses: the version before is there, or the new one."""
    root, day = tmp_path / "out", [("u1", "new", 5, 60), ("u1", "i1", 5, 3)]
    prepare(memory_source(tmp_path / "base", random_events(30), ITEMS), tmp_path / "saved")
    shutil.copytree(tmp_path / "saved", root)
    before = everything(Dataset.open(root))
    append(root, tmp_path / "day", day, ["new"])
    after, files = everything(Dataset.open(root)), {p.relative_to(root) for p in root.rglob("*")}

    class Killed(BaseException):
        pass

    def die():
        dead.append(True)
        raise Killed

    k, committed, dead = 1, 0, [True]
    while True:
        dead.clear()
        shutil.rmtree(root)
        shutil.copytree(tmp_path / "saved", root)
        try:
            # A killed process runs no clean-up either.
            with without_cleanup(), acting_before(k, die, root):
                append(root, tmp_path / "day", day, ["new"])
        except Killed:
            pass
        if not dead:
            break
        found = everything(Dataset.open(root))
        assert found in (before, after), k
        committed += found == after
        entry = append(root, tmp_path / "day", day, ["new"])
        assert (entry is None) == (found == after)
        assert everything(Dataset.open(root)) == after
        assert {p.relative_to(root) for p in root.rglob("*")} == files, k
        k += 1
    assert k > 20 and committed >= 1


def test_two_appends_at_once_wait_for_each_other(tmp_path, monkeypatch):
    root = shop(tmp_path)
    monkeypatch.setenv("HLLM_LOCK_WAIT", "0")
    with (
        write_lock(root),
        pytest.raises(ValueError, match=r"out: another process is writing to this dataset \(process"),
    ):
        append(root, tmp_path / "1", [("u1", "i1", 5, 60)])
    monkeypatch.delenv("HLLM_LOCK_WAIT")
    with ThreadPoolExecutor(4) as pool:
        days = [pool.submit(append, root, tmp_path / f"d{n}", [("u1", "i1", 5, 60 + n)]) for n in range(4)]
        assert sorted(day.result()["version"] for day in days) == [2, 3, 4, 5]
    assert Dataset.open(root).manifest["counts"]["events"] == 104


def test_a_dataset_of_an_earlier_release_grows_too(tmp_path):
    for rule in ("time", "leave_one_out", "leave_last"):
        root = tmp_path / rule
        prepare(memory_source(tmp_path / "base", random_events(100), ITEMS), root, split=rule, partitions=3)
        day = [("u1", "new", 5, 60), ("u1", "i1", 5, 3), ("u77", "i1", 5, 3)]
        shutil.copytree(root, tmp_path / f"{rule}-old")
        append(root, tmp_path / "day", day, ["new"])
        old = tmp_path / f"{rule}-old"
        shutil.rmtree(old / "events")
        manifest = json.loads((old / "manifest.json").read_text())
        for name in ("event_files", "seconds", "vocabulary"):
            del manifest[name]
        (old / "manifest.json").write_text(json.dumps(manifest))
        before = everything(Dataset.open(old))
        append(old, tmp_path / "day", day, ["new"])
        assert Dataset.open(old).version == 3
        assert everything(Dataset.open(old, 2)) == before
        assert everything(Dataset.open(old)) == everything(Dataset.open(root))


def test_only_listed_files_are_read(tmp_path):
    root = shop(tmp_path)
    append(root, tmp_path / "1", [("u1", "i1", 5, 60)])
    before = everything(Dataset.open(root)), everything(Dataset.open(root, 1))
    part = root / "sequences" / "train"
    shutil.copy(part / "part-00000.parquet", part / "part-99999.parquet")
    os.mkfifo(part / "part-88888.parquet")
    assert (everything(Dataset.open(root)), everything(Dataset.open(root, 1))) == before
    (root / "appends" / "00002").rename(tmp_path / "away")
    (root / "appends" / "00002").symlink_to(tmp_path / "away")
    with pytest.raises(ValueError, match=r"appends/00002/events/part-00000\.arrow' leads out of the dataset"):
        Dataset.open(root)
    (root / "users.parquet").unlink()
    os.mkfifo(root / "users.parquet")
    with pytest.raises(ValueError, match=r"users\.parquet is no regular file; copy the file there"):
        Dataset.open(root, 1)


def test_a_damaged_event_file_is_named(tmp_path):
    root = shop(tmp_path)
    append(root, tmp_path / "1", [("u1", "i1", 5, 60), ("u2", "i2", 5, 61)])
    path = root / "appends/00002/events/part-00000.arrow"
    good = path.read_bytes()

    def opened(change):
        path.write_bytes(change)
        dataset = Dataset.open(root)
        return dataset.sequences(dataset.row_groups("test"))

    opened(good)
    (file,) = (EventFile.open(path, TableRows(16, 26, 6)),)

    def spoiled_column(name, row, value):
        column = getattr(file.events, name)
        changed = column.copy()
        changed[row] = value
        return good.replace(column.tobytes(), changed.tobytes())

    with pytest.raises(ValueError, match=r"part-00000\.arrow, row 1: timestamps\[0\] is -1;.*outside 1970"):
        opened(spoiled_column("timestamps", 1, -1))
    with pytest.raises(
        ValueError, match=r"part-00000\.arrow, row 1: item_ids\[0\] is 99; the dataset's items .*0\.\.15"
    ):
        opened(spoiled_column("item_ids", 1, 99))
    with pytest.raises(ValueError, match=r"part-00000\.arrow, row 0: labels\[0\] is 0\.5; a label is 0 or 1"):
        opened(spoiled_column("labels", 0, 0.5))
    with pytest.raises(ValueError, match=r"part-00000\.arrow: user_id must ascend|users have the ids 1"):
        opened(good.replace(file.user_ids.tobytes(), file.user_ids[::-1].tobytes()))
    for cut in (slice(0, 100), slice(8, None), slice(0, 0)):
        spoiled = good[cut] + bytes(len(good) - len(good[cut]))
        with pytest.raises(ValueError, match=r"part-00000\.arrow cannot be read"):
            opened(spoiled)


def test_appends_are_folded_by_level_and_earlier_versions_keep_theirs(tmp_path, monkeypatch):
    monkeypatch.setattr(folding, "FACTOR", 3)
    root, seen, levels = shop(tmp_path), {}, []
    for n in range(10):
        append(
            root,
            tmp_path / str(n),
            [(f"new{n}", f"x{n}", 5, 60 + n), ("u1", "i1", 5, 3 + n)],
            [f"x{n}", ("i2", f"t{n}")],
        )
        seen[n + 2] = everything(Dataset.open(root))
        levels.append([one["level"] for one in Dataset.open(root).manifest["appends"]])
    assert levels[:4] == [[0], [0, 0], [1], [1, 0]] and levels[8] == [2] and levels[9] == [2, 0]
    assert Dataset.open(root).items["title"].to_pylist()[2:5].count("t9") <= 1
    for version, expected in seen.items():
        assert everything(Dataset.open(root, version)) == expected
    marks = dataset_marks(Dataset.open(root))
    assert marks == compute_marks(Dataset.open(root))
    monkeypatch.setattr(folding, "MOST_EVENTS", 5)
    for n in range(10, 13):
        append(root, tmp_path / str(n), [(f"new{n}", "i1", 5, 60 + n), ("u1", "i1", 5, 13 + n)])
    assert [one["level"] for one in Dataset.open(root).manifest["appends"]] == [2, 0, 0, 0, 0]


def test_the_command_appends_files_to_what_is_there(tmp_path, capsys):
    write_csv(tmp_path / "e.csv", [("user", "item", "time"), *((f"u{n % 5}", f"i{n % 4}", n) for n in range(40))])
    write_csv(tmp_path / "i.csv", [("item", "title"), *((f"i{n}", f"title {n}") for n in range(4))])
    write_csv(tmp_path / "day.csv", [("user", "item", "time"), ("u1", "i1", 50), ("u9", "i2", 7), ("u9", "i2", 7)])
    mapping = {
        "name": "t",
        "events": {"path": "e.csv", "user": "user", "item": "item", "time": "time"},
        "items": {"path": "i.csv", "item": "item", "text": ["title"]},
    }
    (tmp_path / "m.yaml").write_text(json.dumps(mapping))
    given = ["--source", "table", "--path", str(tmp_path / "m.yaml"), "--output", str(tmp_path / "d")]
    assert main(given) == 0
    (tmp_path / "i.csv").unlink()  # an append needs no items
    assert main([*given, "--append", str(tmp_path / "day.csv")]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "d: 43 events, 6 users, 4 items, version 2" in printed
    assert "appended: 3 events of 2 users, 2 of them late" in printed and "users: 1 new, 0 changed" in printed
    assert "have no event" not in printed and "no features" not in printed, "a day need not show every item"
    assert main([*given, "--append", str(tmp_path / "day.csv")]) == 0
    assert Dataset.open(tmp_path / "d").version == 2
    for options, message in (
        (["--append", "--extend"], "--append and --extend exclude each other; give one of them"),
        (["--append", "--split", "leave_one_out"], "--append --split leave_one_out: "),
        (["--append", "--min-events", "5"], "--append --min-events 5: a k-core needs all events"),
        (["--append", str(tmp_path / "none.csv")], "none.csv is no file; correct the path"),
    ):
        assert main([*given, *options]) == 2
        assert message in capsys.readouterr().err
    assert main([*given[:-1], str(tmp_path / "nowhere"), "--append", str(tmp_path / "day.csv")]) == 2
    assert "nowhere is not a prepared dataset: no manifest.json" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(ValueError, match=r"--append x\.csv: ml-1m has its events in --path"):
        build_source("ml-1m", tmp_path, append=[Path("x.csv")])


def test_new_users_that_the_appended_user_file_lacks_are_said_and_a_later_file_adds_their_features(tmp_path, capsys):
    write_csv(tmp_path / "e.csv", [("user", "item", "time"), *((f"u{n % 5}", f"i{n % 4}", n) for n in range(40))])
    write_csv(tmp_path / "i.csv", [("item", "title"), *((f"i{n}", f"title {n}") for n in range(4))])
    users = [("user", "country"), *((f"u{n}", "de") for n in range(7))]
    write_csv(tmp_path / "u.csv", users)
    mapping = {
        "name": "t",
        "events": {"path": "e.csv", "user": "user", "item": "item", "time": "time"},
        "items": {"path": "i.csv", "item": "item", "text": ["title"]},
        "users": {"path": "u.csv", "user": "user", "features": {"country": None}},
    }
    (tmp_path / "m.yaml").write_text(json.dumps(mapping))
    given = ["--source", "table", "--path", str(tmp_path / "m.yaml"), "--output", str(tmp_path / "d")]
    assert main(given) == 0
    assert "2 rows of the user file are of users without events" in capsys.readouterr().out
    write_csv(tmp_path / "u.csv", [("user", "country"), ("u7", "fr")])
    for day, (files, note) in enumerate(
        (([("u5", 50), ("u6", 51), ("u7", 52), ("u1", 53)], "caution: 2 of"), ([("u8", 60)], "1 of"))
    ):
        write_csv(
            tmp_path / f"{day}.csv", [("user", "item", "time"), *((user, "i1", second) for user, second in files)]
        )
        assert main([*given, "--append", str(tmp_path / f"{day}.csv")]) == 0
        printed = capsys.readouterr().out
        assert f"{note} the new users have no features" in printed and "without events" not in printed
    # The file has only the day's new users: all others, active or not, keep their features.
    assert Dataset.open(tmp_path / "d").users["feature_country"].to_pylist() == [[1]] * 5 + [[], [], [2], []]
    write_csv(tmp_path / "u.csv", users)
    write_csv(tmp_path / "2.csv", [("user", "item", "time"), ("u1", "i1", 70)])
    assert main([*given, "--append", str(tmp_path / "2.csv")]) == 0
    assert "users: 0 new, 2 changed" in (printed := capsys.readouterr().out) and "no features" not in printed
    found = Dataset.open(tmp_path / "d").users
    countries = dict(zip(found["raw_user_id"].to_pylist(), found["feature_country"].to_pylist(), strict=True))
    assert countries["u5"] == countries["u6"] == countries["u1"] and len(countries["u5"]) == 1 and not countries["u8"]
