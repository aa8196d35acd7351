"""Late events: those of later versions before a second, which an increment trains on once."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.config.loading import load_config
from hllm_torchrec.data import folding
from hllm_torchrec.data.append import append_events
from hllm_torchrec.data.bad_rows import BadRows
from hllm_torchrec.data.batch_spec import BatchSpec
from hllm_torchrec.data.collate import Collator
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.dataset_compaction import compact
from hllm_torchrec.data.late_events import late_events
from hllm_torchrec.data.loader import Loader, LoaderSpec
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.split import Split
from tests.helpers.source_files import ITEMS, memory_source, random_events

SINCE, SECONDS = 60, 80
Event = tuple[str, str, int, int]


@pytest.fixture(scope="module")
def days() -> list[list[Event]]:
    """A base and three days without repeated events; the first day is of the last seconds, the others are of all."""
    events = list({(e[0], e[1], e[3]): e for e in random_events(500, users=40, seconds=SECONDS)}.values())
    recent = [event for event in events[200:] if event[3] >= SINCE - 5]
    rest = [event for event in events[200:] if event[3] < SINCE - 5]
    return [events[:200], recent, [*rest[:60], ("late", "i1", 5, 1), ("late", "i1", 5, 2)], rest[60:]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, days: list[list[Event]]) -> Path:
    folder = tmp_path_factory.mktemp("late")
    out = prepare(memory_source(folder / "0", days[0], ITEMS), folder / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folding, "FACTOR", 2)  # version 4 is of one append with those of versions 2 and 3
        for number, day in enumerate(days[1:], 1):
            split = Split("date", train_until=SECONDS - 5, valid_until=SECONDS - 2) if number == 3 else None
            append_events(memory_source(folder / str(number), day, ITEMS), out, split=split)
    compact(out)
    return out


def named(dataset: Dataset, users: np.ndarray, places: np.ndarray) -> Counter[tuple[str, str, int]]:
    """Raw (user, item, second) of events, by their places."""
    raw_users, raw_items = dataset.users["raw_user_id"].to_pylist(), dataset.items["raw_item_id"].to_pylist()
    found: Counter[tuple[str, str, int]] = Counter()
    for user, place in zip(users.tolist(), places.tolist(), strict=True):
        events = dataset.user_events(user)
        found[raw_users[user - 1], raw_items[events.item_ids[place] - 1], int(events.timestamps[place])] += 1
    return found


@pytest.mark.parametrize("version", [1, 2, 3, 4])
@pytest.mark.parametrize("newest", [4, 5])
def test_late_events_are_those_of_later_versions_before_the_second(root, days, version, newest) -> None:
    dataset = Dataset.open(root, newest)  # folded appends, and one base
    users, places = late_events(dataset, str(root), version, SINCE)
    expected = Counter((e[0], e[1], e[3]) for day in days[version:] for e in day if e[3] < SINCE)
    assert named(dataset, users, places) == expected and (np.diff(users) >= 0).all()
    assert len(expected) > 60 or version > 2


def test_repeated_events_that_were_kept_are_late_as_often_as_they_came(tmp_path: Path) -> None:
    base = [("u1", "i1", 5, 10), ("u1", "i1", 5, 10), *(("u2", "i1", 5, 70 + n) for n in range(9))]
    out = prepare(memory_source(tmp_path / "0", base, ITEMS), tmp_path / "out", policy=BadRows())
    day = [("u1", "i2", 5, 10), ("u1", "i2", 5, 10), ("u2", "i2", 5, 5)]
    append_events(memory_source(tmp_path / "1", day, ITEMS), out, policy=BadRows())
    dataset = Dataset.open(out)
    found = named(dataset, *late_events(dataset, str(out), 1, 60))
    assert found == Counter({("u1", "i2", 10): 2, ("u2", "i2", 5): 1})


@pytest.mark.parametrize("since", [SINCE, SECONDS - 6])
def test_an_increment_trains_on_new_and_late_events_once_and_sees_only_what_was_before(root: Path, since: int) -> None:
    dataset = Dataset.open(root)
    late = late_events(dataset, str(root), 2, since)
    collator = Collator(dataset, BatchSpec(fusion="late"), training=True)
    found: list[tuple[int, int]] = []
    for rank in range(2):
        loader = Loader(dataset, collator, LoaderSpec("train", 3, 6, since=since, late=late), rank, 2)
        for batch in loader.batches(0):
            piece = torch.repeat_interleave(torch.arange(batch.user_ids.numel()), batch.query_offsets.diff())
            users = batch.user_ids[piece[batch.target_query]].tolist()
            found += zip(users, batch.positions.tolist(), strict=True)
            for user, place, seen in zip(users, batch.positions.tolist(), batch.history_lengths.tolist(), strict=True):
                times = dataset.user_events(user).timestamps
                assert seen == (times[:place] < times[place]).sum()
    expected = list(zip(*(column.tolist() for column in late), strict=True))
    for user in range(1, dataset.num_users):
        times = dataset.user_events(user).timestamps
        expected += [(user, place) for place in np.flatnonzero((times >= since) & (times < SECONDS - 5)).tolist()]
    assert sorted(found) == sorted(expected) and len(late[0]) > 50


def test_without_late_events_an_increment_is_as_before(root: Path) -> None:
    dataset = Dataset.open(root)
    late = late_events(dataset, str(root), dataset.version, SINCE)
    collator = Collator(dataset, BatchSpec(fusion="late"), training=True)
    pieces = [
        Loader(dataset, collator, LoaderSpec("train", 3, 6, since=SINCE, late=one)).pieces for one in (None, late)
    ]
    assert str(pieces[0]) == str(pieces[1]) and not late[0].size


def test_late_after_needs_a_second() -> None:
    with pytest.raises(ConfigError, match="train_late_after: needs data.train_since"):
        load_config(["--item_llm.enabled=false", "--data.train_late_after=2"])
