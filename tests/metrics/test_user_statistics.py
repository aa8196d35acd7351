"""`UserBuckets` with any distribution of rows over users: the same values as in memory, within the memory limit."""

import dataclasses
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from hllm_torchrec.metrics.group_auc import NO_USER
from hllm_torchrec.metrics.score_chunks import MemoryPool
from hllm_torchrec.metrics.user_statistics import UserBuckets, UserStatistics, order_keys, record_type

SMALL = 1 << 16
"""Bytes: rows of one part are at most some 130."""


def records(users: np.ndarray, *, weighted: bool = False, ties: bool = False, seed: int = 0) -> np.ndarray:
    """Random rows of two models for the given user of each row, in random order; some users have only one class."""
    random = np.random.default_rng(seed)
    rows = np.empty(len(users), record_type(2))
    rows["user"] = random.permutation(users)
    rows["positive"] = (random.random(len(users)) < 0.3) & (rows["user"] % 7 != 0)
    rows["weight"] = random.random(len(users)) + 0.01 if weighted else 1.0
    scores = random.normal(size=(len(users), 2)) + rows["positive"][:, None]
    rows["score"] = order_keys(np.round(scores, 1) if ties else scores)
    rows["influence"] = random.normal(size=(len(users), 2))
    return rows


def statistics(rows: np.ndarray, memory: int, folder: Path) -> UserStatistics:
    """Statistics of rows that are added in batches."""
    buckets = UserBuckets(MemoryPool(memory, folder), 2, len(rows))
    for first in range(0, len(rows), 1000):
        buckets.add(rows[first : first + 1000])
    return buckets.statistics(2)


def assert_same(found: UserStatistics, right: UserStatistics) -> None:
    for field in dataclasses.fields(UserStatistics):
        a, b = getattr(found, field.name), getattr(right, field.name)
        if isinstance(a, dict):
            assert a.keys() == b.keys()
            a, b = list(a.values()), list(b.values())
        np.testing.assert_allclose(a, b, rtol=1e-10, err_msg=field.name)


random = np.random.default_rng(1)
DISTRIBUTIONS = {
    "one user": np.ones(3000, np.int64),
    "one user with one class": np.full(3000, 7),
    "a user with half of the rows": np.where(random.random(3000) < 0.5, 3, random.integers(10, 800, 3000)),
    "the first, a middle and the last user are large": random.choice([-5, 40, 10**12, *range(30)], 3000),
    "many users of medium size": random.integers(0, 40, 3000),
    "small users": random.integers(0, 2000, 3000),
    "rows without a user": np.where(random.random(3000) < 0.5, 1, NO_USER + np.arange(3000)),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_small_memory_gives_the_values_of_large_memory(name: str, ties: bool, weighted: bool, tmp_path: Path) -> None:
    rows = records(DISTRIBUTIONS[name], weighted=weighted, ties=ties)
    (tmp_path / "small").mkdir()
    found = statistics(rows, SMALL, tmp_path / "small")
    assert_same(found, statistics(rows, 1 << 30, tmp_path))


@pytest.mark.parametrize("kind", ["one user", "one user, equal scores", "two users", "many users"])
def test_the_memory_is_bounded_for_any_distribution(kind: str, tmp_path: Path) -> None:
    count, memory = 300_000, 1 << 20
    users = {"two users": np.arange(count) % 2, "many users": np.arange(count) % 5000}
    rows = records(users.get(kind, np.ones(count, np.int64)))
    if "equal" in kind:
        rows["score"] = 5
    tracemalloc.start()
    try:
        statistics(rows, memory, tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Grouping all rows at once takes over 60 MB.
    assert peak < 6 * memory, f"{peak:,} bytes"
