"""Jobs as processes of their own, for tests that start several, signal them or kill them."""

import os
import socket
import subprocess
import time
from pathlib import Path

from tests.helpers.jobs import Job
from tests.helpers.training_fixtures import lines

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


def environment(root: Path, **variables: object) -> dict[str, str]:
    """This process's, without the variables of a launcher."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    return {**kept, "PYTHONPATH": str(root), **{name: str(value) for name, value in variables.items()}}


def start_ranks(module: str, arguments: list[list[str]], root: Path, cwd: Path) -> list[Job]:
    """Start a job's ranks, one with each list of arguments, with the variables that torchrun sets."""
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    world = {"WORLD_SIZE": len(arguments), "LOCAL_WORLD_SIZE": len(arguments)}
    return [
        Job(module, own, cwd, environment(root, RANK=rank, LOCAL_RANK=rank, **address, **world))
        for rank, own in enumerate(arguments)
    ]


def run_job(module: str, arguments: list[str], world: int, root: Path, cwd: Path) -> list[tuple[str, str]]:
    """Run a job on `world` ranks; what each printed on stdout and stderr.

    Raises:
        AssertionError: a rank failed; with what it printed on stderr.
    """
    ranks = start_ranks(module, [arguments] * world, root, cwd)
    try:
        said = [rank.communicate(timeout=240) for rank in ranks]
    finally:
        end(ranks)
    for rank, (_, errors) in zip(ranks, said, strict=True):
        assert rank.returncode == 0, errors
    return said


def end(processes: list[Job]) -> None:
    """Kill what still runs."""
    for process in processes:
        process.kill()
        process.wait()


def until_step(step: int, output: Path, process: "Job | subprocess.Popen[str]", seconds: float = 240) -> None:
    """Wait until the run's log has a step."""
    deadline = time.monotonic() + seconds
    while not (output / "log.jsonl").exists() or len(lines(output, "step")) < step:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
