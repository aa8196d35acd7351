"""Log of a run: JSON lines and TensorBoard scalars, with an optional additional sink."""

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from hllm_torchrec.common.atomic_files import replace_file
from hllm_torchrec.common.machine_errors import is_disk_full, path_in_errors
from hllm_torchrec.common.tensorboard_file import ScalarFile
from hllm_torchrec.common.terminal import say

#: Events that a resumed run writes again for the steps after its checkpoint.
_REPEATED_EVENTS = ("step", "eval", "skipped")


class MetricsSink(Protocol):
    """Additional destination of a run's metrics."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log the numbers of one event; their names are `<event>/<name>`."""

    def close(self) -> None:
        """Flush and close the sink."""


class RunLog:
    """Log of a run: `log.jsonl`, one object per line, and `tensorboard/`. Only rank 0 writes.

    A line is `{"event": "step", "step": 100, "time": 1700000000.0, ...}`; time is in seconds since 1970, UTC.
    """

    def __init__(
        self,
        run_dir: Path,
        rank: int,
        resumed_step: int | None = None,
        sink: MetricsSink | None = None,
        *,
        bears_full_disk: bool = False,
    ) -> None:
        """Open the log for appending; the directory is created if missing.

        Args:
            run_dir: the run's directory.
            rank: this process's rank.
            resumed_step: step of the checkpoint from which the run resumes; None for a new run. "step", "eval" and
                "skipped" lines of later steps are dropped, because the run writes them again. A last line that a
                crash truncated is dropped too.
            sink: also receives the numbers, and is closed with the log.
            bears_full_disk: True: while the disk is full, lines are kept in memory and written once there is space,
                and TensorBoard scalars are dropped. False: a full disk is an error.
        """
        self._file: FileIO | None = None
        self._sink, self._bears_full_disk = sink, bears_full_disk
        if rank != 0:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "log.jsonl"
        if resumed_step is not None and path.exists():
            _truncate(path, resumed_step)
        # Unbuffered: after a write to a full disk, the number of written bytes is known, and the rest can be retried.
        self._path, self._file, self._unwritten = path, path.open("ab", buffering=0), b""
        # TensorBoard hides events of earlier files from this step on, because the resumed run writes them again.
        self._scalars: ScalarFile | None = None
        self._purge_step = None if resumed_step is None else resumed_step + 1
        self._write_scalars(0, {})

    def write(self, event: str, step: int, **values: Any) -> None:
        """Append one line, and write its numbers to TensorBoard as `<event>/<name>`.

        Args:
            event: type of the event: "step", "eval", "stage", ...
            step: number of optimizer steps done.
            **values: text, numbers, 0-d tensors, None, and lists and dictionaries of them. A number that JSON
                cannot represent (NaN, infinity) is written as null.

        Raises:
            ValueError: a value has another type, or is named "time".
            OSError: the disk is full and `bears_full_disk` is False, or another error of the file; names the file.
        """
        if self._file is None:
            return
        line = {"event": event, "step": step, "time": round(time.time(), 3)}
        if clash := line.keys() & values.keys():
            raise ValueError(f"{event}: the name {clash.pop()!r} is reserved by the log; choose another")
        plain = {name: _plain(name, value) for name, value in values.items()}
        self._unwritten += (json.dumps({**line, **plain}, allow_nan=False) + "\n").encode()
        self._write_lines()
        numbers = dict(_numbers(event, values))
        self._write_scalars(step, numbers)
        if self._sink is not None:
            self._sink.write(step, numbers)

    def _write_lines(self) -> None:
        assert self._file is not None
        try:
            with self._full_disk(self._path):
                while self._unwritten:  # bytes that could not be written remain for the next call
                    self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError:
            self._unwritten = b""  # otherwise `close` would fail as well and hide the error that ends the run
            raise

    def _write_scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        folder = self._path.parent / "tensorboard"
        with self._full_disk(folder):
            if self._scalars is None:
                self._scalars = ScalarFile(folder, self._purge_step)
            self._scalars.write(step, numbers)
            return
        # Reached only if the disk was full: the file may end with half an event, so the next event starts a new file.
        if self._scalars is not None:
            self._scalars.close()
            self._scalars, self._purge_step = None, None

    @contextmanager
    def _full_disk(self, path: Path) -> Iterator[None]:
        """Context manager that ignores a full disk if `bears_full_disk`, and adds `path` to other errors."""
        try:
            with path_in_errors(path):
                yield
        except OSError as error:
            if not (self._bears_full_disk and is_disk_full(error)):
                raise

    def close(self) -> None:
        """Flush and close the files; closing twice is allowed."""
        if self._file is None:
            return
        self._write_lines()
        if self._unwritten:
            lost = self._unwritten.count(b"\n")
            say(f"{self._path}: the disk is full: the last {lost} lines are missing", sys.stderr)
        self._file.close()
        self._file = None
        if self._scalars is not None:
            self._scalars.close()
        if self._sink is not None:
            self._sink.close()

    def __enter__(self) -> "RunLog":
        """Return the log itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the log."""
        self.close()


def read_log(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log; a truncated last line is ignored."""
    text = (run_dir / "log.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _truncate(path: Path, resumed_step: int) -> None:
    """Drop the lines that the resumed run will write again; the file is replaced atomically."""
    kept = [
        line
        for line in read_log(path.parent)
        if not (line["event"] in _REPEATED_EVENTS and line["step"] > resumed_step)
    ]
    replace_file(path, "".join(json.dumps(line) + "\n" for line in kept))


def _plain(name: str, value: Any) -> Any:
    """Convert a value to JSON types."""
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
    """Convert a tensor or numpy scalar of one element to a Python number; return other values unchanged."""
    is_scalar = getattr(value, "shape", None) is not None and math.prod(value.shape) == 1
    return value.item() if is_scalar else value


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Yield (slash-separated name, number) for the numbers in a nested dictionary."""
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from _numbers(f"{name}/{key}", child)
    elif isinstance(number := _number(value), int | float) and not isinstance(number, bool):
        yield name, float(number)
