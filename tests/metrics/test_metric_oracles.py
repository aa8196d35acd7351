"""The plain functions that metrics are compared with equal scikit-learn, loops and examples by hand."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss, roc_auc_score
from sklearn.metrics import log_loss as sklearn_log_loss

from hllm_torchrec.metrics.auc import delong_interval, roc_auc
from tests.helpers.metric_oracles import (
    brier,
    calibration,
    expected_calibration_error,
    gauc,
    log_loss,
    normalized_entropy,
    ranking_metrics,
    reliability_curve,
    standard_slices,
)


def example(seed: int = 0, rows: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels drawn with the probabilities, the probabilities as float32, and users."""
    random = np.random.default_rng(seed)
    probabilities = random.random(rows).astype(np.float32)
    return random.random(rows) < probabilities, probabilities, random.integers(0, 30, rows)


def test_gauc_of_a_hand_example() -> None:
    # user 7: 4 rows, one of three pairs wrong; user 3: 2 rows, tied; user 5: positives only
    labels = [1, 0, 0, 0, 1, 0, 1, 1]
    scores = [0.5, 0.1, 0.9, 0.2, 0.4, 0.4, 0.9, 0.8]
    users = [7, 7, 7, 7, 3, 3, 5, 5]
    result = gauc(labels, scores, users)
    assert result.gauc == pytest.approx((4 * 2 / 3 + 2 * 1 / 2) / 6)
    assert (result.users, result.users_left_out) == (2, 1)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4), st.integers(0, 3)), max_size=60))
def test_gauc_equals_a_loop_over_users(rows: list[tuple[bool, int, int]]) -> None:
    labels, scores, users = np.array(rows, dtype=int).reshape(-1, 3).T
    total, weight, counted, left_out = 0.0, 0, 0, 0
    for user in set(users.tolist()):
        mine = users == user
        if len(set(labels[mine].tolist())) == 1:
            left_out += 1
            continue
        total += mine.sum() * roc_auc_score(labels[mine], scores[mine])
        weight += mine.sum()
        counted += 1
    result = gauc(labels, scores, users)
    assert result.gauc == pytest.approx(total / weight if weight else math.nan, nan_ok=True)
    assert (result.users, result.users_left_out) == (counted, left_out)


def test_gauc_of_one_user_is_the_auc_and_ids_may_be_strings_or_tensors() -> None:
    labels, scores, users = example()
    assert gauc(labels, scores, np.zeros(400, int)).gauc == pytest.approx(roc_auc(labels, scores))
    expected = gauc(labels, scores, users)
    assert gauc(labels, scores, [f"user {user}" for user in users]) == pytest.approx(expected)
    assert gauc(labels, scores, torch.from_numpy(users)) == expected


def test_gauc_ignores_what_differs_between_users_only() -> None:
    labels, scores, users = example()
    shifted = gauc(labels, scores + 5.0 * users, users)
    assert shifted.gauc == pytest.approx(gauc(labels, scores, users).gauc, abs=1e-3)  # float32 ties may appear


def test_user_ids_must_be_as_many_as_labels() -> None:
    with pytest.raises(ValueError, match=r"user_ids has shape \(1,\), labels \(2,\)"):
        gauc([0, 1], [0.0, 1.0], [3])


def test_log_loss_and_brier_equal_scikit_learn() -> None:
    labels, probabilities, _ = example()
    probabilities[:3] = [0.0, 1.0, 1.0]
    assert log_loss(labels, probabilities) == pytest.approx(sklearn_log_loss(labels, probabilities), rel=1e-6)
    assert brier(labels, probabilities) == pytest.approx(brier_score_loss(labels, probabilities), rel=1e-6)


def test_normalized_entropy_of_the_base_rate_is_one() -> None:
    labels = np.arange(1000) < 137
    assert normalized_entropy(labels, np.full(1000, 0.137)) == pytest.approx(1.0, abs=1e-12)
    assert normalized_entropy(labels, np.where(labels, 0.9, 0.1)) < 0.3
    assert normalized_entropy(labels, np.full(1000, 0.5)) > 1


def test_calibration_is_promised_over_observed() -> None:
    assert calibration([1, 0, 0, 1], [0.5, 0.25, 0.75, 0.5]) == 1.0
    assert calibration([1, 0, 0, 0], [0.5, 0.5, 0.5, 0.5]) == 2.0


def test_reliability_of_a_hand_example() -> None:
    probabilities = [0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9]
    curve = reliability_curve([0, 0, 0, 1, 1, 0, 1, 1], probabilities, bins=2)
    np.testing.assert_allclose(curve.mean_probability, [0.25, 0.75])
    np.testing.assert_allclose(curve.observed_rate, [0.25, 0.75])
    np.testing.assert_array_equal(curve.rows, [4, 4])
    ece = expected_calibration_error([0, 0, 0, 0, 1, 0, 1, 1], probabilities, bins=2)
    assert ece == pytest.approx((4 * 0.25 + 4 * 0.0) / 8)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 8)), min_size=1, max_size=50), st.integers(1, 12))
