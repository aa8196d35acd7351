"""Work on several ranks: everybody learns of every result, and of a failure."""

import pytest
from torch import distributed as dist

from hllm_torchrec.distributed import coordination
from tests.helpers.distributed import run_ranks


def test_one_process_needs_no_group() -> None:
    assert (coordination.rank(), coordination.world_size()) == (0, 1)
    assert coordination.run_on_all_ranks(lambda: "x") == ["x"]
    assert coordination.run_on_rank_zero(lambda: 7) == 7


def fail_on_rank_one() -> None:
    if coordination.rank() == 1:
        raise KeyError("lost")


def outcomes() -> tuple[list[int], int, str]:
    """All ranks, rank 0's number, and how a failure of rank 1 looks here; the group works on after it."""
    with pytest.raises((RuntimeError, KeyError)) as error:
        coordination.run_on_all_ranks(fail_on_rank_one)
    dist.barrier()
    return (
        coordination.run_on_all_ranks(coordination.rank),
        coordination.run_on_rank_zero(lambda: 10 + coordination.rank()),
        f"{type(error.value).__name__}: {error.value}",
    )


def test_results_and_failures_reach_every_rank() -> None:
    assert run_ranks(outcomes, 2) == [
        ([0, 1], 10, "PeerFailed: rank 1 failed: KeyError: 'lost'"),
        ([0, 1], 10, "KeyError: 'lost'"),
    ]
