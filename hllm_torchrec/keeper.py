"""When and how a run's checkpoints are written, and what happens when one cannot be."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hllm_torchrec import ranks
from hllm_torchrec.checkpoint import BackgroundWriter, rng_state, save_checkpoint
from hllm_torchrec.checkpoint_files import DiskFull
from hllm_torchrec.config import Config
from hllm_torchrec.logs import RunLog
from hllm_torchrec.remote.runs import RunPlace


class CheckpointKeeper:
    """Saves a run's checkpoints as its configuration says: on a thread or not, going on with a full disk or not.

    All of it is collective.
    """

    def __init__(self, config: Config, place: RunPlace | None = None) -> None:
        self.place = place or RunPlace(Path(config.output), None)
        self.output, self._keep_last = self.place.folder, config.evaluation.keep_last
        self._go_on = config.reliability.disk_full == "go_on"
        wanted = config.reliability.asynchronous_checkpoints
        self._writer = BackgroundWriter(config.parallel.timeout) if wanted else None
        self._in_flight: tuple[int, Path, float] | None = None
        self.saved = 0
        """Step of the last checkpoint that was written or is being written."""
        self.failure: Exception | None = None
        """Why the last one was not written, where the run goes on without."""

    @property
    def failed(self) -> bool:
        """Whether a checkpoint in flight is known on this rank to have failed; `settle` raises why."""
        return self._writer is not None and self._writer.failed

    def save(
        self, step: int, state: Mapping[str, Any], extra: Mapping[str, Any], metric: float | None, log: RunLog
    ) -> None:
        """Write the checkpoint of a step, or begin to, once the one before it is finished.

        Raises:
            DiskFull: unless the run is to go on without.
            RuntimeError: another rank failed, or the files could not be written.
        """
        self.settle(log)
        self.place.publish()
        begun = time.perf_counter()
        try:
            path = save_checkpoint(
                self.output / "checkpoints",
                step,
                state,
                {"step": step, **extra},
                rank_extra={"rng": rng_state()},
                keep_last=self._keep_last,
                keep_best="max",
                metric=metric,
                background=self._writer,
                url=self.place.checkpoints,
            )
        except (DiskFull, ranks.PeerFailed) as error:
            self._bear(step, error, log)
            return
        self.saved, self.failure = step, None
        self._in_flight = step, path, time.perf_counter() - begun
        if self._writer is None:
            self.settle(log)

    def settle(self, log: RunLog) -> None:
        """Wait for the checkpoint in flight, if there is one; raises as `save`."""
        if self._in_flight is None:
            return
        (step, path, seconds), self._in_flight = self._in_flight, None
        begun = time.perf_counter()
        try:
            if self._writer is not None:
                self._writer.finish()
        except (DiskFull, ranks.PeerFailed) as error:
            self.saved = 0
            self._bear(step, error, log)
            return
        seconds += time.perf_counter() - begun
        log.write("checkpoint", step, path=str(path.relative_to(self.output)), waited=seconds)

    @contextmanager
    def in_a_run(self) -> Iterator[None]:
        """A context whose errors wait for the checkpoint in flight, which may be the one to go on from."""
        try:
            yield
        except BaseException:
            if self._writer is not None:
                try:
                    self._writer.finish()
                except Exception as error:  # the run fails of something else; this is said besides
                    reason = next(iter(str(error).splitlines()), type(error).__name__)
                    print(f"the checkpoint in flight was not written: {reason}", file=sys.stderr, flush=True)
            raise

    def close(self, log: RunLog) -> None:
        """At the end of a run: wait for the last checkpoint. Raises as `save`, and where the last one is missing."""
        self.settle(log)
        if self.failure is not None:
            raise self.failure

    def _bear(self, step: int, error: Exception, log: RunLog) -> None:
        """Go on without a checkpoint where that is wanted and a full disk is all that is wrong, on all ranks alike."""
        full = isinstance(error, DiskFull) or getattr(error, "kind", "") == "DiskFull"
        if not full or not self._go_on:
            raise error
        self.failure = error
        log.write("not_saved", step, reason=str(error))
        if ranks.rank() == 0:
            print(f"step {step}: {error}; training goes on", flush=True)
