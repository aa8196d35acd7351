"""Exact GAUC of rows in memory, on one rank or many: mean AUC within users, weighted by their rows."""

import math

import numpy as np

from hllm_torchrec.common.hashing import hash_columns
from hllm_torchrec.distributed.array_collectives import all_to_all, gather_objects, world_size
from hllm_torchrec.metrics.group_auc import grouped_auc
from hllm_torchrec.metrics.user_metrics import GAUC


def gauc(users: np.ndarray, labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Compute the GAUC of the rows of all ranks; the rows of a user may be on several ranks. Collective.

    Args:
        users: int64 [n]; labels: 0 or 1, [n]; scores: [n] without NaN. Ranks may have different numbers of rows.
        weights: at least 0, [n]; on all ranks or on none.

    Returns:
        The mean over users with rows of both classes, as `hllm evaluate` computes it; `nan` without such a user.
    """
    columns = [users, labels > 0.5, scores.astype(np.float64).view(np.int64)]
    if weights is not None:
        columns.append(weights.astype(np.float64).view(np.int64))
    rows, ranks = np.stack(columns, axis=1), world_size()
    if weights is not None:
        rows = rows[weights > 0]
    owner = (hash_columns(rows[:, 0]) % np.uint64(ranks)).astype(np.int64)
    order = np.argsort(owner, kind="stable")
    rows = all_to_all(rows[order], np.bincount(owner, minlength=ranks).tolist())
    total = [0.0, 0.0]
    if len(rows):
        _, of_row = np.unique(rows[:, 0], return_inverse=True)
        numbers = rows[:, 2:].copy().view(np.float64)  # scores, and weights if there are any
        total = list(GAUC.ratio(grouped_auc(of_row, rows[:, 1] == 1, *numbers.T)))
    numerator, denominator = np.sum(gather_objects(total), axis=0)
    return float(numerator / denominator) if denominator else math.nan
