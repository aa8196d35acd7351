"""numpy arrays between ranks, over gloo or nccl; without a process group there is one rank."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

T = TypeVar("T")


class Alone:
    """In place of a process group: this rank works without the others, whatever they do."""


ALONE = Alone()
Group = dist.ProcessGroup | Alone | None
"""Ranks that work together; None: all there are."""


def world(group: Group = None) -> int:
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size(group) if dist.is_initialized() and not isinstance(group, Alone) else 1


def rank_in(group: Group = None) -> int:
    """This rank's number in the group."""
    return 0 if isinstance(group, Alone) or world(group) == 1 else dist.get_rank(group)


def gather_objects(value: T, group: Group = None) -> list[T]:
    """What each rank gave, by rank. Collective; small things only, they are pickled."""
    if world(group) == 1:
        return [value]
    values: list[T] = [value] * world(group)
    dist.all_gather_object(values, value, group=group)
    return values


def device(group: Group = None) -> torch.device:
    """Where the group's collectives work: nccl knows CUDA only."""
    assert not isinstance(group, Alone)
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def all_gather(array: np.ndarray, group: Group = None) -> list[np.ndarray]:
    """The array of each rank, by rank; the last dimension may differ between ranks. Collective."""
    if world(group) == 1:
        return [array]
    place = device(group)
    own = torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 0))).to(place)
    lengths = [torch.zeros(1, dtype=torch.int64, device=place) for _ in range(world(group))]
    dist.all_gather(lengths, torch.tensor([len(own)], device=place), group=group)
    longest = max(int(length) for length in lengths)
    padded = torch.zeros((longest, *own.shape[1:]), dtype=own.dtype, device=place)
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded, group=group)
    return [np.moveaxis(part[: int(length)].cpu().numpy(), 0, -1) for part, length in zip(parts, lengths)]


def exchange(array: np.ndarray, sent: Sequence[int], group: Group = None) -> np.ndarray:
    """Send the first sent[0] rows to rank 0, the next sent[1] to rank 1 ...; what all ranks sent here, by rank.

    Collective. `array` is [n] or [n, k], of any number type that torch knows.
    """
    if world(group) == 1:
        return array
    place = device(group)
    counts = torch.tensor(sent, dtype=torch.int64, device=place)
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts, group=group)
    sizes = received.tolist()
    values = torch.from_numpy(np.ascontiguousarray(array)).to(place)
    result = torch.empty((sum(sizes), *values.shape[1:]), dtype=values.dtype, device=place)
    dist.all_to_all_single(result, values, sizes, list(sent), group=group)
    return result.cpu().numpy()


def common_splitters(samples_2S: np.ndarray, ranges: int, group: Group = None) -> np.ndarray:
    """The scores [ranges - 1] that part the rows of all ranks into ranges of about equal size. Collective.

    samples_2S: float64 (score, rows that it stands for) of this rank. With 4 x ranges regular samples of every sorted
    run no range is longer than about 1.25 times the average, plus one row a run; equal scores are never parted.
    """
    gathered = np.concatenate(all_gather(samples_2S, group), axis=1)
    if not gathered.size:
        return np.zeros(ranges - 1)
    ordered = gathered[:, gathered[0].argsort(kind="stable")]
    shares = np.cumsum(ordered[1])
    wanted = shares[-1] * np.arange(1, ranges) / ranges
    return ordered[0, np.minimum(np.searchsorted(shares, wanted), len(shares) - 1)]
