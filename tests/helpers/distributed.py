"""Run a function on several gloo ranks from a test."""

import contextlib
import datetime
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("pytest", "torch.distributed", "torchrec", "transformers", "sklearn.metrics", "torch.utils.tensorboard")
HEAVY += (
    "transformers.models.llama.modeling_llama",
    "hllm_torchrec.training.trainer_setup",
    "tests.helpers.training_fixtures",
)
"""What takes long to import, of which training imports some late."""


class RankFailed(RuntimeError):
    """A rank raised or died; the message holds its rank and traceback."""


def forks() -> ForkServerContext:
    """Processes forked from one that has imported the libraries: spawned ones would each do so for themselves.

    It has imported those of `HEAVY` that this process had at the first call, all if this process can train.
    """
    context = multiprocessing.get_context("forkserver")
    trains = "hllm_torchrec.training.trainer_setup" in sys.modules
    context.set_forkserver_preload([*(name for name in HEAVY if trains or name in sys.modules), "tests.helpers.freeze"])
    with contextlib.chdir(ROOT):  # or it would not find our own modules, and say nothing
        forkserver.ensure_running()
    return context


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Run `function(*args)` on `world_size` processes of one gloo process group, on the CPU.

    In each process torch.distributed is initialised (through a file, so no port can be taken), RANK,
    LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE are set, torch has one thread and seed 0. The rest of the
    environment is that of the first call in this process. `torch.distributed.get_rank()` tells a rank which
    one it is.

    Args:
        function: defined at the top level of its module; `args` and what it returns must pickle (tensors do).
        timeout: seconds after which all ranks are killed; also the process group's timeout.

    Returns:
        what each rank returned, in rank order.

    Raises:
        RankFailed: with the traceback of the rank that failed first; the others are killed.
        TimeoutError: naming the ranks that were still running; they are killed.
    """
    context = forks()
    # Pickled here: multiprocessing's own pickler would put tensors into memory that the ranks share.
    work = pickle.dumps((function, args))
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_run_rank, args=(rank, world_size, folder, timeout, work))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            _wait_for(processes, timeout, Path(folder))
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [pickle.loads((Path(folder) / f"result-{rank}").read_bytes()) for rank in range(world_size)]


def _run_rank(rank: int, world_size: int, folder: str, timeout: float, work: bytes) -> None:
    """Join the process group, run the function and write its result, or the traceback and its time."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout),
        )
        dist.barrier()  # a rank that returns at once would close connections that others are still making
        function, args = pickle.loads(work)
        result = pickle.dumps(function(*args))
        (Path(folder) / f"result-{rank}").write_bytes(result)
        dist.destroy_process_group()
    except BaseException:
        failure = pickle.dumps((time.time(), traceback.format_exc()))
        (Path(folder) / f"failure-{rank}").write_bytes(failure)
        sys.exit(1)


def _wait_for(processes: list[Any], timeout: float, folder: Path) -> None:
    """Wait until all have ended well; raise for the first that did not, or at the end of the time."""
    deadline = time.monotonic() + timeout
    running = dict(enumerate(processes))
    while running:
        wait([process.sentinel for process in running.values()], timeout=max(deadline - time.monotonic(), 0))
        ended = {rank: process for rank, process in running.items() if process.exitcode is not None}
        if any(process.exitcode != 0 for process in ended.values()):
            raise RankFailed(_first_failure(ended, len(processes), folder))
        if not ended and time.monotonic() >= deadline:
            raise TimeoutError(f"ranks {sorted(running)} of {len(processes)} still ran after {timeout} s")
        running = {rank: process for rank, process in running.items() if rank not in ended}


def _first_failure(ended: dict[int, Any], world_size: int, folder: Path) -> str:
    """Describe the failure that came first: the others often fail because their peer is gone."""
    for rank, process in ended.items():
        if process.exitcode != 0 and not (folder / f"failure-{rank}").exists():
            return f"rank {rank} of {world_size} died without a traceback, exit code {process.exitcode}"
    failures = {int(path.name.split("-")[1]): path for path in folder.glob("failure-*")}
    times_and_traces = {rank: pickle.loads(path.read_bytes()) for rank, path in failures.items()}
    first = min(times_and_traces, key=lambda rank: times_and_traces[rank][0])
    return f"rank {first} of {world_size} failed:\n{times_and_traces[first][1]}"
