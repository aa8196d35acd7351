"""Exact statistics from sorted runs: properties over drawn rows, against a loop over all pairs."""

import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hllm_torchrec.metrics import exact_auc
from hllm_torchrec.metrics.exact_auc import Placements, RankStatistics, rank_statistics
from hllm_torchrec.metrics.score_chunks import RANGE_BYTES, MemoryPool, SortedChunks

SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 5e-324, -5e-324, 1e-40, math.inf, -math.inf, 3.4e38, -3.4e38]
SCORES = st.one_of(st.sampled_from(SPECIAL), st.floats(allow_nan=False), st.integers(-3, 3).map(float))
WEIGHTS = st.sampled_from([1e-100, 1e-20, 0.5, 1.0, 3.0, 1e20, 1e100])
ROWS = st.lists(st.tuples(st.booleans(), SCORES, WEIGHTS), min_size=1, max_size=40)
MEMORY = st.sampled_from([1 << 30, 4096, 700])
"""Bytes: in the last two cases rows spill into several runs and ranges."""

Columns = tuple[np.ndarray, np.ndarray, np.ndarray]


def columns(rows: list[tuple[bool, float, float]]) -> Columns:
    label, score, weight = zip(*rows)
    return np.array(label), np.array(score, dtype=np.float64), np.array(weight)


def statistics(
    label: np.ndarray,
    score: np.ndarray,
    weight: np.ndarray | None = None,
    memory: int = 1 << 30,
    kind: type = np.float64,
    batch: int = 7,
) -> tuple[RankStatistics, np.ndarray]:
    """Statistics, and each row's placement, of rows that come in batches."""
    with tempfile.TemporaryDirectory() as folder:
        runs = SortedChunks(MemoryPool(memory, Path(folder)), np.dtype(kind), weight is not None)
        for first in range(0, len(label), batch):
            part = slice(first, first + batch)
            runs.add(score[part].astype(kind), label[part], None if weight is None else weight[part])
        found, placements = rank_statistics(runs, keep=True)
        assert isinstance(placements, Placements)
        return found, placements.look_up(score.astype(kind), label)


