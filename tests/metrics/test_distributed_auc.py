"""One start of two gloo ranks answers every question here: starting is what takes the time."""

import math
import resource
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from hllm_torchrec.metrics.auc import roc_auc
from hllm_torchrec.metrics.score_chunks import MemoryPool, SortedChunks
from tests.helpers.distributed import run_ranks

Columns = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def rows(name: str) -> Columns:
    """All ranks' rows of a case: labels, scores, weights."""
    random = np.random.default_rng(len(name))
    count = 2000
    labels = random.random(count) < 0.3
    scores = random.normal(size=count) + labels
    weights = None
    match name:
        case "ties":
            scores = np.round(scores, 1)
        case "weights":
            weights = random.random(count)
        case "constant scores":
            scores = np.full(count, 0.25)
        case "one class":
            labels = np.ones(count, dtype=bool)
        case "infinities":
            scores[:500:2], scores[1:500:2] = math.inf, -math.inf
        case "sorted across ranks":
            order = np.argsort(-scores)
            labels, scores = labels[order], scores[order]
        case "nothing":
            labels, scores = labels[:0], scores[:0]
    return labels, scores, weights


CASES = [
    "distinct scores",
    "ties",
    "weights",
    "constant scores",
    "one class",
    "infinities",
    "sorted across ranks",
    "nothing",
]

PARTS = {"even": [0.5], "uneven": [0.1], "empty first rank": [0.0], "empty last rank": [1.0]}


def part_of_rank(columns: Columns, shares: list[float], rank: int) -> Columns:
    cuts = [0, *(int(share * len(columns[0])) for share in shares), len(columns[0])]
    mine = slice(cuts[rank], cuts[rank + 1])
    labels, scores, weights = columns
    return labels[mine], scores[mine], None if weights is None else weights[mine]


def measure() -> dict[str, object]:
    """Runs on each of two ranks."""
    rank = dist.get_rank()
    results: dict[str, object] = {}
    for case in CASES:
        for part, shares in PARTS.items():
            results[f"{case}, {part}"] = roc_auc(*part_of_rank(rows(case), shares, rank))
    results["subgroup"] = roc_auc([0, 1, rank], [0.5, 0.4, 0.3], group=dist.new_group([0, 1]))
    own = dist.new_group([0]), dist.new_group([1])
    results["group of one"] = roc_auc([0, 1], [rank, 0.5], group=own[rank])
    try:
        roc_auc([0, 1], [0.1, math.nan if rank == 1 else 0.2])
    except ValueError as error:
        results["error"] = str(error)
    scores = np.sort(np.random.default_rng(rank).normal(size=10_000) * (1 + 9 * rank))
    chunks = SortedChunks(MemoryPool(1 << 30, Path()), scores.dtype, weighted=False)
    chunks.add(scores, scores > 0)
    ((_, tied, _),) = chunks.split_ranges()
    results["range"] = len(tied.scores), tied.scores.min(), tied.scores.max()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results["large"] = roc_auc(np.arange(1_000_000) % 3 == 0, np.full(1_000_000, 0.5))
    results["large_kib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return results


@pytest.fixture(scope="module")
def two_ranks() -> list[dict]:
    return run_ranks(measure, 2)


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one(two_ranks: list[dict], case: str, part: str) -> None:
    expected = roc_auc(*rows(case))
    tolerance = 1e-13 if case == "weights" else 0.0
    for rank in two_ranks:
        assert rank[f"{case}, {part}"] == pytest.approx(expected, abs=tolerance, rel=0, nan_ok=True)


@pytest.mark.slow
def test_a_process_group_can_be_given(two_ranks: list[dict]) -> None:
    assert two_ranks[0]["subgroup"] == two_ranks[1]["subgroup"] == roc_auc([0, 1, 0, 0, 1, 1], [0.5, 0.4, 0.3] * 2)
    assert [rank["group of one"] for rank in two_ranks] == [1.0, 0.0]


@pytest.mark.slow
def test_a_bad_row_raises_on_every_rank_and_names_its_rank(two_ranks: list[dict]) -> None:
    for rank in two_ranks:
        assert "rank 1: scores: row 1 is nan" in rank["error"]


@pytest.mark.slow
def test_score_ranges_are_apart_and_of_about_equal_size(two_ranks: list[dict]) -> None:
    (low_rows, _, low_high), (high_rows, high_low, _) = (rank["range"] for rank in two_ranks)
    assert low_high < high_low
    assert low_rows + high_rows == 20_000
    assert max(low_rows, high_rows) <= 1.25 * 10_000


@pytest.mark.slow
def test_constant_scores_need_memory_for_a_ranks_own_rows_only(two_ranks: list[dict]) -> None:
    for rank in two_ranks:
        assert rank["large"] == 0.5
        assert rank["large_kib"] < 150 * 1024  # a million rows of float64 are 8 MB a column
