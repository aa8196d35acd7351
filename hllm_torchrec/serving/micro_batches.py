"""Micro-batching: requests of many users are collected into batches, which one thread computes.

The queue is bounded: a request that does not fit is refused immediately (`QueueFull`), and a request that has waited
longer than the deadline is not computed (`DeadlineMissed`). Other work that needs the same thread, such as replacing
the model, runs between two batches.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Request = TypeVar("Request")
Result = TypeVar("Result")


class QueueFull(Exception):
    """Raised for a request when the queue is full (`BatchLimits.queue`)."""


class DeadlineMissed(Exception):
    """Set as the error of a request that waited longer than `BatchLimits.deadline`."""


@dataclass(frozen=True)
class BatchLimits:
    """Limits of batches and of the queue.

    requests: largest number of requests in a batch; wait: seconds that a batch waits for more requests after its first
    one; queue: largest number of accepted requests without an answer, including those that are being computed;
    deadline: a request that has waited longer (seconds) when its batch starts is not computed.
    """

    requests: int = 16
    wait: float = 0.0
    queue: int = 256
    deadline: float = 1.0


@dataclass
class _Waiting:
    request: Any
    answer: "Future[Any]"
    arrived: float


class MicroBatcher(Generic[Request, Result]):
    """Runs `compute(requests)` in a separate thread; `compute` returns a result or an exception for each request.

    observe: function called after each batch with the number of computed requests, the seconds that each of them
    waited, and the duration of the batch in seconds.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Request]], Sequence[Result | Exception]],
        limits: BatchLimits,
        observe: Callable[[int, Sequence[float], float], None] | None = None,
    ) -> None:
        self._compute, self.limits, self._observe = compute, limits, observe
        self._queue: queue.Queue[_Waiting | tuple[Callable[[], Any], Future[Any]] | None] = queue.Queue()
        self._waiting = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="hllm-batches", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of requests that were accepted and have no answer yet."""
        return self._waiting

    @property
    def alive(self) -> bool:
        """False once the thread has ended."""
        return self._thread.is_alive()

    def submit(self, request: Request) -> "Future[Result]":
        """Queue a request.

        Raises:
            QueueFull: `limits.queue` requests have no answer yet.
        """
        with self._lock:
            if self._waiting >= self.limits.queue:
                raise QueueFull
            self._waiting += 1
        answer: Future[Result] = Future()
        answer.add_done_callback(self._answered)
        self._queue.put(_Waiting(request, answer, time.monotonic()))
        return answer

    def between_batches(self, work: Callable[[], Any]) -> "Future[Any]":
        """Run `work` in the thread that computes batches, after all requests that are queued now."""
        done: Future[Any] = Future()
        self._queue.put((work, done))
        return done

    def close(self) -> None:
        """Answer the queued requests, then end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _answered(self, _: "Future[Any]") -> None:
        with self._lock:
            self._waiting -= 1

    def _run(self) -> None:
        while (first := self._queue.get()) is not None:
            if isinstance(first, tuple):
                _settle(first[1], first[0])
                continue
            batch, then = self._collect(first)
            self._answer(batch)
            if isinstance(then, tuple):
                _settle(then[1], then[0])
            elif then is None:
                return

    def _collect(self, first: _Waiting) -> tuple[list[_Waiting], Any]:
        """Return the batch that starts with `first`, and the queue entry that ended the batch early.

        That entry is other work or None (stop); if nothing ended the batch early, `first` is returned instead.
        """
        batch, until = [first], time.monotonic() + self.limits.wait
        while len(batch) < self.limits.requests:
            try:
                left = until - time.monotonic()
                one = self._queue.get(timeout=left) if left > 0 else self._queue.get_nowait()
            except queue.Empty:
                break
            if not isinstance(one, _Waiting):
                return batch, one
            batch.append(one)
        return batch, first

    def _answer(self, batch: list[_Waiting]) -> None:
        started = time.monotonic()
        kept = []
        for one in batch:
            # The future of a client that disconnected is cancelled.
            if not one.answer.set_running_or_notify_cancel():
                continue
            if started - one.arrived > self.limits.deadline:
                one.answer.set_exception(DeadlineMissed())
            else:
                kept.append(one)
        if not kept:
            return
        try:
            results: Sequence[Any] = self._compute([one.request for one in kept])
        except Exception as error:  # an error of the complete batch: each of its requests fails with it
            results = [error] * len(kept)
        if self._observe is not None:  # before the answers, so that /metrics has the requests that were answered
            self._observe(len(kept), [started - one.arrived for one in kept], time.monotonic() - started)
        for one, result in zip(kept, results, strict=True):
            if isinstance(result, Exception):
                one.answer.set_exception(result)
            else:
                one.answer.set_result(result)


def _settle(done: "Future[Any]", work: Callable[[], Any]) -> None:
    try:
        done.set_result(work())
    except Exception as error:
        done.set_exception(error)
