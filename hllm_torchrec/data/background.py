"""Preparing batches on a background thread, ahead of the one that trains on them."""

import itertools
import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def prefetch(batches: Iterator[T], depth: int, timeout: float, where: str) -> Generator[T, None, None]:
    """Run an iterator on a background thread, `depth` items ahead; its errors are raised here.

    Closing the generator stops the thread. timeout: seconds to wait for an item; where: for the message after that.
    """
    if depth <= 0:
        yield from batches
        return
    producer = _Producer(batches, depth, where)
    try:
        for number in itertools.count():
            try:
                kind, value = producer.ready.get(timeout=timeout)
            except queue.Empty:
                raise TimeoutError(
                    f"{where}: no batch for {timeout:g} s, after {number}; the dataset's disk does not answer, or a "
                    "batch takes longer than parallel.timeout"
                ) from None
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        producer.stop()


class _Producer:
    """A thread that runs an iterator; in `ready` are ("batch", batch), and then ("end", None) or ("error", error)."""

    def __init__(self, batches: Iterator[Any], depth: int, where: str) -> None:
        self.ready: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(batches, where), name="hllm-loader", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the batch that it is making, and wait for that, but not for long."""
        self._stopped.set()
        self._thread.join(timeout=5)

    def _run(self, batches: Iterator[Any], where: str) -> None:
        try:
            for batch in batches:
                if not self._put("batch", batch):
                    return
            self._put("end", None)
        except Exception as error:  # handed to the consumer, who raises it
            self._put("error", error)
        except BaseException as error:  # raised as it is, a SystemExit would end the job as if all were well
            self._put("error", RuntimeError(f"{where}: the thread that prepares batches was ended by {error!r}"))

    def _put(self, kind: str, value: Any) -> bool:
        while not self._stopped.is_set():
            try:
                self.ready.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
