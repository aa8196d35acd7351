"""Common functions of the checks of gpu_check.py: registry, comparison, timing, and the processes that run them."""

import importlib
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # a machine may have the dependencies, while this checkout is not installed
    sys.path.insert(0, str(ROOT))
MODULES = ("gpu_check_kernels", "gpu_check_training", "gpu_check_speed")
"""Modules beside this one whose checks `load_checks` registers, in this order."""


class Skipped(Exception):
    """Raised by a check that cannot run on this machine; the message is the reason."""


@dataclass(frozen=True)
class Where:
    """Device of the checks, and whether they use tiny shapes, for a CPU and for tests."""

    device: torch.device
    tiny: bool

    @property
    def on_cuda(self) -> bool:
        """True if the device is a GPU."""
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Wait until the device has finished all its work."""
        if self.on_cuda:
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Check:
    """A check. seconds: time limit; run: function that returns the results, raises `Skipped`, or raises another error
    if the check fails."""

    name: str
    run: Callable[[Where], dict[str, Any]]
    seconds: float

    @property
    def about(self) -> str:
        """First line of the docstring of `run`."""
        return (self.run.__doc__ or "").split("\n")[0]


CHECKS: dict[str, Check] = {}


def check(seconds: float) -> Callable[[Callable[[Where], dict[str, Any]]], Callable[[Where], dict[str, Any]]]:
    """Decorator that registers a function as a check under its name, with a time limit."""

    def register(run: Callable[[Where], dict[str, Any]]) -> Callable[[Where], dict[str, Any]]:
        CHECKS[run.__name__] = Check(run.__name__, run, seconds)
        return run

    return register


def load_checks(modules: Sequence[str]) -> dict[str, Check]:
    """Import the modules; return the checks that they register, in the order in which they run."""
    for module in modules:
        importlib.import_module(module)
    return CHECKS


def close(ours: Sequence[Tensor], theirs: Sequence[Tensor], rtol: float, atol: float) -> float:
    """Compare tensors on the CPU in float32; return the largest difference.

    Raises:
        AssertionError: tensors differ by more than `rtol` and `atol` allow, or their shapes differ.
    """
    pairs = [(a.detach().float().cpu(), b.detach().float().cpu()) for a, b in zip(ours, theirs, strict=True)]
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
    return max((float((a - b).abs().max()) for a, b in pairs if a.numel()), default=0.0)


def near(ours: Sequence[Tensor], theirs: Sequence[Tensor], share: float) -> float:
    """Compare tensors of low precision; return the largest difference, divided by the tensor's largest absolute value.

    Raises:
        AssertionError: this quotient is above `share`, or a value is not finite.
    """
    worst = 0.0
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        difference = float((a.detach().float() - b.detach().float()).abs().max() / b.detach().float().abs().max())
        assert difference <= share, f"tensor {number} differs by {difference:.4f} of its largest number, above {share}"
        worst = max(worst, difference)
    return worst


def seconds_of(where: Where, run: Callable[[], Any], repeats: int = 10) -> float:
    """Median seconds of a call, after two warm-up calls; a single timed call if shapes are tiny."""
    if where.tiny:
        repeats = 1
    times = []
    for number in range(repeats + 2):
        where.wait()
        start = time.perf_counter()
        run()
        where.wait()
        if number >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def describe_device(device: str) -> dict[str, Any]:
    """Description of the device. Called in a separate process, because it initializes the device."""
    if device != "cuda":
        return {"device": "cpu"}
    found = torch.cuda.get_device_properties(0)
    torch.ones(8, device="cuda").sum().item()
    return {
        "device": found.name,
        "memory_bytes": found.total_memory,
        "compute_capability": f"{found.major}.{found.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "matmul_precision": torch.get_float32_matmul_precision(),
    }


def _serve(name: str, device: str, tiny: bool, modules: Sequence[str], said: str, answer: Connection) -> None:
    """Run a check, describe the device or list the checks in a child process; send (state, results or reason).

    said: file for the process's stdout and stderr.
    """
    with open(said, "wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    try:
        if name == "device":
            answer.send(("ok", describe_device(device)))
            return
        if name == "checks":
            answer.send(("ok", [(one.name, one.seconds, one.about) for one in load_checks(modules).values()]))
            return
        where = Where(torch.device(device, 0) if device == "cuda" else torch.device(device), tiny)
        answer.send(("ok", load_checks(modules)[name].run(where)))
    except Skipped as reason:
        answer.send(("skipped", str(reason)))
    except BaseException as error:
        where_from = "".join(traceback.format_exception(error)[-4:])
        answer.send(("failed", f"{type(error).__name__}: {error}\n{where_from}"[-4000:]))


class Processes:
    """Starts a process for every check, so that a kernel that crashes or hangs affects only its check.

    The processes are forked from a server that has imported the large libraries but has not initialized the GPU. If the
    forked processes cannot use the GPU, `probe` switches to spawned ones, which import the libraries themselves.
    """

    def __init__(self, device: str, tiny: bool, modules: Sequence[str]) -> None:
        self.device, self.tiny, self.modules = device, tiny, tuple(modules)
        beside = [str(ROOT / "scripts" / "gpu"), str(ROOT / "scripts" / "bench"), str(ROOT)]
        os.environ["PYTHONPATH"] = os.pathsep.join([*beside, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        sys.path[:0] = [path for path in beside if path not in sys.path]
        self.context: Any = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["checking", *modules])

    def checks(self) -> dict[str, tuple[float, str]]:
        """Name -> time limit and first docstring line of every check; a child reads them, and imports the modules.

        Raises:
            RuntimeError: a module of checks cannot be imported.
        """
        state, found = self.run("checks", 120)
        if state != "ok":
            raise RuntimeError(found)
        return {name: (seconds, about) for name, seconds, about in found}

    def probe(self) -> dict[str, Any]:
        """Describe the device, and choose the start method of the processes.

        Raises:
            RuntimeError: the device cannot be used.
        """
        state, found = self.run("device", 120)
        if state != "ok":
            self.context = multiprocessing.get_context("spawn")
            state, found = self.run("device", 120)
        if state != "ok":
            raise RuntimeError(found)
        return {**found, "processes": self.context.get_start_method()}

    def run(self, name: str, seconds: float) -> tuple[str, Any]:
        """Run one check; return its state, and its results or the reason why it failed or was skipped."""
        with tempfile.NamedTemporaryFile() as said:
            state, found = self._answer(name, seconds, said.name)
            tail = said.read()[-2000:].decode(errors="replace")
        return (state, f"{found}\n{tail}".rstrip()) if state == "failed" else (state, found)

    def _answer(self, name: str, seconds: float, said: str) -> tuple[str, Any]:
        ours, theirs = self.context.Pipe(duplex=False)
        asked = (name, self.device, self.tiny, self.modules, said, theirs)
        process = self.context.Process(target=_serve, args=asked)
        process.start()
        theirs.close()
        try:
            if not ours.poll(seconds):
                return "failed", f"took more than {seconds:.0f} s"
            answer: tuple[str, Any] = ours.recv()
            process.join(10)  # time to close its resources
            return answer
        except EOFError:
            process.join()
            return "failed", f"the process ended with exit code {process.exitcode}, without an answer"
        finally:
            process.kill()
            process.join()
            ours.close()
