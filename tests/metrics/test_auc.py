import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from hllm_torchrec.metrics.auc import delong_interval, delong_test, roc_auc

Rows = list[tuple[bool, int]]

small_rows = st.lists(st.tuples(st.booleans(), st.integers(-5, 5)), min_size=1, max_size=40)
rows_of_both_classes = small_rows.filter(lambda rows: len({label for label, _ in rows}) == 2)


def split(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    return np.array([label for label, _ in rows]), np.array([float(score) for _, score in rows])


def tied_rows(seed: int, rows: int = 500) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.random(rows) < 0.3
    return labels, np.round(random.normal(size=rows) + labels, 1)


def naive_auc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> float:
    """The definition, pair by pair."""
    weights = np.ones(len(labels)) if weights is None else weights
    right, pairs = 0.0, 0.0
    for i in np.flatnonzero(labels):
        for j in np.flatnonzero(~labels):
            pair = weights[i] * weights[j]
            right += pair * ((scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]))
            pairs += pair
    return right / pairs


def naive_delong_error(labels: np.ndarray, scores: np.ndarray) -> float:
    """DeLong, DeLong and Clarke-Pearson 1988, with the full matrix of pairs."""
    positives, negatives = scores[labels], scores[~labels]
    kernel = (positives[:, None] > negatives) + 0.5 * (positives[:, None] == negatives)
    v10, v01 = kernel.mean(axis=1), kernel.mean(axis=0)
    return float(np.sqrt(np.var(v10, ddof=1) / len(v10) + np.var(v01, ddof=1) / len(v01)))


@given(rows_of_both_classes)
def test_auc_is_the_share_of_ordered_pairs(rows: Rows) -> None:
    labels, scores = split(rows)
    assert roc_auc(labels, scores) == pytest.approx(naive_auc(labels, scores), abs=1e-15)


