"""Ranking metrics other than AUC (`exact_auc`): see `metric.RankMetric`."""

import numpy as np

from hllm_torchrec.metrics.metric import RankedBlock, RankMetric, Value

PRECISIONS = (0.5, 0.8, 0.9, 0.95)
_NAMES = tuple(f"{precision:g}" for precision in PRECISIONS)


def _precision_steps(block: RankedBlock) -> np.ndarray:
    """Sum over thresholds of (increase in recall) x precision, as in scikit-learn."""
    return np.array(float(block.mass[0] @ block.precision) / block.total[0])


def _best_recalls(block: RankedBlock) -> np.ndarray:
    """For each of `PRECISIONS`, the highest recall of a threshold with at least that precision; 0 if there is none."""
    best = np.zeros(len(PRECISIONS))
    for index, precision in enumerate(PRECISIONS):
        enough = block.precision >= precision
        if enough.any():
            best[index] = block.over[0][enough.argmax()] / block.total[0]  # lowest score, hence highest recall
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
