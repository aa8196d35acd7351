"""Differentiable collectives on rows: gathering of negatives, and encoding of each unique item on one rank only.

All functions work with gloo (CPU) and nccl (CUDA). With one rank, or if torch.distributed is not initialized, they do
not communicate. Legend: n_r rows of rank r, W ranks, U ids of all ranks (U_r of rank r), n ids, D width.

The exchanging functions are collective: all ranks must call them in the same order, also ranks without rows. If rows
have gradients, the backward pass communicates as well, so every rank must run it *through the returned tensor*: a rank
that does not use its rows adds `0 * rows.sum()` to its loss. The ranks agree in the forward pass whether there is a
gradient, so a rank whose rows need no gradient (for example because it has no rows) still takes part in the backward
pass. Use one exchange with gradients per step, for histories, targets and negatives together: autograd may run two
independent exchanges in different orders on ranks whose graphs differ.
"""

import heapq
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from hllm_torchrec.distributed.coordination import world_size


def all_gather_variable(x: Tensor) -> Tensor:
    """Concatenate every rank's rows, in rank order, on all ranks; differentiable.

    The gradient of a rank's rows is the *sum* of the gradients of their copies on all ranks, as if the losses of all
    ranks were summed and differentiated in one process.

    Args:
        x: [n_r, ...]; n_r may differ between ranks and be 0, the other dimensions and the dtype may not.

    Returns:
        [sum of n_r, ...]; x itself on one process.
    """
    if world_size() == 1:
        return x
    shape = torch.tensor([x.shape[0], int(_wants_gradient(x))], device=x.device)
    shapes = torch.stack(_all_gather_equal(shape)).tolist()
    sizes = [size for size, _ in shapes]
    wants_gradient = any(flag for _, flag in shapes)
    gathered: Tensor = _AllGather.apply(_attach(x, wants_gradient), sizes)
    return gathered


def encode_unique_items(
    local_ids: Tensor, costs_of: Callable[[Tensor], Tensor], encode: Callable[[Tensor], Tensor]
) -> Tensor:
    """Encode the union of all ranks' ids, each id on one rank only, and return the rows of this rank's ids.

    `assign_owners` divides the ids into shares of about equal cost, and the encoded rows are exchanged in one
    all-to-all. In the backward pass an owner's rows receive the sum of the gradients of all ranks that used them.
    With losses summed over ranks, the sum of the encoder's gradients over ranks equals that of one process.

    Args:
        local_ids: int64 [U_r], distinct, in any order; may be empty.
        costs_of: ids [n] -> cost of encoding each, [n] (tokens). Must be the same function on every rank.
        encode: ids [n] -> [n, D], row i for ids[i]. Called exactly once on every rank. On a rank that owns no ids (if
            there are more ranks than ids) n is 0: `encode` must then return [0, D] of the same dtype and device, and
            still run the collectives of the encoder (FSDP).

    Returns:
        [U_r, D], row i for local_ids[i]. On one process, encode(local_ids).
    """
    n_ranks = world_size()
    if n_ranks == 1:
        return encode(local_ids)
    sizes = torch.cat(_all_gather_equal(torch.tensor([local_ids.shape[0]], device=local_ids.device))).tolist()
    ids_by_rank = _all_gather_padded(local_ids, sizes)
    union = torch.unique(torch.cat(ids_by_rank))  # sorted
    owners = assign_owners(union, costs_of(union), n_ranks)
    mine = union[owners == dist.get_rank()]
    encoded = encode(mine)
    # A rank without rows, or with rows that need no gradient, must still run the backward all-to-all if any rank does.
    wants_gradient = any_rank(_wants_gradient(encoded), encoded.device)

    # Every rank knows all ids and owners, so senders and receivers agree on sizes and order without a message.
    # requested[r]: the ids of rank r that this rank owns.
    requested = [ids[owners[torch.searchsorted(union, ids)] == dist.get_rank()] for ids in ids_by_rank]
    # An id that several ranks need is sent to each of them; the gradient of this indexing sums over the copies.
    rows = encoded[torch.searchsorted(mine, torch.cat(requested))]
    from_owner = owners[torch.searchsorted(union, local_ids)]
    n_from = torch.bincount(from_owner, minlength=n_ranks).tolist()
    received: Tensor = _AllToAll.apply(_attach(rows, wants_gradient), [len(ids) for ids in requested], n_from)
    # Rows arrive grouped by owner and, within one owner, in the order of local_ids. A stable sort of local_ids by owner
    # gives that order; position[i] is its inverse, the row of local_ids[i] in `received`.
    position = torch.empty_like(local_ids)
    position[torch.sort(from_owner, stable=True).indices] = torch.arange(len(local_ids), device=local_ids.device)
    return received[position]


