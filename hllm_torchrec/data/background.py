"""Prefetching of batches on a background thread while the main thread trains."""

import itertools
import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def prefetch(batches: Iterator[T], depth: int, timeout: float, where: str) -> Generator[T, None, None]:
    """Run an iterator on a background thread, `depth` items ahead, and re-raise its errors in the caller.

    Closing the generator stops the thread.

    Args:
        depth: items prepared ahead; 0 runs the iterator in the calling thread.
        timeout: seconds to wait for an item before TimeoutError.
        where: prefix of the error messages.
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
                    f"{where}: no batch for {timeout:g} s (batches before: {number}); the dataset's disk does not "
                    "answer, or a batch takes longer than parallel.timeout"
                ) from None  # queue.Empty tells the user nothing
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    # Runs on normal end, on error and on generator.close(), so that no thread outlives the loop that reads from it.
    finally:
        producer.stop()


class _Producer:
    """A thread that runs an iterator and fills the queue `ready`.

    Entries are ("batch", batch), followed by one ("end", None) or ("error", error).
    """

    def __init__(self, batches: Iterator[Any], depth: int, where: str) -> None:
        self.ready: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        # A daemon, so that a thread stuck in a read does not keep the process alive at exit.
        self._thread = threading.Thread(target=self._run, args=(batches, where), name="hllm-loader", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread after its current batch; waits at most 5 seconds for it."""
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
        except BaseException as error:  # a SystemExit that is re-raised as it is would end the job with status 0
            self._put("error", RuntimeError(f"{where}: the thread that prepares batches was ended by {error!r}"))

    def _put(self, kind: str, value: Any) -> bool:
        while not self._stopped.is_set():
            try:
                # A short timeout, so that a full queue that is no longer read does not block `stop`.
                self.ready.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
