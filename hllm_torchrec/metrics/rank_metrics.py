"""Metrics of the order of the rows, besides AUC itself (`exact_auc`): see `metric.RankMetric`."""

import numpy as np

from hllm_torchrec.metrics.metric import RankedBlock, RankMetric, Value

PRECISIONS = (0.5, 0.8, 0.9, 0.95)
_NAMES = tuple(f"{precision:g}" for precision in PRECISIONS)


def _precision_steps(block: RankedBlock) -> np.ndarray:
    """The sum over thresholds of (recall step) x precision, as in scikit-learn."""
    return np.array(float(block.mass[0] @ block.precision) / block.total[0])


def _best_recalls(block: RankedBlock) -> np.ndarray:
    """The highest recall of a threshold with at least each of `PRECISIONS`, 0 if none has it."""
    best = np.zeros(len(PRECISIONS))
    for place, wanted in enumerate(PRECISIONS):
        enough = block.precision >= wanted
        if enough.any():
            best[place] = block.over[0][enough.argmax()] / block.total[0]  # recall falls as the score rises
    return best


def _by_precision(recalls: np.ndarray) -> Value:
    return dict(zip(_NAMES, recalls.tolist()))


PR_AUC = RankMetric(
    "pr_auc",
    "PR-AUC",
    "average precision",
    sums=_precision_steps,
    value=lambda total: min(1.0, float(total)),
)
RECALL_AT_PRECISION = RankMetric(
    "recall_at_precision",
    "recall at precision",
    "highest recall of a threshold with at least that precision",
    sums=_best_recalls,
    value=_by_precision,
    combine=np.maximum,
    names=_NAMES,
)
