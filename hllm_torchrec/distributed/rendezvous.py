"""Rendezvous that isolates each elastic restart from keys that an earlier one left in the store.

torchrun (and so TorchX) keeps its store for as long as it runs, so restarted ranks find keys of the dead ones in it
(torch 2.13; earlier versions prefix every key with the number of the restart, on which agents of several nodes do not
agree). A rank that arrives before its peer then connects to the address of the peer's predecessor, and hangs.
Therefore the ranks of each start agree on a unique name, which prefixes every key.
"""

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

POLL_SECONDS = 0.02
"""Seconds between two checks of rank 0 for ranks that have not arrived."""


def init_process_group(backend: str, timeout: timedelta) -> None:
    """Initialize the process group from the environment, with a store that has no keys of earlier starts.

    Raises:
        RuntimeError, ValueError: as `torch.distributed.init_process_group`.
        TimeoutError: some ranks did not arrive; names them.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # then rank 0 makes a new store
        dist.init_process_group(backend, timeout=timeout)
        return
    store, rank, world = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    name = restart_prefix(store, rank, world, timeout)
    dist.init_process_group(backend, store=dist.PrefixStore(name, store), rank=rank, world_size=world, timeout=timeout)


def restart_prefix(store: dist.Store, rank: int, world: int, timeout: timedelta) -> str:
    """Return a key prefix that no earlier start used, the same on all ranks. Collective.

    Every other rank puts a request with a new random key into the store, and rank 0 answers under that key. Rank 0
    cannot distinguish requests of earlier starts, so it answers all of them, until every rank has confirmed this name.

    Raises:
        TimeoutError: rank 0 did not hear from some ranks. RuntimeError: rank 0 did not answer.
    """
    if rank > 0:
        asked = f"start/{uuid.uuid4().hex}"
        # Overwrites the request of a predecessor with the same rank; its answer key was another, so an old answer
        # cannot be read.
        store.set(f"start/asked/{rank}", asked)
        name = store.get(asked).decode()
        store.set(f"{name}/known/{rank}", "yes")
        return name
    name, deadline = f"start/{uuid.uuid4().hex}", time.monotonic() + timeout.total_seconds()
    missing = list(range(1, world))
    while missing:
        # Answer again in every round: the request seen first may be an old one, overwritten later by the rank's own.
        for other in missing:
            if store.check([f"start/asked/{other}"]):
                store.set(store.get(f"start/asked/{other}").decode(), name)
        missing = [other for other in missing if not store.check([f"{name}/known/{other}"])]
        if missing and time.monotonic() > deadline:
            shown = ", ".join(map(str, missing[:8])) + ", ..." * (len(missing) > 8)
            raise TimeoutError(f"no sign of rank {shown} in {timeout.total_seconds():g} s")
        time.sleep(POLL_SECONDS * bool(missing))
    return name
