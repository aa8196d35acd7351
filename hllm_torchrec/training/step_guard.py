"""What is too bad to go on with, a loss or gradients that are not finite, or too good to be true: labels that leak."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from hllm_torchrec.config.schema import Config
from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.distributed.collectives import all_agree_to_continue

_logger = logging.getLogger(__name__)


class StepGuard:
    """Decides what becomes of a step that is not as it should be, on all ranks alike.

    Sharded tables step inside the backward pass, so a loss that is not finite must be known before it: where steps
    may be skipped, the ranks ask one another at every micro-batch. Gradients that overflow although the loss is
    finite keep the dense weights as they are; the tables' rows of that step have moved.
    """

    def __init__(self, config: Config, rank: int, output: Path | None = None) -> None:
        self._skips_steps = config.reliability.not_finite == "skip"
        self._max_skipped = config.reliability.max_skipped
        self._folder, self._rank = (output or Path(config.output)) / "bad_batches", rank
        self._leakage, self._leakage_above = config.reliability.leakage, config.reliability.leakage_above
        self._consecutive_failures, self.reason = 0, ""

    def check_leakage(self, step: int, auc: float | None) -> None:
        """Warn, on rank 0, of a validation AUC that is too good to be true; None: nothing is classified.

        Raises:
            ValueError: `reliability.leakage` says to stop.
        """
        if auc is None or auc <= self._leakage_above:
            return
        problem = (
            f"step {step}: validation AUC {auc:.4f} is above reliability.leakage_above {self._leakage_above}: look for "
            "a feature made from the label or from later events (numeric features, item vectors, the split)"
        )
        if self._leakage == "stop":
            raise ValueError(problem)
        if self._rank == 0:
            _logger.warning(problem)

    def rejects_loss(self, loss: Tensor) -> bool:
        """Whether there is to be no backward pass, as a rank's loss is not finite and steps may be skipped."""
        return self._skips_steps and not all_agree_to_continue(bool(loss.isfinite()))

    def record_success(self) -> None:
        """Note a step that is as it should be."""
        self._consecutive_failures = 0

    def record_failure(self, step: int, batches: Sequence[HybridBatch], reason: str, may_skip: bool) -> None:
        """Keep the batches of a step that is not, as `bad_batches/step-<step>-rank<rank>.json` of the run.

        may_skip: whether the step has changed nothing that matters.

        Raises:
            FloatingPointError: the run is to stop.
        """
        self._consecutive_failures, self.reason = self._consecutive_failures + 1, reason
        path = self._folder / f"step-{step:08d}-rank{self._rank}.json"
        self._folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"step": step, "reason": reason, "batches": [_ids(batch) for batch in batches]}))
        if not self._skips_steps or not may_skip:
            raise FloatingPointError(f"step {step}: {reason}. The batch's ids are in {path}")
        if self._consecutive_failures > self._max_skipped:
            raise FloatingPointError(
                f"step {step}: {reason}. That makes {self._consecutive_failures} steps to skip in a row, more than "
                f"reliability.max_skipped {self._max_skipped}; the batches' ids are in {self._folder}"
            )


def _ids(batch: HybridBatch) -> dict[str, Any]:
    """What identifies a batch: users and items by the dataset's ids, exposures by user's position and item."""
    return {
        "user_ids": batch.user_ids.tolist(),
        "unique_items": batch.unique_items.tolist(),
        "target_items": batch.target_items.tolist(),
        "positions": batch.positions.tolist(),
    }
