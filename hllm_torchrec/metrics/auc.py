"""Exact ROC AUC of rows in memory, with ties, on one rank or many, and DeLong's interval and test.

AUC = P(score of a positive > score of a negative) + P(equal) / 2 (the Mann-Whitney statistic), computed by
`exact_auc.rank_statistics`, the same code as for prediction files.
"""

import math
from pathlib import Path

import numpy as np

from hllm_torchrec.distributed.array_collectives import SINGLE_RANK, Group, gather_objects
from hllm_torchrec.metrics.delong import influence
from hllm_torchrec.metrics.exact_auc import rank_statistics
from hllm_torchrec.metrics.input_checks import Values, as_labels, as_scores, as_weights
from hllm_torchrec.metrics.intervals import (
    AucInterval,
    PairedDifference,
    logit_interval,
    normal_quantile,
    wald_difference,
)
from hllm_torchrec.metrics.score_chunks import MemoryPool, SortedChunks

UNBOUNDED = 1 << 62
"""Memory limit in bytes that is never reached: rows that are already in memory are not spilled to disk."""


def roc_auc(labels: Values, scores: Values, weights: Values | None = None, group: Group = None) -> float:
    """Exact AUC of the rows of all ranks; tied pairs count one half, so the order of rows does not matter. Collective.

    Without weights the result is bitwise equal for any number of ranks.

    Args:
        labels: 0 or 1, [n]; ranks may have different numbers of rows, or none.
        scores: any real numbers, higher = more likely positive, infinities allowed, [n]. Compared as float64.
        weights: sample weights >= 0, [n], on all ranks or on none; a pair weighs the product of its rows' weights.
        group: the process group, by default all ranks; only this process if torch.distributed is not initialized.

    Returns:
        The AUC, in O(n log n); `nan` if one of the classes is empty or has weight 0, because there is no pair to rank
        (scikit-learn warns and does the same).

    Raises:
        ValueError: a NaN score, a label that is not 0 or 1, or an invalid weight; the message names the row and, with
            several ranks, the rank. All ranks raise if one does, so that no rank waits for another.
    """
    chunks, problem = None, None
    try:
        chunks = _sorted_rows(as_labels(labels), scores, weights)
    except ValueError as error:
        problem = str(error)
    # Exchange the problems before raising: if only one rank raised, the others would wait for it in a collective.
    problems = gather_objects(problem, group)
    if len(problems) == 1 and problem:
        raise ValueError(problem)
    if messages := [f"rank {rank}: {text}" for rank, text in enumerate(problems) if text]:
        raise ValueError("; ".join(messages))
    assert chunks is not None
    return rank_statistics(chunks, group)[0].interval.auc


def delong_interval(labels: Values, scores: Values, confidence: float = 0.95) -> AucInterval:
    """AUC with DeLong's standard error and a confidence interval on the logit scale, of the rows of one process.

    The variance is var(V10) / P + var(V01) / N with the placement values V of each positive among the
    negatives and of each negative among the positives (DeLong, DeLong and Clarke-Pearson 1988), computed from
    ranks in O(n log n). Rows are assumed to be independent: for users with many rows each, see
    `bootstrap.user_bootstrap`. The interval is computed for logit(AUC) and transformed back, so it lies within 0..1.

    Returns:
        The interval; `nan` bounds with fewer than two rows of a class, or with an AUC of exactly 0 or 1 (a perfectly
        separated sample has variance 0, which is not informative about other samples).

    Raises:
        ValueError: as `roc_auc`, or a confidence outside 0..1.
    """
    normal_quantile(confidence)
    is_positive = as_labels(labels)
    auc, influences = _auc_and_influences(is_positive, scores)
    return logit_interval(auc, _standard_error(is_positive, influences), confidence)


def delong_test(labels: Values, scores_a: Values, scores_b: Values, confidence: float = 0.95) -> PairedDifference:
    """DeLong's test of AUC(a) - AUC(b) on the same rows of one process, with a plain (Wald) interval.

    The variance of the difference is DeLong's with each row's placement value replaced by the difference of
    its two placement values, which includes the covariance of the two models. Rows are assumed to be independent.

    Returns:
        The difference; `nan` bounds and p-value with fewer than two rows of a class, and if all pairs change in the
        same way (variance 0 with a difference other than 0). Models that rank all pairs equally have difference 0,
        interval [0, 0] and p = 1.

    Raises:
        ValueError: as `roc_auc`, or a confidence outside 0..1.
    """
    normal_quantile(confidence)
    is_positive = as_labels(labels)
    (auc_a, of_a), (auc_b, of_b) = (_auc_and_influences(is_positive, scores) for scores in (scores_a, scores_b))
    return wald_difference(auc_a - auc_b, _standard_error(is_positive, of_a - of_b), confidence)


def _sorted_rows(is_positive: np.ndarray, scores: Values, weights: Values | None = None) -> SortedChunks:
    chunks = SortedChunks(MemoryPool(UNBOUNDED, Path()), np.dtype(np.float64), weights is not None)
    row_scores = as_scores(scores, len(is_positive))
    if weights is None:
        chunks.add(row_scores, is_positive)
    else:
        row_weights = as_weights(weights, len(is_positive))
        counts = row_weights > 0  # a row of weight 0 must not create a threshold
        chunks.add(row_scores[counts], is_positive[counts], row_weights[counts])
    return chunks


def _auc_and_influences(is_positive: np.ndarray, scores: Values) -> tuple[float, np.ndarray]:
    """Return the AUC, and the influence [n] of each row on it."""
    row_scores = as_scores(scores, len(is_positive))
    statistics, placements = rank_statistics(_sorted_rows(is_positive, row_scores), SINGLE_RANK, keep=True)
    if math.isnan(statistics.interval.auc):
        return math.nan, np.full(len(is_positive), math.nan)
    row_placements = placements.look_up(row_scores, is_positive)
    return statistics.interval.auc, influence(row_placements, is_positive, None, statistics)


def _standard_error(is_positive: np.ndarray, influences: np.ndarray) -> float:
    """Return DeLong's standard error from the rows' influences [n] on an AUC, or on a difference of two.

    `nan` if a class has fewer than two rows.
    """
    variance = 0.0
    for of_class in (influences[is_positive], influences[~is_positive]):
        if of_class.size < 2:
            return math.nan
        variance += float((of_class**2).sum()) * of_class.size / (of_class.size - 1)
    return math.sqrt(variance)
