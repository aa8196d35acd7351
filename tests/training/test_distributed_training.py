"""The helper other tests run their ranks with."""

import os
import time

import pytest
import torch
from torch import distributed as dist

from tests.helpers.distributed import RankFailed, run_ranks


def rank_and_sum(x: torch.Tensor) -> tuple[int, int, float]:
    dist.all_reduce(x)
    return dist.get_rank(), int(os.environ["RANK"]), float(x)


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise KeyError("the first failure")
    dist.barrier()  # fails too, because its peer is gone


def die_on_rank_one() -> None:
    if dist.get_rank() == 1:
        os._exit(9)
    dist.barrier()


def sleep_on_rank_one() -> None:
    if dist.get_rank() == 1:
        time.sleep(600)


def test_each_rank_returns_its_value() -> None:
    assert run_ranks(rank_and_sum, 3, torch.ones(())) == [(0, 0, 3.0), (1, 1, 3.0), (2, 2, 3.0)]


def test_the_first_failing_ranks_traceback_is_raised() -> None:
    with pytest.raises(RankFailed, match=r"(?s)rank 1 of 2 failed:.*in fail_on_rank_one.*the first failure"):
        run_ranks(fail_on_rank_one, 2)


def test_a_rank_that_dies_is_reported_with_its_exit_code() -> None:
    with pytest.raises(RankFailed, match="rank 1 of 2 died without a traceback, exit code 9"):
        run_ranks(die_on_rank_one, 2)


@pytest.mark.slow
def test_a_rank_that_hangs_is_killed_at_the_timeout() -> None:
    with pytest.raises(TimeoutError, match=r"1\] of 2 still ran after 5 s"):
        run_ranks(sleep_on_rank_one, 2, timeout=5)