@pytest.mark.parametrize("block", [1, 7, 64])
def test_the_curve_does_not_depend_on_how_scores_are_cut(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(block)
    label, score = rng.random(900) < 0.3, rng.integers(0, 400, 900) / 400
    whole, _ = statistics(label, score)
    monkeypatch.setattr(exact_auc, "BLOCK", block)
    assert np.array_equal(statistics(label, score)[0].curve, whole.curve)
    assert np.array_equal(statistics(label, score, memory=1000)[0].curve, whole.curve)  # several ranges, too


def naive_placements(label: np.ndarray, score: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The weighted share of the other class that each row is ranked right against, pair by pair."""
    values = np.full(len(label), math.nan)
    for i in range(len(label)):
        right = total = 0.0
        for j in range(len(label)):
            if label[i] != label[j]:
                ahead, behind = (score[i], score[j]) if label[i] else (score[j], score[i])
                right += weight[j] * (1.0 if ahead > behind else 0.5 if ahead == behind else 0.0)
                total += weight[j]
        values[i] = right / total if total else math.nan
    return values


def naive_error(label: np.ndarray, values: np.ndarray, weight: np.ndarray, auc: float) -> float:
    """The standard error as `measure` documents it."""
    variance = 0.0
    for of_class in (label, ~label):
        share, rows = weight[of_class] / weight[of_class].sum(), of_class.sum()
        if rows < 2:
            return math.nan
        variance += rows / (rows - 1) * (share**2 * (values[of_class] - auc) ** 2).sum()
    return math.sqrt(variance)


@given(ROWS, MEMORY, st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_loop_over_all_pairs_agrees(rows: list[tuple[bool, float, float]], memory: int, weighted: bool) -> None:
    label, score, weight = columns(rows)
    weight = weight if weighted else np.ones(len(label))
    found, placements = statistics(label, score, weight if weighted else None, memory)
    expected = naive_placements(label, score, weight)
    if not 0 < label.sum() < len(label):
        assert math.isnan(found.interval.auc) and math.isnan(found.metrics["pr_auc"])
        return
    auc = np.average(expected[label], weights=weight[label])
    assert found.interval.auc == pytest.approx(auc, abs=1e-12)
    assert placements == pytest.approx(expected, abs=1e-12)
    error = naive_error(label, expected, weight, auc)
    assert found.interval.standard_error == pytest.approx(error, abs=1e-7, nan_ok=True)


@given(ROWS, MEMORY)
@settings(max_examples=60, deadline=None)
def test_a_monotone_transform_changes_nothing(rows: list[tuple[bool, float, float]], memory: int) -> None:
    label, score, weight = columns(rows)
    ranks = np.unique(score, return_inverse=True)[1].astype(np.float64)
    for weights in (None, weight):
        found, other = (statistics(label, values, weights, memory)[0] for values in (score, ranks**3 - 5))
        assert numbers(found) == pytest.approx(numbers(other), abs=1e-13, nan_ok=True)


@given(ROWS, MEMORY)
@settings(max_examples=60, deadline=None)
def test_flipping_labels_or_scores_mirrors_the_auc(rows: list[tuple[bool, float, float]], memory: int) -> None:
    label, score, weight = columns(rows)
    auc = statistics(label, score, weight, memory)[0].interval.auc
    flipped = statistics(~label, score, weight, memory)[0].interval.auc
    negated = statistics(label, -score, weight, memory)[0].interval.auc
    assert flipped == pytest.approx(1 - auc, abs=1e-12, nan_ok=True)
    assert negated == pytest.approx(1 - auc, abs=1e-12, nan_ok=True)


@given(ROWS, st.integers(2, 4), MEMORY)
@settings(max_examples=60, deadline=None)
def test_copies_of_all_rows_equal_whole_weights(
    rows: list[tuple[bool, float, float]], copies: int, memory: int
) -> None:
    label, score, _ = columns(rows)
    once = statistics(label, score, None, memory)[0].interval.auc
    tiled = statistics(np.tile(label, copies), np.tile(score, copies), None, memory)[0].interval.auc
    weighted = statistics(label, score, np.full(len(label), float(copies)), memory)[0].interval.auc
    assert tiled == pytest.approx(once, abs=1e-15, nan_ok=True)
    assert weighted == pytest.approx(once, abs=1e-13, nan_ok=True)


@given(ROWS, MEMORY, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_order_and_memory_change_no_bit_without_weights(
    rows: list[tuple[bool, float, float]], memory: int, random: object
) -> None:
    label, score, _ = columns(rows)
    order = np.array(random.sample(range(len(label)), len(label)), dtype=int)  # type: ignore[attr-defined]
    found = statistics(label, score)[0].interval.auc
    assert str(statistics(label[order], score[order], None, memory, batch=3)[0].interval.auc) == str(found)


def test_float32_scores_keep_denormals_and_signs_of_zero_tie() -> None:
    score = np.array([1e-45, 0.0, -0.0, -1e-45, np.inf, -np.inf], dtype=np.float32)
    label = np.array([True, False, True, False, True, False])
    for memory in (1 << 30, 700):
        found, placements = statistics(label, score.astype(np.float64), None, memory, np.float32, batch=2)
        assert found.interval.auc == pytest.approx((3 + 2.5 + 3) / 9)
        assert placements.tolist() == pytest.approx([1, 1 - 0.5 / 3, 2.5 / 3, 1, 1, 1])


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_many_rows_in_little_memory(kind: type) -> None:
    """A range stays within its share: the largest has at most 1.25 times the average, and a row a run more."""
    random = np.random.default_rng(0)
    label, score = random.random(30_000) < 0.1, random.normal(size=30_000)
    with tempfile.TemporaryDirectory() as folder:
        pool = MemoryPool(200_000, Path(folder))
        runs = SortedChunks(pool, np.dtype(kind), False)
        for first in range(0, 30_000, 500):
            runs.add(score[first : first + 500].astype(kind), label[first : first + 500])
            assert pool.buffered <= 200_000 // 16
        ranges = runs.split_ranges()
        sizes = [len(tied.scores) for _, tied, _ in ranges]
        assert pool.sorted_bytes <= 200_000 // 4 and pool.spilled > 100_000
        assert len(sizes) == -(-sum(len(run.scores) for run in runs._chunks) * RANGE_BYTES[False] // 200_000)
        assert max(sizes) <= 1.25 * sum(sizes) / len(sizes) + len(runs._chunks)


def test_constant_scores_need_no_memory() -> None:
    with tempfile.TemporaryDirectory() as folder:
        pool = MemoryPool(1 << 16, Path(folder))
        runs = SortedChunks(pool, np.dtype(np.float32), False)
        for _ in range(40):
            runs.add(np.zeros(1000, np.float32), np.arange(1000) % 4 == 0)
        found, _ = rank_statistics(runs)
        assert found.interval.auc == 0.5 and found.rows == 40_000 and found.positives == 10_000
        assert pool.spilled == 0 and runs.split_ranges().per_rank == 1


def numbers(found: RankStatistics) -> list[float]:
    recalls = found.metrics["recall_at_precision"].values()
    return [found.interval.auc, found.interval.standard_error, found.metrics["pr_auc"], *recalls]
