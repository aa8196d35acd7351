"""Preemption: SIGTERM or Ctrl-C (SIGINT) ends a run with a checkpoint after the present step, a second one at once.

All ranks must stop at the same step, so each reports its signal in a sum that every training step has anyway
(`Trainer.train_step`), and at every batch of an evaluation or an encoding of the catalogue (`raise_if_preempted`).
"""

import math
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from hllm_torchrec.common.errors import Preempted
from hllm_torchrec.distributed.collectives import all_agree_to_continue

REPEAT_SECONDS = 1.0
"""Seconds in which further signals count as the same request: schedulers send SIGTERM to every process of a job, a
terminal sends SIGINT to all of them, and torchrun forwards what it receives itself."""
_INTERRUPTED = 130
"""Exit status after Ctrl-C, as `launch.entry.INTERRUPTED`."""

_active_handlers: "list[PreemptionHandler]" = []


class PreemptionHandler:
    """Context manager that turns SIGTERM and SIGINT into the flag `requested` (main thread only; else it does nothing).

    interrupted: whether the request was a SIGINT.
    """

    def __init__(self) -> None:
        self.requested = self.interrupted = False
        self._since = math.inf
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "PreemptionHandler":
        """Install the signal handler."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                # Shells let jobs in the background ignore SIGINT, which is meant for the one in the foreground.
                if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._on_signal)
        _active_handlers.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the previous signal handlers."""
        _active_handlers.remove(self)
        for number, before in self._before.items():
            signal.signal(number, before)

    def preempted(self, where: str = "") -> Preempted:
        """Make the exception; where: what follows in its message, such as " after step 5, which is saved"."""
        name = "SIGINT" if self.interrupted else "SIGTERM"
        return Preempted(f"asked to leave ({name}){where}", interrupted=self.interrupted)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if time.monotonic() - self._since > REPEAT_SECONDS:
            self._end_at_once(number)
        elif not self.requested:
            self.requested, self.interrupted, self._since = True, number == signal.SIGINT, time.monotonic()

    def _end_at_once(self, number: int) -> None:
        """End the process on a second request, wherever it is: what unwinds could wait for a thread or another rank."""
        if number == signal.SIGINT:
            os.write(2, b"interrupted twice: ends at once, without a checkpoint of the last steps\n")
            os._exit(_INTERRUPTED)
        # As without a handler, so that the exit status is that of the signal.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)


def raise_if_preempted() -> None:
    """Raise on every rank if any rank received a SIGTERM or SIGINT.

    Collective within a `PreemptionHandler`; outside of one it does nothing.

    Raises:
        Preempted: a rank received one.
    """
    if _active_handlers and not all_agree_to_continue(not _active_handlers[-1].requested):
        raise _active_handlers[-1].preempted()
