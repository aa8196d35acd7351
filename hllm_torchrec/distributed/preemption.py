"""Preemption: a SIGTERM ends a run with a checkpoint after the present step, a second SIGTERM ends it immediately.

All ranks must stop at the same step, so each reports its signal in a sum that every training step has anyway
(`Trainer.train_step`), and at every batch of an evaluation or an encoding of the catalogue (`raise_if_preempted`).
"""

import math
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from hllm_torchrec.common.errors import Preempted
from hllm_torchrec.distributed.collectives import all_agree_to_continue

REPEAT_SECONDS = 1.0
"""Seconds in which further SIGTERMs count as the same request: schedulers send it to every process of a job, and
torchrun forwards the one that it receives itself."""

_active_handlers: "list[PreemptionHandler]" = []


class PreemptionHandler:
    """Context manager that turns SIGTERM into the flag `requested` (main thread only; elsewhere it does nothing)."""

    def __init__(self) -> None:
        self.requested = False
        self._since = math.inf
        self._before: Any = None

    def __enter__(self) -> "PreemptionHandler":
        """Install the signal handler."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._on_sigterm)
        _active_handlers.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the previous signal handler."""
        _active_handlers.remove(self)
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        if time.monotonic() - self._since > REPEAT_SECONDS:
            # A second request: die as without a handler, so that the exit status is that of the signal.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
        elif not self.requested:
            self.requested, self._since = True, time.monotonic()


def raise_if_preempted() -> None:
    """Raise on every rank if any rank received a SIGTERM.

    Collective within a `PreemptionHandler`; outside of one it does nothing.

    Raises:
        Preempted: a rank received one.
    """
    if _active_handlers and not all_agree_to_continue(not _active_handlers[-1].requested):
        raise Preempted("asked to leave (SIGTERM)")
