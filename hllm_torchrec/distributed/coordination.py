"""Running of work on all ranks, on rank 0 or once per host; if one rank fails, all ranks raise instead of hanging."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class PeerFailed(RuntimeError):
    """Another rank failed; the log of that rank contains the error. kind: name of the type of that error."""

    kind = ""


def rank() -> int:
    """Return this process's rank, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def run_on_all_ranks(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Run `work` on every rank and return all results, by rank. Collective.

    Args:
        work: its result must be small and picklable. It must not contain collectives: if one rank failed before a
            collective, the other ranks would wait in it.
        group: a second process group of all ranks, for calls from another thread; None: the default group.

    Raises:
        Exception: the error of `work`, on the ranks where it failed.
        PeerFailed: on the other ranks; the message contains the first rank that failed and its error.
    """
    result: T | None = None
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    # The error is raised only after the gather, which tells the other ranks about it.
    outcomes: list[Any] = [(result, failure and f"{type(failure).__name__}: {failure}")]
    if dist.is_initialized():
        outcome, outcomes = outcomes[0], [None] * world_size()
        dist.all_gather_object(outcomes, outcome, group=group)
    if failure is not None:
        raise failure
    for number, (_, message) in enumerate(outcomes):
        if message:
            failed = PeerFailed(f"rank {number} failed: {message}")
            failed.kind = message.partition(":")[0]
            raise failed
    return [value for value, _ in outcomes]


def run_on_rank_zero(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run `work` on rank 0 only and return its result on every rank. Collective; raises as `run_on_all_ranks`."""
    return run_on_all_ranks(lambda: work() if rank() == 0 else None, group)[0]  # type: ignore[return-value]


def run_on_each_host(work: Callable[[], T]) -> T:
    """Run `work` on one rank of each host: on rank 0, then on the first rank of every other host. Collective.

    For example, to create files that every host needs: if the hosts share a disk, the other hosts find the files of
    rank 0. The first rank of a host has LOCAL_RANK 0. Returns rank 0's result; raises as `run_on_all_ranks`.
    """
    first = run_on_rank_zero(work)
    leads = rank() > 0 and os.environ.get("LOCAL_RANK") == "0"
    run_on_all_ranks(lambda: bool(leads and work()))
    return first
