"""Versions: appended days give what preparing everything at once gives, event by event, and change nothing there."""

import json
from pathlib import Path

import numpy as np
import pytest

from hllm_torchrec.data.append import append_events
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.prepare import prepare
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
