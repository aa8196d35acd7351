"""Leaving when asked to: a SIGTERM ends a run after its present step with a checkpoint, a second one at once.

The ranks must leave at the same step, so each tells the others in a sum that a training step has anyway
(`Trainer.train_step`), and at every batch of an evaluation or an encoding of the catalogue (`leave_if_asked`).
"""

import math
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from hllm_torchrec.errors import Preempted
from hllm_torchrec.exchange import all_agree_to_continue

ONE_REQUEST = 1.0
"""Seconds in which further SIGTERMs are the same request: schedulers send it to a job's every process, and torchrun
passes on the one that it gets itself."""

_listening: "list[LeaveRequest]" = []


class LeaveRequest:
    """A context that notes a SIGTERM instead of dying of it; in threads other than the main one it notes nothing."""

    def __init__(self) -> None:
        self.asked = False
        self._since = math.inf
        self._before: Any = None

    def __enter__(self) -> "LeaveRequest":
        """Begin to listen."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        _listening.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave SIGTERM to whom it belonged before."""
        _listening.remove(self)
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if time.monotonic() - self._since > ONE_REQUEST:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
        elif not self.asked:
            self.asked, self._since = True, time.monotonic()


def leave_if_asked() -> None:
    """Within a `LeaveRequest`: raise on every rank if any of them was asked to leave. Collective there; else nothing.

    Raises:
        Preempted: one was.
    """
    if _listening and not all_agree_to_continue(not _listening[-1].asked):
        raise Preempted("asked to leave (SIGTERM)")
