"""Nothing of the same second is history: the rule against a naive loop, and that it stands in one place only."""

import ast
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hllm_torchrec.data.jagged_arrays import offsets_from_lengths
from hllm_torchrec.data.visibility import visible_at_each_event, visible_before

ROOT = Path(__file__).resolve().parents[2]
SEARCHES = {
    "hllm_torchrec/data/collate.py": 2,  # of rows among those that are read
    "hllm_torchrec/data/creative_loader.py": 2,  # of costs, of users
    "hllm_torchrec/data/creative_table.py": 1,  # of the parts of a split
    "hllm_torchrec/data/dataset_compaction.py": 1,  # of files
    "hllm_torchrec/data/drawn_negatives.py": 1,  # of shares of draws
    "hllm_torchrec/data/event_files.py": 3,  # of users
    "hllm_torchrec/data/folding.py": 1,  # of users
    "hllm_torchrec/data/item_statistics.py": 2,  # of items, and of an item's seconds before one
    "hllm_torchrec/data/loader.py": 4,  # of costs, of row groups, of users
    "hllm_torchrec/data/part_reader.py": 1,  # of events read ahead
    "hllm_torchrec/data/split.py": 1,  # of digits
    "hllm_torchrec/data/validation.py": 1,  # of rows
    "hllm_torchrec/data/visibility.py": 2,
    "hllm_torchrec/downstream/dlrm_data.py": 1,  # of exposures by row
    "hllm_torchrec/inference/exposure_times.py": 1,  # of stored moments of a user
    "hllm_torchrec/inference/raw_ids.py": 1,  # of hashes
    "hllm_torchrec/store/segment.py": 2,  # of hashes, of files
}
"""Searches in sorted arrays in all packages that know users' events: a new one says here what it searches."""
PACKAGES = ("baselines", "data", "downstream", "inference", "models", "planning", "serving", "store", "training")

USERS = st.lists(st.lists(st.integers(0, 6), max_size=8).map(sorted), max_size=5)


@given(st.lists(st.integers(0, 9), max_size=12).map(sorted), st.lists(st.integers(-1, 10), max_size=5))
def test_only_events_strictly_before_the_request_are_visible(times: list[int], requests: list[int]) -> None:
    expected = [sum(second < request for second in times) for request in requests]
    array = np.array(times, np.int64)
    assert visible_before(array, np.array(requests, np.int64)).tolist() == expected
    assert [visible_before(array, request) for request in requests] == expected


@given(USERS, st.integers(0, 7))
def test_many_users_at_once_see_what_each_sees_alone(users: list[list[int]], delay: int) -> None:
    times, offsets = np.array(sum(users, []), np.int64), offsets_from_lengths([len(user) for user in users])
    alone = [visible_before(np.array(user, np.int64), np.array(user, np.int64) - delay) for user in users]
    assert visible_at_each_event(times, offsets, delay).tolist() == np.concatenate([*alone, []]).tolist()


def searches(source: str) -> Iterator[ast.Call]:
    """Calls of numpy's, torch's and the standard library's binary searches."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("searchsorted", "bisect", "bisect_left", "bisect_right", "digitize", "bucketize"):
                yield node


@pytest.mark.parametrize("line", ["np.searchsorted(a, b)", "torch.bucketize(t, x)", "times.searchsorted(at)"])
def test_a_search_written_elsewhere_is_noticed(line: str) -> None:
    assert len(list(searches(f"def f(a):\n    return {line}"))) == 1


def test_no_other_search_among_times_is_left() -> None:
    files = [path for name in PACKAGES for path in sorted((ROOT / "hllm_torchrec" / name).rglob("*.py"))]
    found = {str(path.relative_to(ROOT)): len(list(searches(path.read_text()))) for path in files}
    assert {name: count for name, count in found.items() if count} == SEARCHES
