"""Writing of a run's checkpoints as configured: synchronously or in the background, with handling of a full disk."""

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
from hllm_torchrec.common.terminal import say
from hllm_torchrec.config.schema import Config
from hllm_torchrec.distributed import coordination


class CheckpointManager:
    """Saves the checkpoints of a run according to its configuration (`reliability`, `evaluation.keep_last`).

    All methods are collective.
    """

    def __init__(self, config: Config, storage: RunStorage | None = None) -> None:
        self.storage = storage or RunStorage(Path(config.output), None)
        self.output, self._keep_last = self.storage.folder, config.evaluation.keep_last
        self._ignores_disk_full = config.reliability.disk_full == "go_on"
        wanted = config.reliability.asynchronous_checkpoints
        self._writer = BackgroundWriter(config.parallel.timeout) if wanted else None
        self._pending: tuple[int, Path, float] | None = None
        self.last_saved_step = 0
        """Step of the last checkpoint that was written or is being written; 0 if there is none, or if writing it in the
        background failed."""
        self.last_error: Exception | None = None
        """Error of the last save, if the disk was full and the run continued."""

    @property
    def pending_save_failed(self) -> bool:
        """Return whether the pending save has failed on this rank; `finish_pending_save` raises its error."""
        return self._writer is not None and self._writer.failed

    def save(
        self, step: int, state: Mapping[str, Any], extra: Mapping[str, Any], metric: float | None, log: RunLog
    ) -> None:
        """Wait for the previous checkpoint, then write that of `step`.

        With a background writer, return when the tensors have been copied to host memory.

        Raises:
            DiskFull: the disk is too full for this or the previous checkpoint, and the run is not configured to
                continue.
            RuntimeError, OSError: as `save_checkpoint`.
        """
        self.finish_pending_save(log)
        # The other files of the run come first, so that a published checkpoint never lacks its configuration.
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
        """Wait for the pending save, if there is one; raises as `save`."""
        if self._pending is None:
            return
        (step, path, seconds), self._pending = self._pending, None
        begun = time.perf_counter()
        try:
            if self._writer is not None:
                self._writer.finish()
        except (DiskFull, coordination.PeerFailed) as error:
            # This step was not saved: without the reset, the save at the end of the run might be skipped.
            self.last_saved_step = 0
            self._tolerate_disk_full(step, error, log)
            return
        seconds += time.perf_counter() - begun
        log.write("checkpoint", step, path=str(path.relative_to(self.output)), waited=seconds)

    @contextmanager
    def wait_for_pending_save_on_error(self) -> Iterator[None]:
        """Context manager that waits for the pending save if its body raises: the run may be resumed from it."""
        try:
            yield
        except BaseException:
            if self._writer is not None:
                try:
                    self._writer.finish()
                except Exception as error:  # only printed, because it must not replace the error that ends the run
                    reason = next(iter(str(error).splitlines()), type(error).__name__)
                    say(f"the pending checkpoint was not written: {reason}", sys.stderr)
            raise

    def close(self, log: RunLog) -> None:
        """Wait for the last checkpoint at the end of a run. Raises as `save`, and `last_error` if there is one."""
        self.finish_pending_save(log)
        if self.last_error is not None:
            raise self.last_error

    def _tolerate_disk_full(self, step: int, error: Exception, log: RunLog) -> None:
        """Log a full disk if the run is configured to continue; raise any other error. The same on all ranks."""
        # The rank whose disk is full has a DiskFull; the other ranks have a PeerFailed of kind "DiskFull".
        full = isinstance(error, DiskFull) or getattr(error, "kind", "") == "DiskFull"
        if not full or not self._ignores_disk_full:
            raise error
        self.last_error = error
        log.write("not_saved", step, reason=str(error))
        if coordination.rank() == 0:
            say(f"step {step}: {error}; training goes on")
