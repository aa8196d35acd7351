"""Programs as processes of their own, without the seconds in which each would import the libraries."""

import os
import runpy
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.helpers.distributed import forks


class Job:
    """`python -m MODULE ARGUMENTS` in a process that is forked after the libraries were imported (seconds of each job).

    A module that ends in .py is the path of a program. It has `subprocess.Popen`'s methods, as far as tests need them.
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
    if module.endswith(".py"):
        runpy.run_path(module, run_name="__main__")
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
