"""Validation and conversion of metric inputs: columns with one value per row, as numpy arrays, tensors or lists."""

from collections.abc import Sequence

import numpy as np
import torch

Values = np.ndarray | torch.Tensor | Sequence[float] | Sequence[int] | Sequence[bool]
"""A column: one value per row. Tensors may be on any device and of any float type, including bfloat16."""

UserIds = np.ndarray | torch.Tensor | Sequence[int] | Sequence[str]

WEIGHT_RANGE = (1e-100, 1e100)
"""Allowed weights other than 0: their squares, and products of two sums of them, neither overflow nor underflow."""


def as_floats(values: Values, name: str) -> np.ndarray:
    """The column as float64 [n], which represents every float32, float16 and bfloat16 exactly, including denormals.

    Raises:
        ValueError: the column is not one-dimensional.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()  # numpy has no bfloat16
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}: one value a row is expected; flatten it first")
    return array


def as_labels(labels: Values) -> np.ndarray:
    """The labels as bool [n].

    Raises:
        ValueError: a label is neither 0 nor 1; a null label becomes NaN and is rejected, too.
    """
    array = as_floats(labels, "labels")
    bad = (array != 0) & (array != 1)
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(f"labels: row {row} is {array[row]:g}; a label is 0 or 1; leave rows without a label out")
    return array == 1


def as_scores(scores: Values, rows: int) -> np.ndarray:
    """The scores as float64 [n]; infinities are allowed.

    Raises:
        ValueError: a score is NaN, or the number of scores is not `rows`.
    """
    array = _same_rows(as_floats(scores, "scores"), "scores", rows)
    bad = np.isnan(array)
    if bad.any():
        raise ValueError(
            f"scores: row {int(bad.argmax())} is nan; a score must be a number (infinities are allowed); "
            "look in log.jsonl for the step at which the loss became nan"
        )
    return array


def as_weights(weights: Values, rows: int) -> np.ndarray:
    """The weights as float64 [n].

    Raises:
        ValueError: a weight is neither 0 nor in `WEIGHT_RANGE`, or the number of weights is not `rows`.
    """
    array = _same_rows(as_floats(weights, "weights"), "weights", rows)
    low, high = WEIGHT_RANGE
    bad = ~((array == 0) | ((array >= low) & (array <= high)))
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(
            f"weights: row {row} is {array[row]:g}; a weight is 0, to skip a row, or lies in {low:g}..{high:g}"
        )
    return array


def as_groups(user_ids: UserIds, rows: int) -> np.ndarray:
    """Each row's user as a dense int64 index [n] in 0..users-1; the ids may have any sortable type.

    Raises:
        ValueError: the number of ids is not `rows`.
    """
    if isinstance(user_ids, torch.Tensor):
        user_ids = user_ids.detach().cpu().numpy()
    ids = _same_rows(np.asarray(user_ids), "user_ids", rows)
    return np.unique(ids, return_inverse=True)[1].astype(np.int64)


def _same_rows(array: np.ndarray, name: str, rows: int) -> np.ndarray:
    if array.shape != (rows,):
        raise ValueError(f"{name} has shape {array.shape}, labels {(rows,)}: every row needs both; pass equal lengths")
    return array
