"""Leaving when asked to: a SIGTERM ends a run after its present step with a checkpoint, a second one at once.

The ranks must leave at the same step, so each tells the others in a sum that a training step has anyway
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
"""Seconds in which further SIGTERMs are the same request: schedulers send it to a job's every process, and torchrun
passes on the one that it gets itself."""

_active_handlers: "list[PreemptionHandler]" = []


class PreemptionHandler:
    """A context that notes a SIGTERM instead of dying of it; in threads other than the main one it notes nothing."""

    def __init__(self) -> None:
        self.requested = False
        self._since = math.inf
        self._before: Any = None

    def __enter__(self) -> "PreemptionHandler":
        """Begin to listen."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._on_sigterm)
        _active_handlers.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave SIGTERM to whom it belonged before."""
        _active_handlers.remove(self)
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        if time.monotonic() - self._since > REPEAT_SECONDS:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
        elif not self.requested:
            self.requested, self._since = True, time.monotonic()


def raise_if_preempted() -> None:
    """Within a `PreemptionHandler`: raise on every rank if any of them was asked to leave. Collective there; else
    nothing.

    Raises:
        Preempted: one was.
    """
    if _active_handlers and not all_agree_to_continue(not _active_handlers[-1].requested):
        raise Preempted("asked to leave (SIGTERM)")
