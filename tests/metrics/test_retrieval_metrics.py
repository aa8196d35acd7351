import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.metrics import ndcg_score
from torch.utils._python_dispatch import TorchDispatchMode

from hllm_torchrec.metrics.retrieval_metrics import (
    BLOCK_SIZE,
    retrieval_metrics,
    target_ranks,
)
from tests.helpers.distributed import run_ranks
from tests.helpers.metric_oracles import catalogue_ranks


def naive_rank(scores: torch.Tensor, target: int, seen: list[int]) -> int:
    """Sorts the candidates; among equal scores the target comes last."""
    candidates = [item for item in range(1, len(scores)) if item == target or item not in seen]
    order = sorted(candidates, key=lambda item: (-float(scores[item]), item == target))
    return 1 + order.index(target)


def example(seed: int, rows: int = 12, items: int = 37) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    random = np.random.default_rng(seed)
    scores = torch.from_numpy(np.round(random.normal(size=(rows, items)), 1)).float()
    targets = torch.from_numpy(random.integers(1, items, rows))
    seen = [random.integers(0, items, random.integers(0, 9)).tolist() for _ in range(rows)]
    return scores, targets, seen


def jagged(seen: list[list[int]]) -> dict[str, Any]:
    lengths = torch.tensor([0, *map(len, seen)])
    values = torch.tensor([item for row in seen for item in row], dtype=torch.int64)
    return {"seen_items_S": values, "seen_offsets": lengths.cumsum(0)}


