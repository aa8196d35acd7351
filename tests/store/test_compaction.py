"""Many commits leave few runs, and no row is rewritten often."""

from pathlib import Path

import numpy as np
import pytest
import torch

from hllm_torchrec.store import EmbeddingStore, compaction
from hllm_torchrec.store.compaction import MAX_SEGMENTS, first_to_merge
from tests.store.test_store import WIDTH, commit, contents, create, vectors


def test_runs_are_merged_only_where_there_are_many() -> None:
    assert first_to_merge([5] * MAX_SEGMENTS) == MAX_SEGMENTS
    half = MAX_SEGMENTS // 2
    assert first_to_merge([10**9, *[5] * MAX_SEGMENTS]) == 1  # the newest, as equals; not the large one
    falling = [2**n for n in range(MAX_SEGMENTS, -1, -1)]
    assert first_to_merge(falling) == half  # each older run is larger than all newer together, but half must go


def test_ten_thousand_commits_rewrite_each_row_a_few_times() -> None:
    sizes: list[int] = []
    rewritten = longest = 0
    for number in range(10_000):
        sizes.append(1 + number % 3)
        first = first_to_merge(sizes)
        if first < len(sizes):
            rewritten += sum(sizes[first:])
            sizes[first:] = [sum(sizes[first:])]
        longest = max(longest, len(sizes))
    assert sum(sizes) == 19_999 and longest == MAX_SEGMENTS
    assert rewritten / sum(sizes) < 8


@pytest.mark.parametrize("large", [[], [10**6] * 32, [10**6 - n for n in range(40)], [10**9]])
def test_commits_of_very_unequal_sizes_rewrite_no_row_often(large: list[int]) -> None:
    draws = (10 ** np.random.default_rng(0).uniform(0, 4, 1_500)).astype(int).tolist()
    for commits in ([*large, *[1] * 3_000], [*large, *draws]):
        sizes: list[int] = []
        times: list[int] = []  # of each segment: how often the row in it that was rewritten most often was rewritten
        for size in commits:
            sizes, times = [*sizes, size], [*times, 0]
            first = first_to_merge(sizes)
            if first < len(sizes):
                sizes[first:], times[first:] = [sum(sizes[first:])], [1 + max(times[first:])]
            assert len(sizes) <= MAX_SEGMENTS
        assert max(times) <= 1 + np.log2(sum(commits))


def test_merged_runs_hold_what_they_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "MAX_SEGMENTS", 4)
    store, expected = create(tmp_path / "s"), {f"base{k}": float(k) for k in range(50)}
    commit(store, dict(expected))
    rng = np.random.default_rng(0)
    most = 0
    for number in range(20):
        changed: dict[str, float | None] = {f"k{int(k)}": float(number) for k in rng.integers(0, 9, 2)}
        changed |= {f"base{int(k)}": None for k in rng.integers(0, 50, 1)} | {f"k{int(rng.integers(0, 9))}": None}
        before = store.snapshot()
        held = contents(store)
        version = commit(store, changed)
        expected = {key: value for key, value in (expected | changed).items() if value is not None}
        snapshot = store.snapshot()
        assert contents(store) == expected and len(snapshot) == len(expected) and snapshot.version == version
        assert {k: float(v[0]) for keys, rows, _ in before.rows() for k, v in zip(keys.to_pylist(), rows)} == held
        most = max(most, len(snapshot.segments))
        assert {path.name for path in (tmp_path / "s" / "runs").iterdir()} == {run.name for run in snapshot.facts}
    assert most == 4 and store.verify() == []
    assert len(store.snapshot().segments[0].keys) == 50, "the large old run was left alone"


def test_deletions_that_no_older_run_needs_are_dropped_with_a_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "MAX_SEGMENTS", 2)
    store = create(tmp_path / "s")
    commit(store, {f"base{k}": 1.0 for k in range(20)})
    commit(store, {"a": 1.0, "b": 1.0})
    commit(store, {"a": None, "never": None, "base3": None})
    base, merged = store.snapshot().facts
    assert (base.rows, merged.rows, merged.deleted) == (20, 1, 1)
    assert set(contents(store)) == {f"base{k}" for k in range(20) if k != 3} | {"b"}


def test_a_store_of_nothing_but_deletions_compacts_to_nothing(tmp_path: Path) -> None:
    store = create(tmp_path / "s")
    commit(store, {"a": 1.0})
    commit(store, {"a": None, "b": None})
    store.compact()
    assert contents(store) == {} and len(store.snapshot()) == 0
    assert store.snapshot().segments == [] and list((tmp_path / "s" / "runs").iterdir()) == []


def test_in_a_commit_a_key_that_was_deleted_may_come_back(tmp_path: Path) -> None:
    store = create(tmp_path / "s")
    commit(store, {"a": 1.0, "b": 1.0})
    with store.writer() as writer:
        writer.delete(["a", "b"])
        writer.upsert(["a"], vectors(2))
        writer.commit()
    assert contents(store) == {"a": 2.0} and len(store.snapshot()) == 1
    with store.writer() as writer:
        writer.upsert(["a"], vectors(3))
        writer.delete(["a"])
        writer.commit()
    assert contents(store) == {} and len(store.snapshot()) == 0


def test_a_merge_does_not_touch_a_run_that_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "MAX_SEGMENTS", 2)
    store: EmbeddingStore = create(tmp_path / "s")
    with store.writer() as writer:
        others = store.segment_writer()  # as another rank's
        for number in range(4):
            writer.upsert([f"k{number}"], torch.ones(1, WIDTH))
            writer.commit()
        facts = others.finish()
        assert writer.commit([facts]) == store.snapshot().version
    assert set(contents(store)) == {"k0", "k1", "k2", "k3"}
