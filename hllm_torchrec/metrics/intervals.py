"""Confidence intervals of an AUC and of the difference of two, from their standard errors."""

import math
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True)
class AucInterval:
    """An AUC with its confidence interval; `nan` bounds if it is undefined (see `auc.delong_interval`)."""

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
    """Two-sided p-value of the hypothesis that both models have the same AUC."""


def logit_interval(auc: float, standard_error: float, confidence: float = 0.95) -> AucInterval:
    """Interval of logit(AUC), transformed back; `nan` bounds if the error is `nan` or the AUC is 0 or 1.

    Raises:
        ValueError: the confidence is outside 0..1.
    """
    quantile = normal_quantile(confidence)
    if math.isnan(standard_error) or not 0 < auc < 1:
        return AucInterval(auc, math.nan, math.nan, standard_error)
    logit = math.log(auc / (1 - auc))
    half = quantile * standard_error / (auc * (1 - auc))  # delta method: d logit(p) / dp = 1 / (p (1 - p))
    return AucInterval(auc, _sigmoid(logit - half), _sigmoid(logit + half), standard_error)


def wald_difference(difference: float, standard_error: float, confidence: float = 0.95) -> PairedDifference:
    """Wald interval and two-sided p-value of a difference; see `auc.delong_test` for a standard error of 0.

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


def normal_quantile(confidence: float) -> float:
    """Standard normal quantile of a two-sided interval: 1.96 for 0.95.

    Raises:
        ValueError: the confidence is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it lies between 0 and 1, e.g. 0.95; pass a share, not per cent")
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def _sigmoid(logit: float) -> float:
    return 0.5 * (1 + math.tanh(logit / 2))  # unlike 1 / (1 + exp(-logit)) it cannot overflow