@pytest.mark.parametrize("block_size", [1, 5, 36, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_ranks_equal_a_naive_sort_with_ties_and_seen_items(seed: int, block_size: int) -> None:
    scores, targets, seen = example(seed)
    before = scores.clone()
    ranks = target_ranks(scores, targets, **jagged(seen), block_size=block_size)
    assert ranks.tolist() == [naive_rank(row, int(t), s) for row, t, s in zip(scores, targets, seen)]
    unfiltered = target_ranks(scores, targets, block_size=block_size)
    assert unfiltered.tolist() == [naive_rank(row, int(target), []) for row, target in zip(scores, targets)]
    assert torch.equal(scores, before)


@pytest.mark.parametrize("block_size", [7, 1000])
def test_catalogue_ranks_equal_the_ranks_of_the_full_product(block_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, items = (torch.randn(n, 8, generator=generator) for n in (20, 50))
    targets = torch.randint(1, 50, (20,), generator=generator)
    seen = jagged([[1, 2, 2, int(target)] for target in targets])
    expected = target_ranks(queries.double() @ items.double().T, targets, **seen)
    assert torch.equal(catalogue_ranks(queries, items, targets, **seen, block_size=block_size), expected)


def test_half_precision_items_are_scored_in_float32() -> None:
    generator = torch.Generator().manual_seed(1)
    items = torch.randn(30, 16, generator=generator).half()
    queries = torch.randn(5, 16, generator=generator)
    targets = torch.tensor([1, 2, 3, 4, 29])
    assert torch.equal(
        catalogue_ranks(queries, items, targets), target_ranks(queries.double() @ items.double().T, targets)
    )


@pytest.mark.parametrize("width", [3, 64, 2048])
def test_a_collapsed_model_is_last_everywhere(width: int) -> None:
    generator = torch.Generator().manual_seed(2)
    item = torch.nn.functional.normalize(torch.randn(1, width, generator=generator))
    queries = torch.nn.functional.normalize(torch.randn(6, width, generator=generator))
    ranks = catalogue_ranks(queries, item.expand(101, width), torch.arange(1, 7), block_size=17)
    assert ranks.tolist() == [100] * 6
    assert target_ranks(torch.ones(6, 101), torch.arange(1, 7)).tolist() == [100] * 6


def test_the_unknown_item_is_never_ranked() -> None:
    assert target_ranks(torch.tensor([[9.0, 1.0, 0.0]]), torch.tensor([1])).tolist() == [1]


def test_a_nan_score_never_makes_a_rank_better() -> None:
    scores = torch.tensor([[0.0, 1.0, math.nan, 0.5]])
    assert target_ranks(scores, torch.tensor([1])).tolist() == [2]
    with pytest.raises(ValueError, match="the target of row 0, item 2, scores nan; .* must be finite"):
        target_ranks(scores, torch.tensor([2]))


@pytest.mark.parametrize("target", [0, 3, -1])
def test_a_target_outside_the_catalogue_is_named(target: int) -> None:
    for rank in (
        lambda t: target_ranks(torch.zeros(2, 3), t),
        lambda t: catalogue_ranks(torch.zeros(2, 4), torch.zeros(3, 4), t),
    ):
        with pytest.raises(ValueError, match=rf"target: row 1 is {target}; targets are item ids in 1\.\.2"):
            rank(torch.tensor([1, target]))


def test_each_row_needs_one_target() -> None:
    with pytest.raises(ValueError, match=r"target has shape \(3,\); one target a row is expected: \(2,\)"):
        target_ranks(torch.zeros(2, 3), torch.tensor([1, 1, 1]))


@pytest.mark.parametrize("offsets", [[0, 1], [0, 2, 1], [1, 1, 2], [0, 1, 3], [0, 3, 2]])
def test_offsets_that_do_not_fit_are_named(offsets: list[int]) -> None:
    with pytest.raises(ValueError, match="seen_offsets of length .* does not divide 2 seen items among 2 rows"):
        target_ranks(
            torch.zeros(2, 3),
            torch.tensor([1, 1]),
            seen_items_S=torch.tensor([1, 2]),
            seen_offsets=torch.tensor(offsets),
        )
    with pytest.raises(ValueError, match="belong together; pass both or neither"):
        target_ranks(torch.zeros(1, 3), torch.tensor([1]), seen_items_S=torch.tensor([1]))


def test_a_rank_is_found_by_every_cut_off_beyond_the_items_left() -> None:
    """All but the target and one item are seen: it is first or second, and K = 10 must find it."""
    queries, items = torch.eye(3)[:1], torch.eye(3).repeat(10, 1)
    seen = torch.tensor([i for i in range(1, 30) if i not in (4, 6)])
    ranks = catalogue_ranks(
        queries, items, torch.tensor([4]), seen_items_S=seen, seen_offsets=torch.tensor([0, len(seen)])
    )
    assert ranks.tolist() == [2]
    assert retrieval_metrics(ranks, ks=(1, 10, 200))["recall@200"] == 1.0


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        made = [x for x in (result if isinstance(result, tuple | list) else [result]) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *(x.numel() for x in made)])
        return result


def test_memory_does_not_grow_with_a_catalogue_of_700_000_items() -> None:
    generator = torch.Generator().manual_seed(6)
    queries, items = torch.randn(48, 4, generator=generator), torch.randn(700_000, 4, generator=generator)
    targets = torch.randint(1, 700_000, (48,), generator=generator)
    with Largest() as made:
        ranks = catalogue_ranks(queries, items, targets)
    assert made.elements <= 48 * BLOCK_SIZE
    scores = items[1:] @ queries[7]
    better = int((scores > scores[targets[7] - 1]).sum())
    assert better < ranks[7] <= better + 20, "a few of so many score within the tolerance of ties"


def test_metrics_of_a_hand_example() -> None:
    metrics = retrieval_metrics(torch.tensor([1, 3, 11, 2]), ks=(1, 10))
    assert metrics == pytest.approx(
        {
            "rows": 4,
            "mrr": (1 + 1 / 3 + 1 / 11 + 1 / 2) / 4,
            "recall@1": 0.25,
            "hr@1": 0.25,
            "ndcg@1": 0.25,
            "recall@10": 0.75,
            "hr@10": 0.75,
            "ndcg@10": (1 + 1 / 2 + 1 / math.log2(3)) / 4,
        }
    )


def test_ndcg_equals_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(40, 30, generator=generator)
    targets = torch.randint(1, 30, (40,), generator=generator)
    relevance = torch.nn.functional.one_hot(targets, 30)
    for k in (1, 5, 20):
        expected = ndcg_score(relevance[:, 1:].numpy(), scores[:, 1:].numpy(), k=k)
        assert retrieval_metrics(target_ranks(scores, targets), ks=(k,))[f"ndcg@{k}"] == pytest.approx(expected)


def test_metrics_without_rows_are_none() -> None:
    metrics = retrieval_metrics(torch.empty(0, dtype=torch.int64), ks=(5,))
    assert metrics == {"rows": 0, "mrr": None, "recall@5": None, "hr@5": None, "ndcg@5": None}


def test_bad_ranks_and_cut_offs_are_named() -> None:
    with pytest.raises(ValueError, match="ranks: row 1 is 0; ranks start at 1"):
        retrieval_metrics(torch.tensor([3, 0]))
    with pytest.raises(ValueError, match=r"ks is \(0, 5\); every cut-off is at least 1"):
        retrieval_metrics(torch.tensor([3]), ks=(0, 5))


def metrics_of_a_part(ranks: torch.Tensor) -> list[dict]:
    rank = dist.get_rank()
    uneven = retrieval_metrics(ranks[:13] if rank == 0 else ranks[13:])
    return [uneven, retrieval_metrics(ranks if rank == 0 else ranks[:0])]


@pytest.mark.slow
def test_two_ranks_equal_one() -> None:
    ranks = torch.randint(1, 300, (100,), generator=torch.Generator().manual_seed(4))
    expected = pytest.approx(retrieval_metrics(ranks), rel=1e-14)
    for results in run_ranks(metrics_of_a_part, 2, ranks):
        assert results[0] == expected
        assert results[1] == expected
