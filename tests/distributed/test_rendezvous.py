"""Ranks that torchrun starts again meet their peers in its store, not the peers' predecessors."""

import os
import signal
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hllm_torchrec.distributed.rendezvous import init_process_group, restart_prefix
from tests.helpers.distributed import forks

SOON = timedelta(seconds=20)


def start(store: dist.TCPStore, world: int, last_waits: float = 0.0) -> list[str]:
    """What each of so many ranks, as threads, calls its start; the last comes later than the others."""
    names = [""] * world

    def one(rank: int) -> None:
        own = dist.TCPStore("localhost", store.port, is_master=False, timeout=SOON)
        time.sleep(last_waits * (rank == world - 1))
        names[rank] = restart_prefix(own, rank, world, SOON)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return names


@pytest.fixture
def agents_store() -> dist.TCPStore:
    """As torchrun keeps it for all starts."""
    return dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=SOON)


def test_each_start_has_a_name_of_its_own_that_all_ranks_know(agents_store: dist.TCPStore) -> None:
    first, second = start(agents_store, 3), start(agents_store, 3, last_waits=0.3)
    assert len(set(first)) == len(set(second)) == 1 and first[0] != second[0]
    assert start(agents_store, 1)[0] not in (first[0], second[0])


def test_ranks_that_do_not_come_are_named(agents_store: dist.TCPStore) -> None:
    start(agents_store, 3)  # the dead have left their questions
    with pytest.raises(TimeoutError, match=r"no sign of rank 1, 2 in 0.1 s"):
        restart_prefix(agents_store, 0, 3, timedelta(seconds=0.1))


def test_a_rank_that_waits_in_vain_says_where(monkeypatch: pytest.MonkeyPatch, agents_store: dist.TCPStore) -> None:
    from hllm_torchrec.distributed.process_group import (
        init_distributed,
    )  # not above: the ranks below begin by importing this file

    for name, value in environment(0, agents_store.port).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ConnectionError,
        match=rf"rank 0 of 2 could not join the others at localhost:{agents_store.port}: no sign of rank 1 in 0.5 s",
    ):
        init_distributed(0.5)


def environment(rank: int, port: int) -> dict[str, str]:
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": 2}
    return {name: str(value) for name, value in (address | {"TORCHELASTIC_USE_AGENT_STORE": True}).items()}


def sum_of_ranks(rank: int, port: int, delay: float, told: Any) -> None:
    """One of two ranks: joins, tells the sum of the ranks' numbers, and stays."""
    os.environ.update(environment(rank, port))
    time.sleep(delay)
    init_process_group("gloo", SOON)
    total = torch.tensor([rank + 1])
    dist.all_reduce(total)
    told.send(int(total))
    time.sleep(100)


@pytest.mark.slow
def test_a_rank_that_is_back_before_its_peer_does_not_take_the_dead_one_for_it(agents_store: dist.TCPStore) -> None:
    context = forks()
    for delay in (0.0, 2.0):
        ends = [context.Pipe(duplex=False) for _ in range(2)]
        ranks = [
            context.Process(target=sum_of_ranks, args=(rank, agents_store.port, delay * rank, told))
            for rank, (_, told) in enumerate(ends)
        ]
        for process in ranks:
            process.start()
        try:
            for heard, _ in ends:
                assert heard.poll(60) and heard.recv() == 3
        finally:
            for process in ranks:
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL)
                process.join()
