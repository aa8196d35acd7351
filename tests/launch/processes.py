"""Training jobs as processes of their own, for tests that signal and kill them."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.training_fixtures import lines

MODULE = [sys.executable, "-m", "hllm_torchrec.launch.train"]


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


def environment(root: Path, **variables: object) -> dict[str, str]:
    """This process's, without the variables of a launcher."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "PYTHONPATH": str(root), **{name: str(value) for name, value in variables.items()}}


def start_ranks(commands: list[list[str]], root: Path, cwd: Path) -> list["subprocess.Popen[str]"]:
    """Start one process for each command, as the ranks of a job."""
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "WORLD_SIZE": len(commands)}
    return [
        subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
            env=environment(root, RANK=rank, LOCAL_RANK=rank, **address),
        )
        for rank, command in enumerate(commands)
    ]


def end(processes: list["subprocess.Popen[str]"]) -> None:
    """Kill what still runs."""
    for process in processes:
        process.kill()
        process.wait()


def until_step(step: int, output: Path, process: "subprocess.Popen[str]", seconds: float = 240) -> None:
    """Wait until the run's log has a step."""
    deadline = time.monotonic() + seconds
    while not (output / "log.jsonl").exists() or len(lines(output, "step")) < step:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
