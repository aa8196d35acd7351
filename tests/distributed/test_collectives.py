"""Exchanges between ranks, against one process with the same losses summed."""

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from hllm_torchrec.distributed import collectives
from tests.helpers.distributed import run_ranks

WIDTH = 3
IDS: dict[
    str, list[list[int]]
] = {  # ids of each rank: overlapping, unsorted, a rank with none, nobody with any, fewer ids than ranks
    "two ranks": [[5, 2, 9], [9, 1, 2, 7]],
    "three ranks, one empty": [[5, 2, 9, 4], [], [9, 1, 2, 7, 30]],
    "no ids at all": [[], []],
    "more ranks than ids": [[8], [8], []],
}


def table() -> Tensor:
    return torch.arange(40.0)[:, None] * torch.tensor([1.0, -0.5, 0.25]) + 1.0


def weights_of(rank: int, n: int) -> Tensor:
    """Weights of a rank's rows in its loss: the gradient each rank sends back."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(n, WIDTH, generator=generator)


def rows_of(rank: int, n: int) -> Tensor:
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(100 + rank))


def encode_and_differentiate(ids_by_rank: list[list[int]]) -> tuple[Tensor, Tensor, list[list[int]]]:
    """This rank's rows, its gradient of the encoder's weights, and the ids it was asked to encode."""
    rank = dist.get_rank()
    weight = table().requires_grad_()
    asked: list[list[int]] = []

    def encode(ids: Tensor) -> Tensor:
        asked.append(ids.tolist())
        return weight[ids] ** 2

    ids = torch.tensor(ids_by_rank[rank], dtype=torch.int64)
    rows = collectives.encode_unique_items(ids, lambda ids: ids % 7, encode)
    (rows * weights_of(rank, len(ids))).sum().backward()
    assert weight.grad is not None
    return rows.detach(), weight.grad, asked


@pytest.mark.slow
@pytest.mark.parametrize("case", IDS)
def test_items_are_encoded_once_and_rows_and_summed_gradients_equal_one_process(case: str) -> None:
    ids_by_rank = IDS[case]
    results = run_ranks(encode_and_differentiate, len(ids_by_rank), ids_by_rank)

    weight = table().requires_grad_()
    loss = torch.zeros(())
    for rank, (ids, (rows, _, _)) in enumerate(zip(ids_by_rank, results)):
        expected = weight[torch.tensor(ids, dtype=torch.int64)] ** 2
        torch.testing.assert_close(rows, expected.detach())
        loss = loss + (expected * weights_of(rank, len(ids))).sum()
    loss.backward()
    torch.testing.assert_close(sum(grad for _, grad, _ in results), weight.grad)

    assert all(len(asked) == 1 for _, _, asked in results), "encode runs exactly once on every rank"
    encoded = [id for _, _, asked in results for id in asked[0]]
    assert sorted(encoded) == sorted({id for ids in ids_by_rank for id in ids})


def encode_without_a_graph_where_nothing_is_owned() -> tuple[list[int], Tensor]:
    """The rank that owns nothing returns a constant from encode, and must not leave the others waiting."""
    weight = table().requires_grad_()

    def encode(ids: Tensor) -> Tensor:
        return weight[ids] if len(ids) else torch.zeros(0, WIDTH)

    rows = collectives.encode_unique_items(torch.tensor([3]), torch.ones_like, encode)
    (rows.sum() * (dist.get_rank() + 1)).backward()
    return list(rows.shape), torch.zeros_like(weight) if weight.grad is None else weight.grad


def test_a_rank_that_owns_nothing_takes_part_in_the_backward_pass() -> None:
    results = run_ranks(encode_without_a_graph_where_nothing_is_owned, 2)
    total = results[0][1] + results[1][1]
    torch.testing.assert_close(total[3], torch.full((WIDTH,), 3.0))  # 1 + 2
    assert [shape for shape, _ in results] == [[1, WIDTH], [1, WIDTH]]


def encode_without_gradient() -> bool:
    return collectives.encode_unique_items(
        torch.tensor([3, 4]), torch.ones_like, lambda ids: table()[ids]
    ).requires_grad


def test_a_frozen_encoder_gives_rows_without_gradient() -> None:
    assert run_ranks(encode_without_gradient, 2) == [False, False]


def test_one_process_encodes_its_own_ids() -> None:
    ids = torch.tensor([4, 2])
    rows = collectives.encode_unique_items(ids, torch.ones_like, lambda ids: table()[ids])
    assert torch.equal(rows, table()[ids])


def gather_and_differentiate(sizes: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rank = dist.get_rank()
    x = rows_of(rank, sizes[rank]).to(dtype).requires_grad_()
    gathered = collectives.all_gather_variable(x)
    (gathered.float() * weights_of(rank, sum(sizes))).sum().backward()
    assert x.grad is not None
    return gathered.detach(), x.grad


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [([2, 3], torch.float32), ([4, 0, 1], torch.float32), ([0, 0], torch.float32), ([1, 2], torch.bfloat16)],
)
def test_gathered_rows_get_the_sum_of_all_ranks_gradients(sizes: list[int], dtype: torch.dtype) -> None:
    results = run_ranks(gather_and_differentiate, len(sizes), sizes, dtype)
    all_rows = torch.cat([rows_of(rank, n).to(dtype) for rank, n in enumerate(sizes)])
    all_gradients = sum(weights_of(rank, sum(sizes)).to(dtype) for rank in range(len(sizes)))
    assert isinstance(all_gradients, Tensor)
    for (gathered, grad), expected in zip(results, all_gradients.split(sizes)):
        assert torch.equal(gathered, all_rows)
        torch.testing.assert_close(grad, expected)


def gather_rows_of_which_only_one_rank_wants_the_gradient() -> tuple[bool, Tensor | None]:
    x = torch.ones(2, WIDTH, requires_grad=dist.get_rank() == 0)
    gathered = collectives.all_gather_variable(x)
    gathered.sum().backward()
    return gathered.requires_grad, x.grad


def test_gathering_with_a_gradient_on_one_rank_only_does_not_hang() -> None:
    (first, grad), (second, none) = run_ranks(gather_rows_of_which_only_one_rank_wants_the_gradient, 2)
    assert first and second and none is None
    assert torch.equal(grad, torch.full((2, WIDTH), 2.0))


def gather_ids_and_count() -> tuple[Tensor, Tensor, list[bool]]:
    rank = dist.get_rank()
    gathered = collectives.all_gather_variable(torch.arange(rank + 1))
    total = collectives.global_sum(torch.tensor([rank, 1]))
    agreed = [collectives.all_agree_to_continue(flag) for flag in (True, rank != 1, False)]
    return gathered, total, agreed


def test_integers_sums_and_agreement_are_the_same_on_every_rank() -> None:
    for gathered, total, agreed in run_ranks(gather_ids_and_count, 3):
        assert gathered.tolist() == [0, 0, 1, 0, 1, 2]
        assert total.tolist() == [3, 3]
        assert agreed == [True, False, False]


def test_one_process_needs_no_process_group() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    assert collectives.world_size() == 1
    assert collectives.all_gather_variable(x) is x
    assert torch.equal(collectives.global_sum(x), x) and not collectives.global_sum(x).requires_grad
    assert collectives.all_agree_to_continue(True) and not collectives.all_agree_to_continue(False)


def test_global_sum_leaves_its_argument_alone() -> None:
    x = torch.ones(2)
    collectives.global_sum(x).add_(1)
    assert x.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 7])
def test_owners_are_balanced_by_cost(n_ranks: int) -> None:
    costs = torch.randint(0, 300, (500,), generator=torch.Generator().manual_seed(n_ranks))
    owners = collectives.assign_owners(torch.arange(500), costs, n_ranks)
    loads = torch.zeros(n_ranks, dtype=torch.int64).index_add_(0, owners, costs.clamp(min=1))
    assert loads.max() - loads.min() <= 5  # of about 75,000 / n: the bound is the largest cost, 300
    assert torch.equal(owners, collectives.assign_owners(torch.arange(500), costs, n_ranks))


def test_one_heavy_item_gets_a_rank_of_its_own() -> None:
    owners = collectives.assign_owners(torch.arange(6), torch.tensor([1, 1, 50, 1, 1, 1]), 2)
    assert owners.tolist() == [1, 1, 0, 1, 1, 1]


def test_items_without_cost_spread_over_the_ranks() -> None:
    owners = collectives.assign_owners(torch.arange(6), torch.zeros(6, dtype=torch.int64), 3)
    assert torch.bincount(owners, minlength=3).tolist() == [2, 2, 2]


def test_no_items_have_no_owners() -> None:
    owners = collectives.assign_owners(torch.arange(0), torch.arange(0), 3)
    assert owners.shape == (0,) and owners.dtype == torch.int64
