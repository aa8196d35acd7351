"""Rendezvous that isolates each elastic restart from keys that an earlier start left in the store.

torchrun (and so TorchX) keeps its key-value store while it restarts ranks, so the new ranks find keys of the dead ranks
in it (torch 2.13; earlier versions prefix every key with the number of the restart, but the agents of several nodes may
count differently). A rank that reads the store before its peer has written would then connect to the address of the
peer's predecessor, and hang. Therefore the ranks of each start agree on a unique prefix of all keys.
"""

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

POLL_SECONDS = 0.02
"""Seconds between two checks by rank 0 for ranks that have not arrived."""


def init_process_group(backend: str, timeout: timedelta) -> None:
    """Initialize the process group from the environment, with a store that has no keys of earlier starts.

    Raises:
        RuntimeError, ValueError: as `torch.distributed.init_process_group`.
        TimeoutError: some ranks did not arrive; the message lists them.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # rank 0 creates a new store, without old keys
        dist.init_process_group(backend, timeout=timeout)
        return
    store, rank, world = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    name = restart_prefix(store, rank, world, timeout)
    dist.init_process_group(backend, store=dist.PrefixStore(name, store), rank=rank, world_size=world, timeout=timeout)


def restart_prefix(store: dist.Store, rank: int, world: int, timeout: timedelta) -> str:
    """Return a key prefix that no earlier start used, the same on all ranks. Collective.

    Rank 0 chooses the prefix. Every other rank writes a request into the store, which contains a new random key, and
    waits until rank 0 writes the prefix under that key. Rank 0 cannot distinguish this request from one of an earlier
    start, so it answers the requests in rounds until every rank has confirmed the prefix.

    Raises:
        TimeoutError: on rank 0: some ranks did not confirm within `timeout`.
        RuntimeError: on other ranks: rank 0 did not answer.
    """
    if rank > 0:
        answer_key = f"start/{uuid.uuid4().hex}"
        # Overwrites the request of this rank's predecessor. The answer key is new, so an old answer cannot be read.
        store.set(f"start/asked/{rank}", answer_key)
        name = store.get(answer_key).decode()
        store.set(f"{name}/known/{rank}", "yes")
        return name
    name, deadline = f"start/{uuid.uuid4().hex}", time.monotonic() + timeout.total_seconds()
    missing = list(range(1, world))
    while missing:
        # Answer again in every round: the request may be that of a predecessor, which the rank has yet to overwrite.
        for other in missing:
            if store.check([f"start/asked/{other}"]):
                store.set(store.get(f"start/asked/{other}").decode(), name)
        missing = [other for other in missing if not store.check([f"{name}/known/{other}"])]
        if missing and time.monotonic() > deadline:
            shown = ", ".join(map(str, missing[:8])) + ", ..." * (len(missing) > 8)
            raise TimeoutError(f"no sign of rank {shown} in {timeout.total_seconds():g} s")
        time.sleep(POLL_SECONDS * bool(missing))
    return name
