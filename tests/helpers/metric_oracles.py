"""Plain functions over rows in memory, of one process: what the metrics of `hllm evaluate` are compared with."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hllm_torchrec.evaluation.metrics_schema import finite_or_none
from hllm_torchrec.evaluation.row_slices import HISTORY_BUCKETS
from hllm_torchrec.metrics.auc import delong_interval
from hllm_torchrec.metrics.group_auc import grouped_auc
from hllm_torchrec.metrics.input_checks import UserIds, Values, as_floats, as_groups, as_labels, as_scores, as_weights
from hllm_torchrec.metrics.probabilities import PROBABILITY_FLOOR, ReliabilityCurve
from hllm_torchrec.metrics.retrieval_metrics import (
    BLOCK_SIZE,
    check_targets,
    count_ahead,
    scores_to_beat,
    seen_pairs,
)


@dataclass(frozen=True)
class GroupedAuc:
    """GAUC with the number of users it is made of."""

    gauc: float
    users: int
    """Users with both classes, who count."""
    users_left_out: int
    """Users with one class only: they have no pair to rank."""
    user_weighted: float
    """The mean in which every user who counts has the same weight."""


def gauc(labels: Values, scores: Values, user_ids: UserIds, weights: Values | None = None) -> GroupedAuc:
    """AUC within each user, averaged with each user's number of rows (or their weights) as weight, and with every
    user alike; exact with ties.

    Users with one class only are left out of numerator and denominator (not counted as 0.5). O(n log n), no
    loop over users.

    Returns:
        GAUC, `nan` if every user is left out, and both counts of users.

    Raises:
        ValueError: NaN score, label that is not 0 or 1, unequal lengths.
    """
    is_positive = as_labels(labels)
    row_scores = as_scores(scores, len(is_positive))
    users = as_groups(user_ids, len(is_positive))
    if not len(users):
        return GroupedAuc(math.nan, 0, 0, math.nan)
    within = grouped_auc(users, is_positive, row_scores, None if weights is None else as_weights(weights, len(users)))
    if not len(within.aucs):
        return GroupedAuc(math.nan, 0, within.left_out, math.nan)
    by_rows = float(np.average(within.aucs, weights=within.weights))
    return GroupedAuc(by_rows, len(within.aucs), within.left_out, float(within.aucs.mean()))


def log_loss(labels: Values, probabilities: Values) -> float:
    """Mean binary cross-entropy in nats, of probabilities taken into [floor, 1 - floor]; `nan` without rows.

    Raises:
        ValueError: a probability outside 0..1, a label that is not 0 or 1, unequal lengths.
    """
    is_positive, row_probabilities = _labels_and_probabilities(labels, probabilities)
    clipped = np.clip(row_probabilities, PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
    return _mean(-np.log(np.where(is_positive, clipped, 1 - clipped)))


def normalized_entropy(labels: Values, probabilities: Values) -> float:
    """Log loss over the log loss of always predicting the base rate (He et al. 2014): below 1 is useful.

    Returns `nan` with one class only, where the base rate's loss is 0.

    Raises:
        ValueError: as `log_loss`.
    """
    is_positive = as_labels(labels)
    rate = _mean(is_positive)
    if math.isnan(rate) or rate in (0.0, 1.0):
        return math.nan
    entropy = -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)
    return log_loss(is_positive, probabilities) / entropy


def brier(labels: Values, probabilities: Values) -> float:
    """Mean squared difference of probability and label; `nan` without rows.

    Raises:
        ValueError: as `log_loss`.
    """
    is_positive, row_probabilities = _labels_and_probabilities(labels, probabilities)
    return _mean((row_probabilities - is_positive) ** 2)


def calibration(labels: Values, probabilities: Values) -> float:
    """Sum of probabilities over number of positives: 1 is calibrated on the whole, 2 promises twice too much.

    Returns `nan` without positives.

    Raises:
        ValueError: as `log_loss`.
    """
    is_positive, row_probabilities = _labels_and_probabilities(labels, probabilities)
    return float(row_probabilities.sum() / is_positive.sum()) if is_positive.any() else math.nan


def reliability_curve(labels: Values, probabilities: Values, bins: int = 10) -> ReliabilityCurve:
    """Mean predicted probability against observed rate in bins of about equally many rows.

    Bins of equal mass, not of equal width: with a click rate of 1% all rows would fall into one bin of ten.
    Equal probabilities always share a bin, so the result does not depend on the order of rows.

    Raises:
        ValueError: as `log_loss`, or fewer than one bin.
    """
    if bins < 1:
        raise ValueError(f"bins is {bins}; at least one bin is needed; 10 is usual")
    is_positive, row_probabilities = _labels_and_probabilities(labels, probabilities)
    if not len(is_positive):
        return ReliabilityCurve(np.empty(0), np.empty(0), np.empty(0, dtype=np.int64))
    edges = np.quantile(row_probabilities, np.arange(1, bins) / bins, method="higher")
    index = np.searchsorted(edges, row_probabilities, side="right")
    rows = np.bincount(index, minlength=bins)
    kept = rows > 0
    mean_probability = np.bincount(index, row_probabilities, bins)[kept] / rows[kept]
    observed_rate = np.bincount(index, is_positive, bins)[kept] / rows[kept]
    return ReliabilityCurve(mean_probability, observed_rate, rows[kept])


def expected_calibration_error(labels: Values, probabilities: Values, bins: int = 10) -> float:
    """Mean over rows of |observed rate - mean probability| of the row's bin of `reliability_curve`.

    Returns `nan` without rows.

    Raises:
        ValueError: as `reliability_curve`.
    """
    curve = reliability_curve(labels, probabilities, bins)
    if not curve.rows.sum():
        return math.nan
    return float(np.average(abs(curve.observed_rate - curve.mean_probability), weights=curve.rows))


def standard_slices(history_length: Values, item_is_cold: Values) -> dict[str, np.ndarray]:
    """The slices every model is reported on, as bool masks [n]: cold and warm items, history-length buckets.

    Args:
        history_length: number of events of the user in strictly earlier seconds, >= 0, [n].
        item_is_cold: whether the item has no training event, [n].

    Raises:
        ValueError: unequal lengths.
    """
    lengths = as_floats(history_length, "history_length")
    cold = as_floats(item_is_cold, "item_is_cold") != 0
    if len(lengths) != len(cold):
        raise ValueError(f"history_length has {len(lengths)} rows, item_is_cold {len(cold)}; pass equal lengths")
    slices = {"item_cold": cold, "item_warm": ~cold}
    for name, (low, high) in HISTORY_BUCKETS.items():
        slices[f"history_{name}"] = (lengths >= low) & (lengths <= high)
    return slices


def ranking_metrics(
    labels: Values,
    scores: Values,
    probabilities: Values | None,
    user_ids: UserIds,
    slices: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """All ranking metrics of one model, as it stands in `metrics.json`.

    Args:
        labels: 0 or 1, [n].
        scores: logits or any monotone score, [n].
        probabilities: [n], or None for a model that has only scores: the metrics of probabilities are then
            None.
        user_ids: [n].
        slices: name → bool mask [n] of the rows of that slice; slices may overlap (`standard_slices`).

    Returns:
        `rows`, `positives`, `users`, `auc`, `auc_low`, `auc_high`, `auc_se` (DeLong, 95%), `gauc`,
        `gauc_users`,
        `gauc_users_left_out`, `log_loss`, `normalized_entropy`, `brier`, `calibration`, `ece` and `slices`:
        name → {`rows`, `positives`, `auc`, `auc_low`, `auc_high`}. Plain numbers; None where a metric is
        undefined (JSON has no NaN).

    Raises:
        ValueError: bad rows (see `auc.roc_auc`, `log_loss`), or a slice that is not a bool mask of all rows.
    """
    is_positive = as_labels(labels)
    row_scores = as_scores(scores, len(is_positive))
    grouped = gauc(is_positive, row_scores, user_ids)
    return {
        **_auc_block(is_positive, row_scores),
        "auc_se": finite_or_none(delong_interval(is_positive, row_scores).standard_error),
        "users": grouped.users + grouped.users_left_out,
        "gauc": finite_or_none(grouped.gauc),
        "gauc_users": grouped.users,
        "gauc_users_left_out": grouped.users_left_out,
        **_probability_block(is_positive, probabilities),
        "slices": {
            name: _auc_block(is_positive[mask], row_scores[mask])
            for name, mask in _checked_slices(slices or {}, len(is_positive)).items()
        },
    }


def _auc_block(is_positive: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
    interval = delong_interval(is_positive, scores)
    return {
        "rows": len(is_positive),
        "positives": int(is_positive.sum()),
        "auc": finite_or_none(interval.auc),
        "auc_low": finite_or_none(interval.low),
        "auc_high": finite_or_none(interval.high),
    }


def _probability_block(is_positive: np.ndarray, probabilities: Values | None) -> dict[str, float | None]:
    metrics = {
        "log_loss": log_loss,
        "normalized_entropy": normalized_entropy,
        "brier": brier,
        "calibration": calibration,
        "ece": expected_calibration_error,
    }
    if probabilities is None:
        return dict.fromkeys(metrics)
    return {name: finite_or_none(metric(is_positive, probabilities)) for name, metric in metrics.items()}


def _checked_slices(slices: Mapping[str, np.ndarray], rows: int) -> Mapping[str, np.ndarray]:
    for name, mask in slices.items():
        if mask.dtype != np.bool_ or mask.shape != (rows,):
            raise ValueError(
                f"slices[{name!r}] is {mask.dtype} of shape {mask.shape}; a slice is a bool mask of shape "
                f"{(rows,)}; compare the column first, e.g. history_length == 0"
            )
    return slices


def _labels_and_probabilities(labels: Values, probabilities: Values) -> tuple[np.ndarray, np.ndarray]:
    is_positive = as_labels(labels)
    return is_positive, as_probabilities(probabilities, len(is_positive))


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def as_probabilities(probabilities: Values, rows: int) -> np.ndarray:
    """The probabilities as float64 [n].

    Raises:
        ValueError: a probability lies outside 0..1 or is NaN, or there are not as many as labels.
    """
    array = as_floats(probabilities, "probabilities")
    assert len(array) == rows
    bad = ~((array >= 0) & (array <= 1))
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(
            f"probabilities: row {row} is {array[row]:g}; a probability lies in 0..1; "
            "pass a logit through the sigmoid, and any other score as `scores` only"
        )
    return array


def catalogue_ranks(
    queries_BD: torch.Tensor,
    items_ID: torch.Tensor,
    target_B: torch.Tensor,
    *,
    seen_items_S: torch.Tensor | None = None,
    seen_offsets: torch.Tensor | None = None,
    block_size: int = BLOCK_SIZE,
) -> torch.Tensor:
    """`target_ranks` of the dot products of queries and items, with [B, block] scores in memory at a time.

    Normalise both sides first for cosine similarity. Products are computed in float32, items converted block
    by block. Items within `TIE_TOLERANCE` x |query| |target| of the target's score count as tied.

    Args:
        queries_BD, items_ID: embeddings of any float type, on the same device; row i of `items_ID` is item i.
        The others as in `target_ranks`.

    Returns:
        int64 [B], 1 = best.

    Raises:
        ValueError: as `target_ranks`.
    """
    check_targets(target_B, len(queries_BD), len(items_ID))
    queries_BD = queries_BD.float()
    return 1 + count_ahead(
        lambda start, stop: queries_BD @ items_ID[start:stop].float().T,
        scores_to_beat(queries_BD, items_ID[target_B]),
        target_B,
        (1, len(items_ID)),
        seen_pairs(seen_items_S, seen_offsets, target_B),
        block_size,
    )
