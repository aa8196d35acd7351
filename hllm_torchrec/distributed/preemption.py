"""Preemption: a first SIGTERM or SIGINT (Ctrl-C) ends a run after the current step, with a checkpoint.

A second signal ends the process immediately. All ranks must stop at the same step. Each rank therefore adds its flag to
an all-reduce that every training step has anyway (`Trainer.train_step`), and checks the flags of all ranks at every
batch of an evaluation or of an encoding of the catalogue (`raise_if_preempted`).
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
"""Seconds after a signal in which further signals count as the same request. One request can arrive twice: a scheduler
or a terminal signals every process of a job, and torchrun forwards the signal that it received."""
_INTERRUPTED = 130
"""Exit status after Ctrl-C; equal to `launch.entry.INTERRUPTED`."""

_active_handlers: "list[PreemptionHandler]" = []


class PreemptionHandler:
    """Context manager that turns SIGTERM and SIGINT into the flag `requested`. Has no effect outside the main thread.

    interrupted: True if the signal was SIGINT.
    """

    def __init__(self) -> None:
        self.requested = self.interrupted = False
        self._since = math.inf
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "PreemptionHandler":
        """Install the signal handler."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                # A shell starts background jobs with SIGINT ignored: Ctrl-C is meant for the foreground job. Keep that.
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
        """Return the exception. where: end of its message, such as " after step 5, which is saved"."""
        name = "SIGINT" if self.interrupted else "SIGTERM"
        return Preempted(f"asked to leave ({name}){where}", interrupted=self.interrupted)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if time.monotonic() - self._since > REPEAT_SECONDS:
            self._end_at_once(number)
        elif not self.requested:
            self.requested, self.interrupted, self._since = True, number == signal.SIGINT, time.monotonic()

    def _end_at_once(self, number: int) -> None:
        """End the process without unwinding the stack, which could wait for a thread or for another rank."""
        if number == signal.SIGINT:
            os.write(2, b"interrupted twice: ends at once, without a checkpoint of the last steps\n")
            os._exit(_INTERRUPTED)
        # The system's default action ends the process with the exit status of the signal.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)


def raise_if_preempted() -> None:
    """Raise `Preempted` on every rank if any rank received SIGTERM or SIGINT.

    Collective within a `PreemptionHandler`; outside of one it does nothing.
    """
    if _active_handlers and not all_agree_to_continue(not _active_handlers[-1].requested):
        raise _active_handlers[-1].preempted()
