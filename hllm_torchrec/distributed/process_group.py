"""Process group of a job: initialized from the launcher's environment variables, or for a single process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from hllm_torchrec.common.warning_filters import quiet_libraries
from hllm_torchrec.distributed.rendezvous import init_process_group


def init_distributed(timeout: float = 600.0) -> torch.device:
    """Initialize the process group of torchrun or TorchX, or one of a single rank; return this rank's device.

    timeout: seconds that a rank waits for the others, here and in every later collective.

    Raises:
        ConnectionError: the ranks could not connect; the message contains the address and the remedy.
    """
    quiet_libraries()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # Both backends: a job on GPUs also exchanges objects and CPU tensors, which need gloo.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            _join(backend, timedelta(seconds=timeout))
        else:
            # A single process uses a store in memory, which needs no port.
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def _join(backend: str, timeout: timedelta) -> None:
    """Initialize the process group from the launcher's environment variables."""
    try:
        init_process_group(backend, timeout)
    except (RuntimeError, ValueError, TimeoutError) as error:  # torch's DistError is a RuntimeError
        names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
        address, port, rank, world = (os.environ.get(name, "?") for name in names)
        cause = "the port is in use: choose another" if "EADDRINUSE" in str(error) else str(error).splitlines()[0]
        raise ConnectionError(
            f"rank {rank} of {world} could not join the others at {address}:{port}: {cause}. The option of "
            "the port is --rdzv_port (torchx) or --master_port (torchrun); all ranks must reach the address"
        ) from error


def destroy_distributed() -> None:
    """Destroy the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def distributed_device(timeout: float = 600.0) -> Iterator[torch.device]:
    """Context manager in which the process group is initialized; yields this rank's device.

    Raises as `init_distributed`.
    """
    device = init_distributed(timeout)
    try:
        yield device
    finally:
        destroy_distributed()
