"""How the ranks of a start find one another, and nobody of an earlier start.

torchrun (and so TorchX) keeps its store for as long as it runs, and the ranks that it starts again find in it what the
dead ones wrote (torch 2.13; earlier ones put the number of the restart before every key, which agents of several nodes
do not share). A rank that comes before its peer then connects to the address of the peer's predecessor, and hangs. So
each start agrees on a name of its own, which goes before every key.
"""

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

POLL_SECONDS = 0.02
"""Seconds between two looks of rank 0 at those who have not come yet."""


def init_process_group(backend: str, timeout: timedelta) -> None:
    """Initialise the process group from the environment, with a store that has nothing of earlier starts in it.

    Raises:
        RuntimeError, ValueError: as `init_process_group`; TimeoutError: some ranks did not come, says which.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # then rank 0 makes a new one
        dist.init_process_group(backend, timeout=timeout)
        return
    store, rank, world = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    name = restart_prefix(store, rank, world, timeout)
    dist.init_process_group(backend, store=dist.PrefixStore(name, store), rank=rank, world_size=world, timeout=timeout)


def restart_prefix(store: dist.Store, rank: int, world: int, timeout: timedelta) -> str:
    """A name that no earlier start has had, the same on all ranks. Collective.

    Every other rank asks rank 0 under a key that is new; rank 0 answers, to predecessors of the ranks as well, whom it
    cannot tell from them, until each rank has said that it knows this very name.

    Raises:
        TimeoutError: rank 0 saw no sign of some ranks; RuntimeError: rank 0 did not answer.
    """
    if rank > 0:
        asked = f"start/{uuid.uuid4().hex}"
        store.set(f"start/asked/{rank}", asked)
        name = store.get(asked).decode()
        store.set(f"{name}/known/{rank}", "yes")
        return name
    name, deadline = f"start/{uuid.uuid4().hex}", time.monotonic() + timeout.total_seconds()
    missing = list(range(1, world))
    while missing:
        for other in missing:
            if store.check([f"start/asked/{other}"]):
                store.set(store.get(f"start/asked/{other}").decode(), name)
        missing = [other for other in missing if not store.check([f"{name}/known/{other}"])]
        if missing and time.monotonic() > deadline:
            shown = ", ".join(map(str, missing[:8])) + ", ..." * (len(missing) > 8)
            raise TimeoutError(f"no sign of rank {shown} in {timeout.total_seconds():g} s")
        time.sleep(POLL_SECONDS * bool(missing))
    return name
