"""Work on several ranks: everybody learns of every result, and of a failure."""

import pytest
from torch import distributed as dist

from hllm_torchrec import ranks
from tests.distributed import run_ranks


def test_one_process_needs_no_group() -> None:
    assert (ranks.rank(), ranks.world_size()) == (0, 1)
    assert ranks.together(lambda: "x") == ["x"]
    assert ranks.on_rank_zero(lambda: 7) == 7


def fail_on_rank_one() -> None:
    if ranks.rank() == 1:
        raise KeyError("lost")


def outcomes() -> tuple[list[int], int, str]:
    """All ranks, rank 0's number, and how a failure of rank 1 looks here; the group works on after it."""
    with pytest.raises((RuntimeError, KeyError)) as error:
        ranks.together(fail_on_rank_one)
    dist.barrier()
    return (
        ranks.together(ranks.rank),
        ranks.on_rank_zero(lambda: 10 + ranks.rank()),
        f"{type(error.value).__name__}: {error.value}",
    )


def test_results_and_failures_reach_every_rank() -> None:
    assert run_ranks(outcomes, 2) == [
        ([0, 1], 10, "PeerFailed: rank 1 failed: KeyError: 'lost'"),
        ([0, 1], 10, "KeyError: 'lost'"),
    ]
