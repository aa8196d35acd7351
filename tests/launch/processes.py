"""Jobs as processes of their own, for tests that start several, signal them or kill them."""

import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from tests.distributed import forks
from tests.training_fixtures import lines

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


class Job:
    """`python -m MODULE ARGUMENTS` in a process that is forked after the libraries were imported (seconds of each job).

    It has `subprocess.Popen`'s methods, as far as tests need them.
    """

    def __init__(self, module: str, arguments: list[str], cwd: Path, env: Mapping[str, str]) -> None:
        self._said = tempfile.TemporaryDirectory()
        target = (module, arguments, str(cwd), dict(env), self._said.name)
        self._process = forks().Process(target=_become, args=target)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """The exit status, -N after signal N; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """`returncode`."""
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """What it printed on stdout and stderr until its end.

        Raises:
            TimeoutError: it has not come to an end in so many seconds.
        """
        self._process.join(timeout)
        if self.returncode is None:
            raise TimeoutError(f"still running after {timeout} s")
        out, err = ((Path(self._said.name) / name).read_text() for name in ("stdout", "stderr"))
        return out, err

    def kill(self) -> None:
        """End it if it still runs."""
        self._process.kill()

    def wait(self) -> None:
        """Until its end."""
        self._process.join()


def _become(module: str, arguments: list[str], cwd: str, env: dict[str, str], said: str) -> None:
    """Be the program, in the forked process."""
    for handle, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(Path(said) / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, handle)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


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
