"""Versions: appended days give what preparing everything at once gives, event by event, and change nothing there."""

import json
from pathlib import Path

import numpy as np
import pytest

from hllm_torchrec.data.append import append_events
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.split import Split
from tests.helpers.source_files import ITEMS, PARTS, memory_source, oracle, random_events, sequences


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


@pytest.mark.parametrize("rule", ["time", "leave_one_out", "leave_last"])
def test_appended_days_are_what_preparing_everything_gives(tmp_path, rule):
    events = [*random_events(), ("short", "i1", 5, 3), ("new", "i2", 5, 3), *random_events(200, users=40, seed=1)]
    # Known events would be left out: every (user, second, item) once.
    events = list({(e[0], e[1], e[3]): e for e in events}.values())
    base, later = days(events, 300, 4)
    root = prepare(memory_source(tmp_path / "0", base, ITEMS), tmp_path / "out", split=rule, partitions=3)
    for n, day in enumerate(later):
        entry = append(root, tmp_path / str(n + 1), day, [f"extra{n}"])
        assert (entry["events"], entry["version"], entry["new_items"]) == (len(day), n + 2, 1)
        assert entry["late_events"] > 0
    dataset, every = Dataset.open(root), [*base, *(event for day in later for event in day)]
    expected = time_oracle(base, [e for day in later for e in day]) if rule == "time" else oracle(every, rule)
    for part in PARTS:
        assert sequences(dataset, part) == expected[part], part
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


@pytest.mark.parametrize(
    ("rule", "split", "message"),
    [
        (
            "leave_one_out",
            Split("date", train_until=2, valid_until=4),
            "only dates can move, of a dataset split by time",
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
