"""Handling of non-finite steps (stop or skip), and of implausibly high or undefined validation metrics."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from hllm_torchrec.config.schema import Config
from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.distributed.collectives import all_agree_to_continue

_logger = logging.getLogger(__name__)


class StepGuard:
    """Stops the run or skips the step on a non-finite loss or gradient; all ranks make the same decision.

    Sharded tables are updated inside the backward pass, so a non-finite loss must be detected before the backward pass:
    if steps may be skipped, the ranks agree at every micro-batch. If the loss is finite but the gradients overflow, the
    dense weights do not change, but the table rows of that step have been updated already.
    """

    def __init__(self, config: Config, rank: int, output: Path | None = None) -> None:
        self._skips_steps = config.reliability.not_finite == "skip"
        self._max_skipped = config.reliability.max_skipped
        self._folder, self._rank = (output or Path(config.output)) / "bad_batches", rank
        self._leakage, self._leakage_above = config.reliability.leakage, config.reliability.leakage_above
        self._ndcg = f"ndcg@{config.evaluation.ks[0]}"
        self._metrics = config.evaluation.select_by.split("_and_")
        self._consecutive_failures, self.reason = 0, ""
        self._says_undefined = rank == 0

    def selection_score(self, step: int, metrics: Mapping[str, Any]) -> float | None:
        """Return the validation score by which checkpoints are compared (larger is better); None if nothing is scored.

        The score is the mean of the metrics of `evaluation.select_by`; without a ranking head it is the NDCG; for a run
        with creatives it is the mean log-likelihood of their texts, each given its own user. If a metric is undefined,
        the AUC is the score instead (no user has both labels) or, with labels of one class, the negative log loss. Rank
        0 logs the first such case.
        """
        if metrics.get("creative_rows"):
            return -float(metrics["creative_nll"])
        has_head = "auc" in metrics
        found = [metrics[name] for name in (self._metrics if has_head else [self._ndcg])]
        if not any(score is None or math.isnan(score) for score in found):
            return float(sum(found) / len(found))
        score: float | None
        if has_head and metrics["rows"] and not math.isnan(metrics["auc"]):
            problem = "has no user with both labels: its GAUC is undefined, and checkpoints are compared by AUC"
            score = float(metrics["auc"])
        elif has_head and metrics["rows"]:
            problem = "has labels of one class: its AUC is undefined, and checkpoints are compared by log loss"
            score = -float(metrics["log_loss"])
        else:
            problem, score = "has nothing to score: no checkpoint is the best; use --checkpoint latest", None
        if self._says_undefined:
            _logger.warning("step %d: the validation part %s", step, problem)
            self._says_undefined = False
        return score

    def check_leakage(self, step: int, auc: float | None) -> None:
        """Warn, on rank 0, if the validation AUC is above `reliability.leakage_above`.

        auc: None without a classification head, NaN without exposures of both classes.

        Raises:
            ValueError: the AUC is above `reliability.leakage_above`, and `reliability.leakage` is "stop".
        """
        if auc is None or not auc > self._leakage_above:
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
        """True if the backward pass must be skipped because some rank's loss is not finite.

        Collective if skipping is enabled; otherwise always False.
        """
        return self._skips_steps and not all_agree_to_continue(bool(loss.isfinite()))

    def record_success(self) -> None:
        """Reset the count of consecutive failures."""
        self._consecutive_failures = 0

    def record_failure(self, step: int, batches: Sequence[HybridBatch], reason: str, may_skip: bool) -> None:
        """Write the ids of a failed step's batches to `bad_batches/step-<step>-rank<rank>.json` of the run.

        may_skip: True if the step has not changed the dense weights.

        Raises:
            FloatingPointError: the step may not be skipped, or too many consecutive steps failed.
        """
        self._consecutive_failures, self.reason = self._consecutive_failures + 1, reason
        # One file per rank, because each has different batches.
        path = self._folder / f"step-{step:08d}-rank{self._rank}.json"
        self._folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"step": step, "reason": reason, "batches": [_ids(batch) for batch in batches]}))
        if not self._skips_steps or not may_skip:
            raise FloatingPointError(f"step {step}: {reason}. The batch's ids are in {path}")
        if self._consecutive_failures > self._max_skipped:
            raise FloatingPointError(
                f"step {step}: {reason}. {self._consecutive_failures} consecutive steps failed, more than "
                f"reliability.max_skipped {self._max_skipped}; the batches' ids are in {self._folder}"
            )


def _ids(batch: HybridBatch) -> dict[str, Any]:
    """Ids that identify a batch: dense ids of users and items, and position in the user's sequence of each exposure."""
    return {
        "user_ids": batch.user_ids.tolist(),
        "unique_items": batch.unique_items.tolist(),
        "target_items": batch.target_items.tolist(),
        "positions": batch.positions.tolist(),
    }
