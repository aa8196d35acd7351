"""Metrics of predicted numbers against loops over all pairs and against scipy; weights are repetitions."""

import math

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from hllm_torchrec.metrics.number_metrics import number_metrics, xauc


def naive_xauc(labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray) -> float:
    right = total = 0.0
    for i in range(labels.size):
        for j in range(labels.size):
            if labels[i] < labels[j]:
                pair = weights[i] * weights[j]
                total += pair
                right += pair * ((predictions[i] < predictions[j]) + (predictions[i] == predictions[j]) / 2)
    return right / total


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_xauc_is_that_of_all_pairs_with_ties_and_weights(levels: int) -> None:
    rng = np.random.default_rng(levels)
    for size in (2, 3, 17, 64, 101):
        labels, predictions = rng.integers(0, levels, (2, size)).astype(float)
        weights = rng.choice([0.5, 1.0, 3.0], size)
        if np.unique(labels).size > 1:
            expected = naive_xauc(labels, predictions, weights)
            assert xauc(labels, predictions, weights) == pytest.approx(expected, rel=1e-12)


def test_xauc_of_two_labels_is_the_auc() -> None:
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 200).astype(float), rng.integers(0, 20, 200).astype(float)
    assert xauc(labels, scores, np.ones(200)) == pytest.approx(roc_auc_score(labels, scores), rel=1e-12)


def test_weights_are_repetitions_of_rows() -> None:
    rng = np.random.default_rng(1)
    labels, predictions = rng.integers(0, 6, 40).astype(float), rng.normal(size=40).round(1)
    times = rng.integers(1, 4, 40)
    weighted = number_metrics(labels, predictions, times.astype(float))
    repeated = number_metrics(np.repeat(labels, times), np.repeat(predictions, times))
    assert weighted == pytest.approx(repeated, rel=1e-12)
    assert number_metrics(labels, predictions)["spearman"] == pytest.approx(spearmanr(labels, predictions)[0])
    assert repeated["mae"] == pytest.approx(np.abs(np.repeat(labels - predictions, times)).mean())


def test_what_is_not_defined_is_nan() -> None:
    same = number_metrics(np.ones(3), np.arange(3.0))
    assert math.isnan(same["xauc"]) and math.isnan(same["spearman"]) and same["mae"] == 2 / 3
    assert all(map(math.isnan, number_metrics(np.zeros(0), np.zeros(0)).values()))