def assign_owners(unique_ids: Tensor, costs: Tensor, world_size: int) -> Tensor:
    """Assign every id to one rank, identically on all ranks, with nearly equal total costs.

    Longest processing time first (LPT): in order of descending cost (ties: position), each id goes to the rank with
    the lowest total so far (ties: lowest rank). No rank's total exceeds the mean by more than the largest single cost.
    A cost below 1 counts as 1, so that ids without tokens are spread as well. 100,000 ids take about 0.1 s on the CPU.

    Args:
        unique_ids: int64 [U], the same on all ranks.
        costs: [U], cost of each id, the same on all ranks.
        world_size: number of ranks, W.

    Returns:
        int64 [U], in [0, W), on the device of `unique_ids`.
    """
    costs = costs.clamp(min=1)
    order = torch.sort(costs, descending=True, stable=True).indices
    loads = [(0, rank) for rank in range(world_size)]  # sorted, so already a heap
    owners = []
    for cost in costs[order].tolist():
        load, rank = loads[0]
        owners.append(rank)
        heapq.heapreplace(loads, (load + cost, rank))
    result = torch.empty_like(unique_ids)
    result[order.to(result.device)] = torch.tensor(owners, dtype=torch.int64, device=result.device)
    return result


def global_sum(x: Tensor) -> Tensor:
    """Return the sum of x over all ranks, elementwise, without gradient (x is not changed)."""
    total = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def all_agree_to_continue(flag: bool) -> bool:
    """Return whether `flag` is true on every rank, such as "is there another batch?".

    Collective, also at the end: a rank without further work must call it once more with False, like the other ranks.
    """
    return not any_rank(not flag, _communication_device())


def global_max(value: int, device: torch.device) -> int:
    """Return the largest of all ranks' values."""
    if world_size() == 1:
        return value
    largest = torch.tensor([value], device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether `flag` is true on at least one rank."""
    return bool(global_sum(torch.tensor(int(flag), device=device)))


def _communication_device() -> torch.device:
    """Return a device that the default process group supports: the CPU, unless the group has nccl only."""
    if world_size() == 1 or "cpu" in dist.get_backend_config():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _wants_gradient(x: Tensor) -> bool:
    """Return whether autograd is recording operations on x."""
    return x.requires_grad and torch.is_grad_enabled()


def _attach(x: Tensor, wants_gradient: bool) -> Tensor:
    """Return x, or a copy that requires a gradient if x does not but `wants_gradient` is true.

    Otherwise autograd would skip the backward collective on this rank, and the other ranks would wait for it.
    """
    return x.detach().requires_grad_() if wants_gradient and not x.requires_grad else x


def _all_gather_equal(x: Tensor) -> list[Tensor]:
    """Gather tensors of one shape: a list with one per rank."""
    gathered = [torch.zeros_like(x) for _ in range(world_size())]
    dist.all_gather(gathered, x.contiguous())
    return gathered


def _all_gather_padded(x: Tensor, sizes: list[int]) -> list[Tensor]:
    """Gather [sizes[r], ...] of each rank r. Rows are padded to the longest, as gloo gathers equal shapes only."""
    padded = x.new_zeros((max(sizes), *x.shape[1:]))
    padded[: x.shape[0]] = x
    return [part[:size] for part, size in zip(_all_gather_equal(padded), sizes)]


def _all_to_all(x: Tensor, n_to: list[int], n_from: list[int]) -> Tensor:
    """Send n_to[r] rows to each rank r, in order, and return the n_from[r] rows received from each."""
    received = x.new_zeros((sum(n_from), *x.shape[1:]))
    dist.all_to_all_single(received, x.contiguous(), n_from, n_to)
    return received


class _AllToAll(torch.autograd.Function):
    """Differentiable `_all_to_all`: gradients are sent back the same way. (torch.distributed.nn is deprecated.)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, n_to: list[int], n_from: list[int]) -> Tensor:
        ctx.n_to, ctx.n_from = n_to, n_from
        return _all_to_all(x, n_to, n_from)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _all_to_all(grad, ctx.n_from, ctx.n_to), None, None


class _AllGather(torch.autograd.Function):
    """Concatenation of all ranks' rows; the gradient of a rank's rows is the sum over all ranks' copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes, ctx.n_rows = sizes, x.shape[0]
        return torch.cat(_all_gather_padded(x, sizes))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        n_ranks = len(ctx.sizes)
        # Every rank sends the gradients of rank r's rows to rank r: W gradients [n_r, ...] of its rows arrive there.
        copies = _all_to_all(grad, ctx.sizes, [ctx.n_rows] * n_ranks)
        return copies.view(n_ranks, ctx.n_rows, *grad.shape[1:]).sum(dim=0), None
