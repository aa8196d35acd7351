"""Ranks over a shared-out catalogue are those of one process that holds it whole."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from hllm_torchrec.metrics.distributed_ranking import (
    CatalogueShard,
    distributed_target_ranks,
    equal_chunks,
    shard_bounds,
)
from tests.helpers.distributed import run_ranks
from tests.helpers.metric_oracles import catalogue_ranks

Example = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def example(rows: int = 14, items: int = 41) -> Example:
    """Queries, items of which many are equal (and so tied), targets, and seen items with their offsets."""
    generator = torch.Generator().manual_seed(3)
    vectors = torch.randn(9, 6, generator=generator)[torch.randint(0, 9, (items,), generator=generator)]
    queries = torch.randn(rows, 6, generator=generator)
    targets = torch.randint(1, items, (rows,), generator=generator)
    lengths = torch.randint(0, 7, (rows,), generator=generator)
    seen = torch.randint(0, items, (int(lengths.sum()),), generator=generator)
    return queries, vectors, targets, seen, torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


def part(data: Example, first: int, end: int) -> dict[str, Any]:
    queries, _, targets, seen, offsets = data
    return {
        "queries_BD": queries[first:end],
        "target_B": targets[first:end],
        "seen_items_S": seen[offsets[first] : offsets[end]],
        "seen_offsets": offsets[first : end + 1] - offsets[first],
    }


@pytest.mark.parametrize("block_size", [4, 1000])
def test_one_process_finds_the_ranks_of_the_whole_catalogue(block_size: int) -> None:
    data = example()
    given = part(data, 0, 14)
    found = distributed_target_ranks(items=CatalogueShard.of_rank(data[1]), block_size=block_size, **given)
    expected = catalogue_ranks(given.pop("queries_BD"), data[1], given.pop("target_B"), **given)
    assert torch.equal(found, expected) and expected.max() > 20 and expected.min() < 10


def on_rank(data: Example, uneven: int) -> dict[str, Any]:
    rank = dist.get_rank()
    first, end = (0, uneven) if rank == 0 else (uneven, 14)
    share = CatalogueShard.of_rank(data[1])
    given = part(data, first, end)
    ranks = distributed_target_ranks(items=share, block_size=7, **given)
    for name in ("seen_items_S", "seen_offsets"):
        given.pop(name)
    error = ""
    try:  # a bad target of rank 1 is an error on both
        distributed_target_ranks(items=share, **given | {"target_B": given["target_B"] * 0 + (99 if rank else 1)})
    except ValueError as raised:
        error = str(raised)
    rounds = [x.numel() for x in equal_chunks(torch.arange(end - first), 4)]
    return {
        "ranks": ranks,
        "all": distributed_target_ranks(items=share, **given),
        "share": share,
        "error": error,
        "rounds": rounds,
    }


@pytest.mark.slow
@pytest.mark.parametrize("uneven", [5, 14])
def test_two_ranks_find_the_ranks_of_one_with_ties_and_uneven_rows(uneven: int) -> None:
    data = example()
    queries, vectors, targets, seen, offsets = data
    results = run_ranks(on_rank, 2, data, uneven)
    found = torch.cat([result["ranks"] for result in results])
    assert torch.equal(found, catalogue_ranks(queries, vectors, targets, seen_items_S=seen, seen_offsets=offsets))
    assert torch.equal(torch.cat([result["all"] for result in results]), catalogue_ranks(queries, vectors, targets))
    assert [(r["share"].first, r["share"].end) for r in results] == [(0, 20), (20, 41)]
    if uneven < 14:
        assert all("is 99; targets are item ids in 1..40" in result["error"] for result in results)
    assert [r["rounds"] for r in results] == ([[4, 1, 0], [4, 4, 1]] if uneven == 5 else [[4, 4, 4, 2], [0, 0, 0, 0]])


def test_shares_cover_the_catalogue_in_order() -> None:
    assert shard_bounds(10) == (0, 10)
    vectors = torch.arange(8.0).view(4, 2)
    share = CatalogueShard.of_rank(vectors)
    assert share.end == share.total == 4 and share.vectors.data_ptr() == vectors.data_ptr(), "a view, not a copy"
    torch.testing.assert_close(share.normalized().vectors[1:].norm(dim=1), torch.ones(3))
