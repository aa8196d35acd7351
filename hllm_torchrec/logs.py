"""What a run tells: a JSON-lines log, TensorBoard scalars, progress bars, and where it ran."""

import importlib.metadata
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO

import torch
from tqdm import tqdm

from hllm_torchrec.data.atomic import replace_file

#: Events that are repeated when a run resumes from a checkpoint before them.
_REPEATED_EVENTS = ("step", "eval", "skipped")
_SECONDS_BETWEEN_LINES = 10.0
_PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "transformers", "numpy", "pyarrow")


class Sink(Protocol):
    """Somebody else who is told a run's numbers."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Those of one event, by `<event>/<name>`."""

    def close(self) -> None:
        """There are no more."""


class RunLog:
    """The log of a run: `log.jsonl`, one object a line, and `tensorboard/`. Ranks other than 0 write nothing.

    A line is `{"event": "step", "step": 100, "time": 1700000000.0, ...}`; time is in seconds since 1970, UTC.
    """

    def __init__(self, run_dir: Path, rank: int, resumed_step: int | None = None, also: Sink | None = None) -> None:
        """Open the log for appending, in a directory that is made if missing.

        Args:
            run_dir: the run's directory.
            rank: this process's rank.
            resumed_step: when resuming, the checkpoint's step: "step" and "eval" lines after it are dropped,
                as the run repeats them, and so is a last line that a crash cut short.
            also: gets the numbers too, and is closed with the log.
        """
        self._file: TextIO | None = None
        self._also = also
        if rank != 0:
            return
        from torch.utils.tensorboard import SummaryWriter  # seconds to import, and on rank 0 only

        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "log.jsonl"
        if resumed_step is not None and path.exists():
            _truncate(path, resumed_step)
        self._file = path.open("a")
        purge = None if resumed_step is None else resumed_step + 1
        self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)

    def write(self, event: str, step: int, **values: Any) -> None:
        """Append one line, and its numbers to TensorBoard as `<event>/<name>`.

        Args:
            event: what happened: "step", "eval", "stage", ...
            step: optimizer steps done.
            **values: text, numbers, 0-d tensors, None, and lists and dictionaries of them. A number that JSON
                has not got (NaN, infinity) is written as null.

        Raises:
            ValueError: a value of another type, or one that is named "event", "step" or "time".
        """
        if self._file is None:
            return
        line = {"event": event, "step": step, "time": round(time.time(), 3)}
        if clash := line.keys() & values.keys():
            raise ValueError(f"{event}: the name {clash.pop()!r} is the log's own; choose another")
        plain = {name: _plain(name, value) for name, value in values.items()}
        self._file.write(json.dumps({**line, **plain}, allow_nan=False) + "\n")
        self._file.flush()
        numbers = dict(_numbers(event, values))
        for name, number in numbers.items():
            self._tensorboard.add_scalar(name, number, step)
        if self._also is not None:
            self._also.write(step, numbers)

    def close(self) -> None:
        """Write what is still in memory and close the files; closing twice is allowed."""
        if self._file is not None:
            self._file.close()
            self._tensorboard.close()
            if self._also is not None:
                self._also.close()
            self._file = None

    def __enter__(self) -> "RunLog":
        """Return the log itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the log."""
        self.close()


def read_log(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log; a last line that was cut short is left out."""
    text = (run_dir / "log.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _truncate(path: Path, resumed_step: int) -> None:
    """Drop the lines that a resumed run repeats; the file is replaced whole."""
    kept = [
        line
        for line in read_log(path.parent)
        if not (line["event"] in _REPEATED_EVENTS and line["step"] > resumed_step)
    ]
    replace_file(path, "".join(json.dumps(line) + "\n" for line in kept))


def _plain(name: str, value: Any) -> Any:
    """Return a value as JSON has it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(f"{name}.{key}", child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(f"{name}[{index}]", child) for index, child in enumerate(value)]
    value = _number(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise ValueError(f"{name} is a {type(value).__name__}; the log takes text, numbers, lists and dictionaries")


def _number(value: Any) -> Any:
    """Return the Python number of a tensor or numpy scalar of one element, anything else as it is."""
    is_scalar = getattr(value, "shape", None) is not None and math.prod(value.shape) == 1
    return value.item() if is_scalar else value


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Yield (slash-separated name, number) for the numbers in a nested dictionary."""
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from _numbers(f"{name}/{key}", child)
    elif isinstance(number := _number(value), int | float) and not isinstance(number, bool):
        yield name, float(number)


def progress(total: int | None, desc: str, enabled: bool = True, unit: str = "it", initial: int = 0) -> "tqdm[Any]":
    """Return a progress bar with the remaining time; on a terminal a bar, elsewhere a line every 10 seconds.

    Args:
        total: units of work; None: not known.
        desc: what is being done.
        enabled: false on ranks other than 0: then nothing is shown.
        unit: name of a unit.
        initial: units done before this process began.
    """
    if sys.stderr.isatty():
        return tqdm(total=total, desc=desc, disable=not enabled, unit=unit, initial=initial)
    return tqdm(
        total=total,
        desc=desc,
        disable=not enabled,
        unit=unit,
        initial=initial,
        file=_Lines(sys.stderr),
        mininterval=_SECONDS_BETWEEN_LINES,
        maxinterval=2 * _SECONDS_BETWEEN_LINES,
        delay=_SECONDS_BETWEEN_LINES / 2,
        ascii=True,
        ncols=100,
    )


class _Lines:
    """A stream for tqdm that ends each state of the bar with a line break instead of overwriting it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if text.strip():
            self._stream.write(text.strip() + "\n")

    def flush(self) -> None:
        self._stream.flush()


def machine_info() -> dict[str, Any]:
    """Return where a run ran and with what, for its log and metrics; JSON-able.

    Returns:
        cpu (model name), cores (that this process may use), memory_bytes, gpus (names), python, system,
        packages (installed: name -> version), hllm_torchrec (version), commit (of the checkout, or None).
    """
    import hllm_torchrec

    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "hllm_torchrec": hllm_torchrec.__version__,
        "commit": _commit(Path(__file__).resolve().parent.parent),
    }


def _cpu_model() -> str:
    """Return the processor's name, from /proc/cpuinfo where there is one."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    """Return an installed package's version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit(root: Path) -> str | None:
    """Return the commit checked out at `root`, or None if that is no checkout (as when installed)."""
    if not (root / ".git").exists():  # else git would look in the directories above
        return None
    try:
        command = ["git", "-C", str(root), "rev-parse", "--verify", "--quiet", "HEAD"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return result.stdout.strip() or None


def peak_memory_bytes() -> dict[str, int]:
    """Return the most memory this process has held: `host` (resident) and, if used, `cuda` (by torch)."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes, Linux in KiB
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peak["cuda"] = torch.cuda.max_memory_allocated()
    return peak
