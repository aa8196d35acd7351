"""Progress bars: a bar on a terminal, a line every ten seconds elsewhere."""

import sys
from typing import Any, TextIO

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0


class _Lines:
    """Output stream for tqdm: each state of the bar is a line of its own, instead of overwriting the previous one."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if text.strip():
            self._stream.write(text.strip() + "\n")

    def flush(self) -> None:
        self._stream.flush()


def progress(total: int | None, desc: str, enabled: bool = True, unit: str = "it", initial: int = 0) -> "tqdm[Any]":
    """Return a progress bar with the remaining time; on a terminal a bar, elsewhere a line every 10 seconds.

    Args:
        total: units of work, or None if the number is not known.
        desc: label of the bar.
        enabled: False shows nothing; pass False on all ranks except 0.
        unit: name of a unit.
        initial: units that an earlier process has done.
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
