"""Log of a run: JSON lines and TensorBoard scalars, with an optional further sink."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO

from hllm_torchrec.common.atomic_files import replace_file

#: Events that are repeated when a run resumes from an earlier checkpoint.
_REPEATED_EVENTS = ("step", "eval", "skipped")


class MetricsSink(Protocol):
    """Additional destination of a run's metrics."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log the numbers of one event, by `<event>/<name>`."""

    def close(self) -> None:
        """Flush and close the sink."""


class RunLog:
    """Log of a run: `log.jsonl`, one object per line, and `tensorboard/`. Only rank 0 writes.

    A line is `{"event": "step", "step": 100, "time": 1700000000.0, ...}`; time is in seconds since 1970, UTC.
    """

    def __init__(
        self, run_dir: Path, rank: int, resumed_step: int | None = None, sink: MetricsSink | None = None
    ) -> None:
        """Open the log for appending; the directory is created if missing.

        Args:
            run_dir: the run's directory.
            rank: this process's rank.
            resumed_step: when resuming, the checkpoint's step. "step", "eval" and "skipped" lines after it are
                dropped because the run repeats them, as is a last line that a crash truncated.
            sink: also receives the numbers, and is closed with the log.
        """
        self._file: TextIO | None = None
        self._sink = sink
        if rank != 0:
            return
        from torch.utils.tensorboard import SummaryWriter  # the import takes seconds; only rank 0 needs it

        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "log.jsonl"
        if resumed_step is not None and path.exists():
            _truncate(path, resumed_step)
        self._file = path.open("a")
        # TensorBoard hides earlier events from this step on, because the resumed run writes them again.
        purge = None if resumed_step is None else resumed_step + 1
        self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)

    def write(self, event: str, step: int, **values: Any) -> None:
        """Append one line, and write its numbers to TensorBoard as `<event>/<name>`.

        Args:
            event: what happened: "step", "eval", "stage", ...
            step: optimizer steps done.
            **values: text, numbers, 0-d tensors, None, and lists and dictionaries of them. A number that JSON
                cannot represent (NaN, infinity) is written as null.

        Raises:
            ValueError: a value of another type, or a value named "event", "step" or "time".
        """
        if self._file is None:
            return
        line = {"event": event, "step": step, "time": round(time.time(), 3)}
        if clash := line.keys() & values.keys():
            raise ValueError(f"{event}: the name {clash.pop()!r} is reserved by the log; choose another")
        plain = {name: _plain(name, value) for name, value in values.items()}
        self._file.write(json.dumps({**line, **plain}, allow_nan=False) + "\n")
        self._file.flush()
        numbers = dict(_numbers(event, values))
        for name, number in numbers.items():
            self._tensorboard.add_scalar(name, number, step)
        if self._sink is not None:
            self._sink.write(step, numbers)

    def close(self) -> None:
        """Flush and close the files; closing twice is allowed."""
        if self._file is not None:
            self._file.close()
            self._tensorboard.close()
            if self._sink is not None:
                self._sink.close()
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
    """Return the lines of a run's log; a truncated last line is ignored."""
    text = (run_dir / "log.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _truncate(path: Path, resumed_step: int) -> None:
    """Drop the lines that a resumed run repeats; the file is replaced atomically."""
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
