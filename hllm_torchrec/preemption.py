"""Leaving when asked to: the first SIGTERM ends a run after its present step with a checkpoint, the second at once.

The ranks must leave at the same step, so each tells the others in a sum that a training step has anyway
(`Trainer.train_step`), and at every batch of an evaluation or an encoding of the catalogue (`leave_if_asked`).
"""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from hllm_torchrec.errors import Preempted
from hllm_torchrec.exchange import all_agree_to_continue

_listening: "list[LeaveRequest]" = []


class LeaveRequest:
    """A context that notes a SIGTERM instead of dying of it; in threads other than the main one it notes nothing."""

    def __init__(self) -> None:
        self.asked = False
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
        self.asked = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends the process at once


def leave_if_asked() -> None:
    """Within a `LeaveRequest`: raise on every rank if any of them was asked to leave. Collective there; else nothing.

    Raises:
        Preempted: one was.
    """
    if _listening and not all_agree_to_continue(not _listening[-1].asked):
        raise Preempted("asked to leave (SIGTERM)")
