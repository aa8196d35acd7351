"""Batches of rows of predictions, as `PredictionRows` reads them."""

from dataclasses import dataclass, field

import numpy as np

from hllm_torchrec.common.arrays import Doubles
from hllm_torchrec.evaluation.row_slices import Slices


@dataclass(frozen=True)
class RowBatch:
    """A batch of n rows. `PredictionRows.read` yields batches without rows of weight 0."""

    is_positive: np.ndarray
    weights: np.ndarray | None
    scores: dict[str, np.ndarray]
    """model → scores [n], float32, float64 or int64."""
    probabilities: dict[str, np.ndarray]
    """model → probabilities float64 [n], for models that have them."""
    users: np.ndarray | None
    """int64 [n], user of each row: a numeric user id itself, or a 64-bit hash of a text id; `NO_USER` + row number for
    a row without user."""
    keys: np.ndarray
    """uint64 [n]: hash of label and, if present, weight, user and item of each row; [0] for a further task and for
    stored rows."""
    slices: list[Slices] = field(default_factory=list)
    """Slices by each column."""


@dataclass(frozen=True)
class ReadRows:
    """Rows that were read together, decoded for the first label and for each further task."""

    start: int
    """Number of the first row within the rank's share or, if rows are paired, within its bucket of users."""
    first: RowBatch
    tasks: dict[str, RowBatch | Doubles]
    """Task → the rows whose label is defined. A binary task has a `RowBatch` without keys; a task that predicts numbers
    has float64 [n, 2 + m]: label, weight (1 without weights), and the predictions of its m models."""


def without_zero_weights(batch: RowBatch) -> RowBatch:
    """Return the batch without rows of weight 0."""
    return batch if batch.weights is None or batch.weights.all() else _without(batch, batch.weights > 0)


def _without(batch: RowBatch, kept: np.ndarray) -> RowBatch:
    """The batch with the rows in the mask `kept` (bool [n]) only."""

    def pick(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else values[kept]

    return RowBatch(
        batch.is_positive[kept],
        pick(batch.weights),
        {name: values[kept] for name, values in batch.scores.items()},
        {name: values[kept] for name, values in batch.probabilities.items()},
        pick(batch.users),
        batch.keys[kept] if batch.keys.size else batch.keys,
        [(names, codes[kept]) for names, codes in batch.slices],
    )
