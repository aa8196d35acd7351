"""When and how a run's checkpoints are written, and what happens when one cannot be."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hllm_torchrec.checkpoint.layout import DiskFull
from hllm_torchrec.checkpoint.load import BackgroundWriter, rng_state, save_checkpoint
from hllm_torchrec.checkpoint.remote_runs import RunStorage
from hllm_torchrec.common.run_log import RunLog
from hllm_torchrec.config.schema import Config
from hllm_torchrec.distributed import coordination


class CheckpointManager:
    """Saves a run's checkpoints as its configuration says: on a thread or not, going on with a full disk or not.

    All of it is collective.
    """

    def __init__(self, config: Config, storage: RunStorage | None = None) -> None:
        self.storage = storage or RunStorage(Path(config.output), None)
        self.output, self._keep_last = self.storage.folder, config.evaluation.keep_last
        self._ignores_disk_full = config.reliability.disk_full == "go_on"
        wanted = config.reliability.asynchronous_checkpoints
        self._writer = BackgroundWriter(config.parallel.timeout) if wanted else None
        self._pending: tuple[int, Path, float] | None = None
        self.last_saved_step = 0
        """Step of the last checkpoint that was written or is being written."""
        self.last_error: Exception | None = None
        """Why the last one was not written, where the run goes on without."""

    @property
    def pending_save_failed(self) -> bool:
        """Whether a checkpoint in flight is known on this rank to have failed; `finish_pending_save` raises why."""
        return self._writer is not None and self._writer.failed

    def save(
        self, step: int, state: Mapping[str, Any], extra: Mapping[str, Any], metric: float | None, log: RunLog
    ) -> None:
        """Write the checkpoint of a step, or begin to, once the one before it is finished.

        Raises:
            DiskFull: unless the run is to go on without.
            RuntimeError: another rank failed, or the files could not be written.
        """
        self.finish_pending_save(log)
        self.storage.publish()
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
                url=self.storage.checkpoints,
            )
        except (DiskFull, coordination.PeerFailed) as error:
            self._tolerate_disk_full(step, error, log)
            return
        self.last_saved_step, self.last_error = step, None
        self._pending = step, path, time.perf_counter() - begun
        if self._writer is None:
            self.finish_pending_save(log)

    def finish_pending_save(self, log: RunLog) -> None:
        """Wait for the checkpoint in flight, if there is one; raises as `save`."""
        if self._pending is None:
            return
        (step, path, seconds), self._pending = self._pending, None
        begun = time.perf_counter()
        try:
            if self._writer is not None:
                self._writer.finish()
        except (DiskFull, coordination.PeerFailed) as error:
            self.last_saved_step = 0
            self._tolerate_disk_full(step, error, log)
            return
        seconds += time.perf_counter() - begun
        log.write("checkpoint", step, path=str(path.relative_to(self.output)), waited=seconds)

    @contextmanager
    def wait_for_pending_save_on_error(self) -> Iterator[None]:
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
        self.finish_pending_save(log)
        if self.last_error is not None:
            raise self.last_error

    def _tolerate_disk_full(self, step: int, error: Exception, log: RunLog) -> None:
        """Go on without a checkpoint where that is wanted and a full disk is all that is wrong, on all ranks alike."""
        full = isinstance(error, DiskFull) or getattr(error, "kind", "") == "DiskFull"
        if not full or not self._ignores_disk_full:
            raise error
        self.last_error = error
        log.write("not_saved", step, reason=str(error))
        if coordination.rank() == 0:
            print(f"step {step}: {error}; training goes on", flush=True)