@given(rows_of_both_classes, st.integers(0, 1000))
def test_weighted_auc_is_the_weight_of_ordered_pairs(rows: Rows, seed: int) -> None:
    labels, scores = split(rows)
    weights = np.random.default_rng(seed).random(len(labels)) + 0.01
    assert roc_auc(labels, scores, weights) == pytest.approx(naive_auc(labels, scores, weights), abs=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_auc_equals_scikit_learn_with_ties_and_weights(seed: int, weighted: bool) -> None:
    labels, scores = tied_rows(seed)
    weights = np.random.default_rng(seed).integers(0, 4, len(labels)).astype(float) if weighted else None
    expected = roc_auc_score(labels, scores, sample_weight=weights)
    assert roc_auc(labels, scores, weights) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("labels", [[], [0, 0, 0], [1, 1]])
def test_auc_of_one_class_is_nan_as_in_scikit_learn(labels: list[int]) -> None:
    scores = np.arange(float(len(labels)))
    assert math.isnan(roc_auc(labels, scores))
    if labels:
        with warnings.catch_warnings(action="ignore"):
            assert math.isnan(roc_auc_score(labels, scores))


def test_auc_is_nan_if_one_class_weighs_nothing() -> None:
    assert math.isnan(roc_auc([1, 0, 1], [0.1, 0.2, 0.3], [1.0, 0.0, 1.0]))


@given(rows_of_both_classes)
def test_auc_does_not_change_under_a_monotone_transform_or_another_order_of_rows(rows: Rows) -> None:
    labels, scores = split(rows)
    assert roc_auc(labels, np.exp(scores)) == roc_auc(labels, scores)
    assert roc_auc(labels[::-1], 3 * scores[::-1] - 7) == roc_auc(labels, scores)


@given(rows_of_both_classes)
def test_swapping_labels_or_signs_mirrors_auc(rows: Rows) -> None:
    labels, scores = split(rows)
    assert roc_auc(~labels, scores) == pytest.approx(1 - roc_auc(labels, scores), abs=1e-15)
    assert roc_auc(labels, -scores) == pytest.approx(1 - roc_auc(labels, scores), abs=1e-15)


@given(rows_of_both_classes, st.integers(2, 4))
def test_duplicated_rows_change_nothing_and_equal_whole_weights(rows: Rows, copies: int) -> None:
    labels, scores = split(rows)
    assert roc_auc(np.repeat(labels, copies), np.repeat(scores, copies)) == pytest.approx(roc_auc(labels, scores))
    counts = 1 + np.arange(len(labels)) % copies
    repeated = roc_auc(np.repeat(labels, counts), np.repeat(scores, counts))
    assert roc_auc(labels, scores, counts) == pytest.approx(repeated, abs=1e-12)


def test_constant_scores_have_auc_one_half_in_any_order() -> None:
    labels = np.random.default_rng(0).random(1000) < 0.2
    for order in (np.arange(1000), labels.argsort(), (~labels).argsort()):
        assert roc_auc(labels[order], np.full(1000, 0.3)) == 0.5


def test_denormals_infinities_and_signed_zeros_are_scores_like_any_other() -> None:
    tiny = np.float32(1e-45)
    assert tiny > 0
    assert roc_auc([0, 1], np.array([0, tiny], dtype=np.float32)) == 1.0
    assert roc_auc([0, 1], [5e-324, 1e-323]) == 1.0
    assert roc_auc([0, 1, 0, 1], [-math.inf, 1.0, math.inf, math.inf]) == pytest.approx(2.5 / 4)
    assert roc_auc([0, 1], [-0.0, 0.0]) == 0.5


def test_neighbouring_float32_scores_are_not_merged() -> None:
    score = np.float32(0.7)
    assert roc_auc([0, 1], np.array([score, np.nextafter(score, np.float32(1))])) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tensors_of_any_float_type_and_lists_are_accepted(dtype: torch.dtype) -> None:
    scores = torch.tensor([0.5, -1.0, 2.0, 0.5], dtype=dtype, requires_grad=True)
    assert roc_auc(torch.tensor([1, 0, 1, 0]), scores) == roc_auc([1, 0, 1, 0], [0.5, -1.0, 2.0, 0.5]) == 0.875


def test_bad_rows_are_named() -> None:
    with pytest.raises(ValueError, match=r"scores: row 2 is nan; .* log.jsonl"):
        roc_auc([0, 1, 1], [0.0, 1.0, math.nan])
    with pytest.raises(ValueError, match="labels: row 1 is nan; a label is 0 or 1; leave rows without a label out"):
        roc_auc([0, math.nan, 1], [0.0, 1.0, 2.0])
    with pytest.raises(ValueError, match="labels: row 0 is 4; a label is 0 or 1"):
        roc_auc([4, 1], [0.0, 1.0])
    with pytest.raises(ValueError, match="weights: row 1 is -1; a weight is 0, to skip a row, or lies in 1e-100"):
        roc_auc([0, 1], [0.0, 1.0], [1.0, -1.0])
    with pytest.raises(ValueError, match="weights: row 0 is inf"):
        roc_auc([0, 1], [0.0, 1.0], [math.inf, 1.0])


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"scores has shape \(3,\), labels \(2,\)"):
        roc_auc([0, 1], [0.0, 1.0, 2.0])
    with pytest.raises(ValueError, match=r"scores has shape \(2, 1\): one value a row is expected; flatten it first"):
        roc_auc([0, 1], np.zeros((2, 1)))


@given(rows_of_both_classes.filter(lambda rows: 2 <= sum(label for label, _ in rows) <= len(rows) - 2))
def test_delong_error_equals_the_naive_formula(rows: Rows) -> None:
    labels, scores = split(rows)
    interval = delong_interval(labels, scores)
    assert interval.auc == roc_auc(labels, scores)
    assert interval.standard_error == pytest.approx(naive_delong_error(labels, scores), abs=1e-12)


def test_delong_interval_is_close_to_a_bootstrap_over_rows() -> None:
    labels, scores = tied_rows(3, rows=800)
    random = np.random.default_rng(0)
    draws = [roc_auc(labels[rows], scores[rows]) for rows in random.integers(0, 800, size=(1000, 800))]
    interval = delong_interval(labels, scores)
    assert interval.standard_error == pytest.approx(np.std(draws), rel=0.08)
    assert (interval.low, interval.high) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.006)


