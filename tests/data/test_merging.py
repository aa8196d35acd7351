"""Events of several files by user: any range of any users is what sorting everything gives."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hllm_torchrec.data.event_files import EventFile, write_event_file
from hllm_torchrec.data.events import Events
from hllm_torchrec.data.merging import UserEvents
from hllm_torchrec.data.validation import TableRows

ROWS = TableRows(items=50, users=30, actions=6)
NAMES = ("item_ids", "timestamps", "labels", "actions")


def make_files(folder: Path, late: bool) -> list[EventFile]:
    """Files of random users with up to five events each; late: seconds of all files overlap."""
    rng, found = np.random.default_rng(0), []
    for number in range(5):
        users = np.sort(rng.choice(np.arange(1, 30), 18, replace=False))
        lengths = rng.integers(1, 6, users.size)
        first = 0 if late else 10 * number
        seconds = np.concatenate([np.sort(rng.integers(first, first + 11, n)) for n in lengths])
        values = {"item_ids": rng.integers(50, size=seconds.size), "actions": rng.integers(6, size=seconds.size)}
        events = Events.at(seconds, labels=rng.integers(0, 2, seconds.size), **values)
        path = folder / f"{number}.arrow"
        write_event_file(path, users, lengths, events)
        found.append(EventFile.open(path, ROWS, [first, first + 10]))
    return found


def naive(files: list[EventFile], user: int) -> list[tuple[Any, ...]]:
    """A user's events in the order of (second, file, row)."""
    found = []
    for number, file in enumerate(files):
        for row in np.flatnonzero(file.user_ids == user):
            for at in range(file.offsets[row], file.offsets[row + 1]):
                found.append((file.events.timestamps[at], number, at, *(getattr(file.events, n)[at] for n in NAMES)))
    return [one[3:] for one in sorted(found)]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("users", [range(1, 30), [3, 4, 17, 29], [5]])
def test_any_range_of_any_users_is_what_sorting_everything_gives(tmp_path: Path, users: Any, late: bool) -> None:
    files, chosen, rng = make_files(tmp_path, late), np.array(users), np.random.default_rng(1)
    whole = [naive(files, user) for user in chosen.tolist()]
    lengths = np.array([len(one) for one in whole])
    for start in (np.zeros_like(lengths), rng.integers(0, lengths + 1), np.maximum(lengths - 2, 0)):
        end = rng.integers(start, lengths + 1)
        expected = [event for one, a, b in zip(whole, start, end, strict=True) for event in one[a:b]]
        for known in (False, True) if not late else (False,):
            found = UserEvents(files, chosen, ROWS, in_order=known).read(NAMES, start, end)
            assert list(zip(*(found[name].tolist() for name in NAMES), strict=True)) == expected
            assert [found[name].dtype for name in NAMES] == [np.int64, np.int64, np.float32, np.int64]
        only = UserEvents(files, chosen, ROWS, in_order=not late).read(["actions"], start, end)
        assert only["actions"].tolist() == [event[3] for event in expected]


def test_users_of_no_file_have_no_events(tmp_path: Path) -> None:
    none = np.zeros(1, np.int64)
    for files in ([], make_files(tmp_path, late=False)):
        found = UserEvents(files, np.array([0]), ROWS, in_order=False).read(NAMES, none, none)
        assert {name: values.size for name, values in found.items()} == dict.fromkeys(NAMES, 0)


@pytest.mark.parametrize("late", [False, True])
def test_a_value_that_is_not_allowed_is_named_with_its_file(tmp_path: Path, late: bool) -> None:
    files = make_files(tmp_path, late)
    users = np.arange(1, 30)
    lengths = np.array([len(naive(files, user)) for user in users.tolist()])
    column = files[3].events.item_ids
    path = tmp_path / "3.arrow"
    path.write_bytes(
        path.read_bytes().replace(column.tobytes(), np.where(np.arange(column.size) == 7, 50, column).tobytes())
    )
    files[3] = EventFile.open(path, ROWS, files[3].seconds)
    row = int(np.searchsorted(files[3].offsets, 7, side="right")) - 1
    with pytest.raises(ValueError, match=rf"3\.arrow, row {row}: item_ids\[\d\] is 50; .*0\.\.49"):
        UserEvents(files, users, ROWS, in_order=not late).read(NAMES, np.zeros_like(lengths), lengths)


def test_bounds_that_contradict_the_events_are_an_error_not_another_order(tmp_path: Path) -> None:
    files, users = make_files(tmp_path, late=True), np.arange(1, 30)
    lengths = np.array([len(naive(files, user)) for user in users.tolist()])
    with pytest.raises(ValueError, match="merged events, row .* it is earlier than the one before it"):
        UserEvents(files, users, ROWS, in_order=True).read(NAMES, np.zeros_like(lengths), lengths)


def test_events_before_a_second_are_counted_alike_with_and_without_bounds(tmp_path: Path) -> None:
    for file in make_files(tmp_path, late=False):
        unknown = EventFile.open(file.path, ROWS)
        for second in (0, 10, 25, 44, 60):
            expected = [
                int((file.events.timestamps[a:b] < second).sum()) for a, b in zip(file.offsets, file.offsets[1:])
            ]
            assert file.lengths_before(second).tolist() == unknown.lengths_before(second).tolist() == expected
