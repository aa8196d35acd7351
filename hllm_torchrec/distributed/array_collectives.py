"""Collectives for numpy arrays, over gloo or nccl; without a process group there is one rank."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

T = TypeVar("T")


class SingleRank:
    """Stands for a process group that contains only this rank: functions that get it as `group` do not communicate."""


SINGLE_RANK = SingleRank()
Group = dist.ProcessGroup | SingleRank | None
"""Group of ranks for a collective; None: all ranks."""


def world_size(group: Group = None) -> int:
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size(group) if dist.is_initialized() and not isinstance(group, SingleRank) else 1


def group_rank(group: Group = None) -> int:
    """This rank's number in the group."""
    return 0 if isinstance(group, SingleRank) or world_size(group) == 1 else dist.get_rank(group)


def gather_objects(value: T, group: Group = None) -> list[T]:
    """Gather a value from each rank, in rank order. Collective; values are pickled, so they should be small."""
    if world_size(group) == 1:
        return [value]
    values: list[T] = [value] * world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def collective_device(group: Group = None) -> torch.device:
    """Device for the group's collectives: nccl supports CUDA tensors only."""
    assert not isinstance(group, SingleRank)
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def all_gather(array: np.ndarray, group: Group = None) -> list[np.ndarray]:
    """Gather the array of each rank, in rank order; the last dimension may differ between ranks. Collective."""
    if world_size(group) == 1:
        return [array]
    device = collective_device(group)
    # gloo and nccl gather only tensors of equal shape, so arrays are padded: the last dimension is moved to the front,
    # padded there, and cut and moved back after the gather.
    local = torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 0))).to(device)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size(group))]
    dist.all_gather(lengths, torch.tensor([len(local)], device=device), group=group)
    longest = max(int(length) for length in lengths)
    padded = torch.zeros((longest, *local.shape[1:]), dtype=local.dtype, device=device)
    padded[: len(local)] = local
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded, group=group)
    return [np.moveaxis(part[: int(length)].cpu().numpy(), 0, -1) for part, length in zip(parts, lengths)]


def all_to_all(array: np.ndarray, sent: Sequence[int], group: Group = None) -> np.ndarray:
    """Send the first sent[0] rows to rank 0, the next sent[1] to rank 1 ...; return the rows received, in rank order.

    Collective. `array` is [n] or [n, k] of any numeric type that torch supports.
    """
    if world_size(group) == 1:
        return array
    device = collective_device(group)
    counts = torch.tensor(sent, dtype=torch.int64, device=device)
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts, group=group)
    sizes = received.tolist()
    values = torch.from_numpy(np.ascontiguousarray(array)).to(device)
    result = torch.empty((sum(sizes), *values.shape[1:]), dtype=values.dtype, device=device)
    dist.all_to_all_single(result, values, sizes, list(sent), group=group)
    return result.cpu().numpy()


def in_step(items: Iterator[T]) -> Iterator[T | None]:
    """Yield this rank's items, then None until the items of all ranks are exhausted. Collective.

    Every rank yields the same number of times, so the loop body may contain collectives.

    Raises:
        ValueError: `items` raised a ValueError on some rank; it is raised on every rank.
    """
    while True:
        item, problem = None, None
        try:
            item = next(items, None)
        except ValueError as error:
            problem = str(error)
        states = gather_objects((item is not None, problem))
        if problems := [text for _, text in states if text]:
            raise ValueError(problems[0])
        if not any(has_item for has_item, _ in states):
            return
        yield item