def test_delong_interval_covers_the_true_auc_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    true_auc = 0.5 * (1 + math.erf(1 / 2))  # normal scores one standard deviation apart
    labels = np.arange(200) < 60
    intervals = [delong_interval(labels, random.normal(size=200) + labels, confidence=0.9) for _ in range(500)]
    covered = np.mean([interval.low < true_auc < interval.high for interval in intervals])
    assert covered == pytest.approx(0.9, abs=0.03)


def test_delong_interval_stays_inside_zero_to_one_near_perfect_separation() -> None:
    interval = delong_interval([0, 0, 0, 1, 1, 1], [1, 2, 4, 3, 5, 6])
    assert 0 < interval.low < interval.auc < interval.high < 1


def test_wider_confidence_gives_a_wider_interval() -> None:
    labels, scores = tied_rows(0)
    narrow, wide = delong_interval(labels, scores, 0.5), delong_interval(labels, scores, 0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize(
    ("labels", "scores", "auc"),
    [([0, 0, 1, 1], [1, 2, 3, 4], 1.0), ([1, 0, 0], [2, 1, 3], 0.5), ([1, 1], [1, 2], math.nan)],
    ids=["perfect separation", "one positive", "one class"],
)
def test_no_interval_is_given_where_data_say_nothing(labels: list[int], scores: list[float], auc: float) -> None:
    interval = delong_interval(labels, scores)
    assert interval.auc == pytest.approx(auc, nan_ok=True)
    assert math.isnan(interval.low) and math.isnan(interval.high)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0, math.nan])
def test_confidence_must_be_a_share(confidence: float) -> None:
    with pytest.raises(ValueError, match="it lies between 0 and 1, e.g. 0.95"):
        delong_interval([0, 1], [0, 1], confidence)


def test_paired_difference_equals_the_naive_delong_covariance() -> None:
    labels, scores_a = tied_rows(0)
    scores_b = scores_a + np.round(np.random.default_rng(9).normal(size=len(labels)), 1)
    covariance = np.zeros((2, 2))
    placements = []
    for scores in (scores_a, scores_b):
        kernel = np.sign(scores[labels][:, None] - scores[~labels]) / 2 + 0.5
        placements.append((kernel.mean(axis=1), kernel.mean(axis=0)))
    for side in (0, 1):
        values = np.stack([placement[side] for placement in placements])
        covariance += np.cov(values) / values.shape[1]
    error = math.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    test = delong_test(labels, scores_a, scores_b)
    assert test.difference == pytest.approx(roc_auc(labels, scores_a) - roc_auc(labels, scores_b), abs=1e-12)
    assert (test.high - test.low) / 2 == pytest.approx(1.959964 * error, rel=1e-6)
    assert test.p_value == pytest.approx(math.erfc(test.difference / error / math.sqrt(2)), rel=1e-9)


def test_paired_p_value_is_uniform_where_models_are_equally_good() -> None:
    random = np.random.default_rng(0)
    labels = np.arange(150) < 70
    p_values = []
    for _ in range(400):
        shared = random.normal(size=150) + labels
        p_values.append(delong_test(labels, shared + random.normal(size=150), shared + random.normal(size=150)).p_value)
    assert np.mean(np.array(p_values) < 0.05) == pytest.approx(0.05, abs=0.03)
    assert np.mean(np.array(p_values) < 0.5) == pytest.approx(0.5, abs=0.07)


def test_swapping_the_models_mirrors_the_difference() -> None:
    labels, scores = tied_rows(1)
    other = np.random.default_rng(2).normal(size=len(labels))
    one, two = delong_test(labels, scores, other), delong_test(labels, other, scores)
    assert (one.difference, one.low, one.high, one.p_value) == pytest.approx(
        (-two.difference, -two.high, -two.low, two.p_value)
    )


def test_models_that_rank_alike_do_not_differ() -> None:
    labels, scores = tied_rows(1)
    test = delong_test(labels, scores, np.exp(scores))
    assert (test.difference, test.low, test.high, test.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_no_test_is_made_where_data_say_nothing() -> None:
    all_change_alike = delong_test([0, 0, 1, 1], [1, 2, 3, 4], [3, 4, 1, 2])
    assert all_change_alike.difference == 1.0
    assert math.isnan(all_change_alike.p_value) and math.isnan(all_change_alike.low)
    assert math.isnan(delong_test([1, 1], [1, 2], [2, 1]).difference)
