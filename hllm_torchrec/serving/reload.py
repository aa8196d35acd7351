"""Reload of the model of a running service.

The new model is loaded next to the old one, compared with it on recent requests, and swapped in between two batches.

If anything fails, or a probability changes by more than the bound, the old model stays in use. User states of the new
model are computed at each user's next request. After `hllm rollback` a reload returns to the previous model.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hllm_torchrec.common.terminal import say
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.evaluation.calibration import RunCalibration
from hllm_torchrec.evaluation.run_loader import find_checkpoint, run_config, weights_fingerprint
from hllm_torchrec.serving.engine import Engine, Scores
from hllm_torchrec.serving.service import Service


class ReloadRefusedError(Exception):
    """Raised if the model in use was not replaced; the message has the reason."""


@dataclass(frozen=True)
class ReloadReport:
    """Result of a reload.

    model, previous: marks of the model in use now and before, equal if nothing new was published. requests: number
    of recent requests on which both models were compared; largest_change, mean_change: of the probabilities of
    their candidates.
    """

    model: str
    previous: str
    requests: int = 0
    largest_change: float = 0.0
    mean_change: float = 0.0


class Reloader:
    """Reloads the model of a service.

    load: function that builds the engine of the currently published model; max_change: largest accepted change of a
    probability.
    """

    def __init__(self, service: Service, load: Callable[[], Engine], max_change: float = 0.5) -> None:
        self._service, self._load, self._max_change = service, load, max_change
        self._lock = threading.Lock()

    def reload(self) -> ReloadReport:
        """Load the published model, compare it with the one in use, and replace that one. Takes as long as a start.

        Raises:
            ReloadRefusedError: the model could not be loaded, its scores differ too much, or a reload is running.
        """
        if not self._lock.acquire(blocking=False):
            raise ReloadRefusedError("a reload is under way: wait for it")
        try:
            self._refresh_titles()
            report = self._reload()
        except ReloadRefusedError:
            self._service.metrics.reloads.labels("refused").inc()
            raise
        finally:
            self._lock.release()
        self._service.metrics.reloads.labels("done").inc()
        return report

    def _refresh_titles(self) -> None:
        try:
            if self._service.titles is not None:
                self._service.titles.refresh()
        except (ValueError, OSError) as error:
            say(f"hllm serve: the titles stay: {error}")  # the model is reloaded nevertheless

    def _reload(self) -> ReloadReport:
        old = self._service.engine
        try:
            new = self._load()
        except Exception as error:  # after any error the model in use is kept
            raise ReloadRefusedError(f"{type(error).__name__}: {error}") from error
        if new.mark == old.mark:
            new.close()
            return ReloadReport(old.mark, old.mark)
        try:
            report = self._compared(old, new)
        except BaseException:
            new.close()
            raise
        self._service.batches.between_batches(lambda: self._use(new)).result()
        old.close()
        return report

    def _compared(self, old: Engine, new: Engine) -> ReloadReport:
        """Compare both models' probabilities for the recent requests; this is also a warm-up of the new model.

        Raises:
            ReloadRefusedError: a change is above the bound, or a score is NaN.
        """
        sample = list(self._service.recent)
        before = self._service.batches.between_batches(lambda: old.score(sample)).result()
        changes = probability_changes(before, new.score(sample))
        largest, mean = (float(changes.max()), float(changes.mean())) if changes.size else (0.0, 0.0)
        if not largest <= self._max_change:  # `not <=` also refuses NaN
            raise ReloadRefusedError(
                f"model {new.mark} changes a probability of {len(sample)} recent requests by {largest:.3f}, more than "
                f"{self._max_change:g}: inspect the model, or raise --max-change"
            )
        return ReloadReport(new.mark, old.mark, len(sample), largest, mean)

    def _use(self, engine: Engine) -> None:
        self._service.engine = engine


def probability_changes(
    before: Sequence[Scores | Exception], after: Sequence[Scores | Exception]
) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """Absolute changes |p - p'| of the probabilities of all candidates that both models scored."""
    parts = [np.empty(0)]
    for one, other in zip(before, after, strict=True):
        if isinstance(one, Scores) and isinstance(other, Scores):
            parts.append(np.abs(one.probabilities.astype(np.float64) - other.probabilities))
    return np.concatenate(parts)


def published(run: Path, which: str, dataset: Path | None) -> tuple[str, int, RunCalibration | None]:
    """Weights (fingerprint), dataset version and calibration that a service of the run would load now.

    Raises:
        ValueError: as `load_run`.
    """
    config = run_config(run, dataset)
    version = Dataset.open(config.data.dataset, config.data.version).version
    checkpoint = find_checkpoint(run, which)
    return weights_fingerprint(checkpoint), version, RunCalibration.load(checkpoint.parent.parent)


def watch(
    reloader: Reloader,
    state: Callable[[], object],
    every: float,
    stop: threading.Event,
    say: Callable[[object], None],
) -> None:
    """Call `state` every `every` seconds until `stop`, and reload if its value has changed.

    If a reload is refused, the reason is printed, and the next reload is tried when `state` changes again.
    """
    known = state()
    while not stop.wait(every):
        try:
            found = state()
        except (ValueError, OSError) as error:  # such as while a release is being published
            say(f"hllm serve: {error}")
            continue
        if found == known:
            continue
        known = found
        try:
            report = reloader.reload()
            say(f"hllm serve: model {report.model}, {_comparison_text(report)}")
        except ReloadRefusedError as error:
            say(f"hllm serve: the model stays: {error}")


def _comparison_text(report: ReloadReport) -> str:
    if not report.requests:
        return "no recent requests to compare it on"
    return f"largest change of a probability {report.largest_change:.3f} in {report.requests} recent requests"
