"""Exact ROC AUC with ties, on one rank or many, and its DeLong confidence interval.

AUC = P(score of a positive > score of a negative) + P(equal) / 2 (the Mann-Whitney statistic).

Letters: n rows, P positives, N negatives, U unique scores.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch.distributed as dist

from hllm_torchrec.distributed.array_collectives import all_gather, all_to_all
from hllm_torchrec.metrics.input_checks import Values, as_labels, as_scores, as_weights
from hllm_torchrec.metrics.score_chunks import common_splitters


@dataclass(frozen=True)
class AucInterval:
    """An AUC with its confidence interval; `nan` where there is nothing to say (see `delong_interval`)."""

    auc: float
    low: float
    high: float
    standard_error: float


@dataclass(frozen=True)
class PairedDifference:
    """AUC of model a minus AUC of model b on the same rows, with its confidence interval."""

    difference: float
    low: float
    high: float
    p_value: float
    """Two-sided, of the hypothesis that both models have the same AUC."""


def roc_auc(labels: Values, scores: Values, weights: Values | None = None) -> float:
    """Exact AUC; tied pairs count one half, so the order of the rows never matters.

    Args:
        labels: 0 or 1, [n].
        scores: any real numbers, higher = more likely positive, infinities allowed, [n]. Compared as float64.
        weights: sample weights >= 0, [n]; a pair weighs the product of its two rows.

    Returns:
        The AUC, in O(n log n); `nan` if one of the classes is empty or weighs nothing, because there is then
        no pair to rank (scikit-learn warns and does the same).

    Raises:
        ValueError: naming the row of a NaN score, a label that is not 0 or 1 or a bad weight.
    """
    _, positives, negatives = _merge_ties(*_columns(labels, scores, weights))
    return _ratio(_concordant(positives, negatives), positives.sum() * negatives.sum())


def distributed_roc_auc(
    labels: Values, scores: Values, weights: Values | None = None, group: dist.ProcessGroup | None = None
) -> float:
    """`roc_auc` of the rows of all ranks together; every rank gets the same number.

    Equal scores are merged on each rank, then the merged rows are sorted across ranks (sample sort: regular
    samples give the splitters, one all-to-all brings each score range to one rank). So a rank holds O(n / ranks) rows
    whatever the scores are: constant scores collapse to one merged row a rank.

    Without weights the result equals `roc_auc` to the last bit (counts are integers, exact below 2^53 pairs);
    with weights to rounding.

    Args:
        labels, scores, weights: this rank's rows as for `roc_auc`; ranks may have different numbers, or none.
            Weights on some ranks only are allowed (the others' rows weigh 1).
        group: the process group (gloo or nccl), by default the whole world. Without torch.distributed
            initialised this is `roc_auc`.

    Raises:
        ValueError: as `roc_auc`, on every rank if on any, naming the rank, so that no rank waits for another.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return roc_auc(labels, scores, weights)
    columns = _columns_of_all_ranks(labels, scores, weights, group)
    merged_U3 = np.stack(_merge_ties(*columns), axis=1)
    received_R3 = _exchange_score_ranges(merged_U3, group)
    _, positives, negatives = _merge_ties(received_R3[:, 0], received_R3[:, 1], received_R3[:, 2])
    totals = np.array([positives.sum(), negatives.sum()], dtype=np.float64)  # of no rows they would be integers
    totals_G2 = np.stack(all_gather(totals, group))
    below = totals_G2[: dist.get_rank(group), 1].sum()  # lower ranks hold lower scores
    concordant = np.sum(all_gather(np.array([_concordant(positives, negatives, below)]), group))
    return _ratio(float(concordant), totals_G2[:, 0].sum() * totals_G2[:, 1].sum())


def delong_interval(labels: Values, scores: Values, confidence: float = 0.95) -> AucInterval:
    """AUC with DeLong's standard error and a confidence interval on the logit scale.

    The variance is var(V10) / P + var(V01) / N with the placement values V of each positive among the
    negatives and of each negative among the positives (DeLong, DeLong and Clarke-Pearson 1988), computed from
    ranks in O(n log n). Rows are taken as independent: for users with many rows each, see
    `bootstrap.user_bootstrap`. The interval is that of logit(AUC), carried back, which keeps it inside 0..1.

    Returns:
        `nan` bounds where the data cannot give any: fewer than two rows of a class, or an AUC of exactly 0 or
        1 (perfect separation of a sample has variance 0, which says nothing of the next sample).

    Raises:
        ValueError: as `roc_auc`, or a confidence outside 0..1.
    """
    normal_quantile(confidence)
    is_positive = as_labels(labels)
    row_scores = as_scores(scores, len(is_positive))
    auc = roc_auc(is_positive, row_scores)
    _, standard_error = _mean_and_error(is_positive, placement_values(is_positive, row_scores))
    return logit_interval(auc, standard_error, confidence)


def logit_interval(auc: float, standard_error: float, confidence: float = 0.95) -> AucInterval:
    """The interval of logit(AUC), carried back; `nan` bounds without an error or at an AUC of 0 or 1.

    Raises:
        ValueError: a confidence outside 0..1.
    """
    quantile = normal_quantile(confidence)
    if math.isnan(standard_error) or not 0 < auc < 1:
        return AucInterval(auc, math.nan, math.nan, standard_error)
    logit = math.log(auc / (1 - auc))
    half = quantile * standard_error / (auc * (1 - auc))
    return AucInterval(auc, _sigmoid(logit - half), _sigmoid(logit + half), standard_error)


def delong_test(labels: Values, scores_a: Values, scores_b: Values, confidence: float = 0.95) -> PairedDifference:
    """DeLong's test of AUC(a) - AUC(b) on the same rows, with a plain (Wald) interval of the difference.

    The variance of the difference is DeLong's with each row's placement value replaced by the difference of
    its two placement values, which contains the covariance of the two models. Rows are taken as independent.

    Returns:
        `nan` bounds and p-value with fewer than two rows of a class, and where all pairs change alike
        (variance 0 with a difference other than 0). Models that rank all pairs alike differ by 0, [0, 0], p =
        1.

    Raises:
        ValueError: as `roc_auc`, or a confidence outside 0..1.
    """
    normal_quantile(confidence)
    is_positive = as_labels(labels)
    placements = [placement_values(is_positive, as_scores(scores, len(is_positive))) for scores in (scores_a, scores_b)]
    return wald_difference(*_mean_and_error(is_positive, placements[0] - placements[1]), confidence)


def wald_difference(difference: float, standard_error: float, confidence: float = 0.95) -> PairedDifference:
    """A difference with its plain (Wald) interval and two-sided p-value; see `delong_test` for an error of 0.

    Raises:
        ValueError: a confidence outside 0..1.
    """
    quantile = normal_quantile(confidence)
    if standard_error > 0:
        p_value = math.erfc(abs(difference) / standard_error / math.sqrt(2))
        half = quantile * standard_error
        return PairedDifference(difference, difference - half, difference + half, p_value)
    if standard_error == 0 and difference == 0:
        return PairedDifference(0.0, 0.0, 0.0, 1.0)
    return PairedDifference(difference, math.nan, math.nan, math.nan)


def _columns(labels: Values, scores: Values, weights: Values | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Checked rows as (scores, weight if positive else 0, weight if negative else 0), each float64 [n]."""
    is_positive = as_labels(labels)
    row_weights = as_weights(weights, len(is_positive))
    row_scores = as_scores(scores, len(is_positive))
    return row_scores, row_weights * is_positive, row_weights * ~is_positive


def _merge_ties(
    scores: np.ndarray, positives: np.ndarray, negatives: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One row per unique score, ascending: (scores [U], weight of positives [U], weight of negatives [U])."""
    unique, index = np.unique(scores, return_inverse=True)
    count = len(unique)
    return unique, np.bincount(index, positives, count), np.bincount(index, negatives, count)


def _concordant(positives: np.ndarray, negatives: np.ndarray, below: float = 0.0) -> float:
    """Weight of the pairs ranked right plus half the tied ones; `below`: negatives under all of these."""
    negatives_below = below + negatives.cumsum() - negatives
    return float(positives @ (negatives_below + negatives / 2))


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator > 0 else math.nan


def placement_values(is_positive: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Each row's placement value [n]: the share of the other class that it is ranked right against.

    A row against an empty class has the value nan.
    """
    unique, index = np.unique(scores, return_inverse=True)
    positives = np.bincount(index, is_positive, len(unique))
    negatives = np.bincount(index, ~is_positive, len(unique))
    with np.errstate(invalid="ignore"):  # 0 / 0 is the documented nan
        among_negatives = (negatives.cumsum() - negatives / 2) / negatives.sum()
        among_positives = 1 - (positives.cumsum() - positives / 2) / positives.sum()
    return np.where(is_positive, among_negatives[index], among_positives[index])


def _mean_and_error(is_positive: np.ndarray, placements: np.ndarray) -> tuple[float, float]:
    """(AUC or difference of AUCs, DeLong's standard error) from placement values or their differences [n]."""
    of_positives, of_negatives = placements[is_positive], placements[~is_positive]
    if not (of_positives.size and of_negatives.size):
        return math.nan, math.nan
    mean = float(of_positives.mean())
    if of_positives.size < 2 or of_negatives.size < 2:
        return mean, math.nan
    variance = of_positives.var(ddof=1) / of_positives.size + of_negatives.var(ddof=1) / of_negatives.size
    return mean, math.sqrt(variance)


def normal_quantile(confidence: float) -> float:
    """The standard normal quantile of a two-sided interval, 1.96 for 0.95.

    Raises:
        ValueError: a confidence that is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it lies between 0 and 1, e.g. 0.95; pass a share, not per cent")
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def _sigmoid(logit: float) -> float:
    return 0.5 * (1 + math.tanh(logit / 2))  # cannot overflow


def _columns_of_all_ranks(
    labels: Values, scores: Values, weights: Values | None, group: dist.ProcessGroup | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`_columns` of this rank, after every rank has said that its rows are good."""
    problem, columns = None, None
    try:
        columns = _columns(labels, scores, weights)
    except ValueError as error:
        problem = str(error)
    problems: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(problems, problem, group=group)
    found = [f"rank {rank}: {text}" for rank, text in enumerate(problems) if text is not None]
    if found:
        raise ValueError("; ".join(found))
    assert columns is not None
    return columns


def _exchange_score_ranges(merged_U3: np.ndarray, group: dist.ProcessGroup | None) -> np.ndarray:
    """Brings each range of scores to one rank, ascending with the rank.

    Args:
        merged_U3: (score, positives, negatives), ascending and unique in the score, float64 [U, 3].

    Returns:
        The rows of this rank's range, from all ranks, float64 [R, 3]; equal scores are never parted.
    """
    cuts = np.searchsorted(merged_U3[:, 0], _splitters(merged_U3[:, 0], group), side="right")
    return all_to_all(merged_U3, np.diff(cuts, prepend=0, append=len(merged_U3)).tolist(), group)


def _splitters(scores_U: np.ndarray, group: dist.ProcessGroup | None) -> np.ndarray:
    """The scores [ranks - 1] that part the merged rows of all ranks, see `common_splitters`."""
    ranks = dist.get_world_size(group)
    count = 4 * ranks
    samples_2S = np.zeros((2, count))
    if len(scores_U):
        samples_2S[0] = scores_U[((np.arange(count) + 0.5) / count * len(scores_U)).astype(np.int64)]
        samples_2S[1] = len(scores_U) / count
    return common_splitters(samples_2S, ranks, group)