def test_reliability_bins_hold_every_row_once_and_never_part_ties(rows: list[tuple[bool, int]], bins: int) -> None:
    labels = np.array([label for label, _ in rows])
    probabilities = np.array([eighths / 8 for _, eighths in rows])
    curve = reliability_curve(labels, probabilities, bins)
    assert curve.rows.sum() == len(rows)
    assert len(curve.rows) <= min(bins, len(set(probabilities)))
    assert (np.diff(curve.mean_probability) > 0).all()
    assert curve.rows @ curve.observed_rate == pytest.approx(labels.sum())
    backwards = reliability_curve(labels[::-1], probabilities[::-1], bins)
    np.testing.assert_array_equal(curve.rows, backwards.rows)


def test_a_constant_probability_is_one_bin() -> None:
    curve = reliability_curve([0, 1, 1, 0], [0.3] * 4)
    assert curve.rows.tolist() == [4]
    assert expected_calibration_error([0, 1, 1, 0], [0.3] * 4) == pytest.approx(0.2)


def test_calibrated_probabilities_have_a_small_calibration_error_in_a_rare_class() -> None:
    random = np.random.default_rng(0)
    probabilities = random.beta(1, 99, size=100_000)
    labels = random.random(100_000) < probabilities
    assert expected_calibration_error(labels, probabilities) < 0.001
    assert expected_calibration_error(labels, np.sqrt(probabilities)) > 0.05


def test_metrics_without_rows_or_with_one_class_are_nan() -> None:
    for metric in (log_loss, brier, calibration, expected_calibration_error, normalized_entropy):
        assert math.isnan(metric([], []))
    assert math.isnan(normalized_entropy([1, 1], [0.5, 0.5]))
    assert math.isnan(calibration([0, 0], [0.5, 0.5]))
    assert math.isnan(gauc([], [], []).gauc)


@pytest.mark.parametrize("bad", [1.5, -0.1, math.nan])
def test_bad_probabilities_are_named(bad: float) -> None:
    for metric in (log_loss, brier, calibration, reliability_curve):
        with pytest.raises(ValueError, match=r"probabilities: row 1 is .*; a probability lies in 0\.\.1"):
            metric([0, 1], [0.5, bad])


def test_at_least_one_bin_is_needed() -> None:
    with pytest.raises(ValueError, match="bins is 0; at least one bin is needed"):
        reliability_curve([0, 1], [0.1, 0.2], bins=0)


def test_standard_slices_are_the_documented_ones() -> None:
    lengths = [0, 1, 9, 10, 49, 50, 199, 200, 5000]
    slices = standard_slices(lengths, [True] + [False] * 8)
    assert {name: np.flatnonzero(mask).tolist() for name, mask in slices.items()} == {
        "item_cold": [0],
        "item_warm": [1, 2, 3, 4, 5, 6, 7, 8],
        "history_0": [0],
        "history_1-9": [1, 2],
        "history_10-49": [3, 4],
        "history_50-199": [5, 6],
        "history_200+": [7, 8],
    }
    with pytest.raises(ValueError, match="history_length has 2 rows, item_is_cold 1"):
        standard_slices([0, 1], [True])


def test_ranking_metrics_hold_every_metric_and_slice() -> None:
    labels, probabilities, users = example()
    slices = {"odd": np.arange(400) % 2 == 1, "empty": np.zeros(400, dtype=bool)}
    logits = np.log(probabilities) - np.log1p(-probabilities)
    metrics = ranking_metrics(labels, logits, probabilities, users, slices)
    interval, grouped = delong_interval(labels, logits), gauc(labels, logits, users)
    expected = {
        "rows": 400,
        "positives": labels.sum(),
        "users": 30,
        "auc": roc_auc(labels, logits),
        "auc_low": interval.low,
        "auc_high": interval.high,
        "auc_se": interval.standard_error,
        "gauc": grouped.gauc,
        "gauc_users": grouped.users,
        "gauc_users_left_out": grouped.users_left_out,
        "log_loss": log_loss(labels, probabilities),
        "normalized_entropy": normalized_entropy(labels, probabilities),
        "brier": brier(labels, probabilities),
        "calibration": calibration(labels, probabilities),
        "ece": expected_calibration_error(labels, probabilities),
    }
    assert {name: value for name, value in metrics.items() if name != "slices"} == expected
    assert metrics["slices"]["odd"]["auc"] == roc_auc(labels[1::2], logits[1::2])
    assert metrics["slices"]["odd"]["rows"] == 200
    nothing = {"rows": 0, "positives": 0, "auc": None, "auc_low": None, "auc_high": None}
    assert metrics["slices"]["empty"] == nothing


def test_ranking_metrics_without_probabilities_or_with_one_class_are_valid_json() -> None:
    metrics = ranking_metrics([1, 1], [0.1, 0.2], None, [1, 2])
    assert metrics["auc"] is metrics["gauc"] is metrics["log_loss"] is metrics["ece"] is None
    assert metrics["gauc_users_left_out"] == 2
    json.dumps(metrics, allow_nan=False)


@pytest.mark.parametrize("mask", [np.array([0, 1]), np.array([True])], ids=["not bool", "too short"])
def test_a_slice_must_be_a_mask_of_all_rows(mask: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"slices\['new'\] is .*; a slice is a bool mask of shape \(2,\)"):
        ranking_metrics([0, 1], [0.1, 0.2], None, [1, 2], {"new": mask})
