"""Fit of evidence to the training part: factors of all users and without each fold, scales and weights of columns.

Legend: X training exposures, F columns.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from hllm_torchrec.common.arrays import Doubles, Floats, Ints
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.events import Events
from hllm_torchrec.data.evidence import (
    CROSSES,
    FOLDS,
    Evidence,
    EvidenceModel,
    evidence_width,
    fold_of_users,
    standardized,
    unit_rows,
)
from hllm_torchrec.data.item_factors import FactorOptions, fit_factors, training_ratings
from hllm_torchrec.data.item_statistics import ItemStatistics
from hllm_torchrec.data.tastes import STATISTICS_SCALE, TEXT_SCALE, principal_components
from hllm_torchrec.data.visibility import visible_before

MAX_EXPOSURES = 200_000
"""Approximate maximum of training exposures (those of the first users) to which scales and weights are fitted."""
RIDGE, CROSS_RIDGE, NEWTON_STEPS = 1.0, 30.0, 12
"""Ridge penalties of the weights of columns, and of the weights of products; Newton steps of the regression."""


def fit_evidence(
    dataset: Dataset,
    names: tuple[str, ...],
    text: Floats | None,
    delay: int = 0,
    options: FactorOptions | None = None,
) -> EvidenceModel:
    """Fit evidence to the training part of `dataset`.

    Args:
        names: groups of columns, see `evidence.GROUPS`.
        text: [N, E] text embeddings of all items for "neighbors" and "tastes", or None.
        delay: seconds from an event until it may be seen.

    Raises:
        ValueError: without the users of some fold, the training values are missing or all equal.
    """
    options = options or FactorOptions()
    ratings = training_ratings(dataset, options.max_users)
    folds = fold_of_users(ratings.user_ids)
    others = [ratings.of_users(folds != k) for k in range(FOLDS)]
    if any(one.values.size == 0 or np.ptp(one.values) == 0 for one in others):
        raise ValueError(
            f"{dataset.root}: {ratings.user_ids.size} training users with values, and leaving out a fifth of "
            "them leaves no two values that differ: evidence needs more users and more varied values; drop "
            "data.evidence"
        )
    fits = [fit_factors(one, dataset.num_items, options) for one in (*others, ratings)]
    plain = tuple(name for name in names if name != CROSSES)
    width = evidence_width(plain)
    unscaled = EvidenceModel(
        loadings=np.stack([fit.loadings for fit in fits]),
        bias=np.stack([fit.bias for fit in fits]),
        mean=np.array([fit.mean for fit in fits]),
        noise=np.array([fit.noise for fit in fits]),
        fitted_until=_last_training_second(dataset),
        center=np.zeros(width),
        spread=np.ones(width),
        weights=np.zeros(width),
        intercept=0.0,
        text_center=np.zeros(0) if text is None else text[1:].mean(0, dtype=np.float64),
    )
    statistics = ItemStatistics.of_dataset(dataset)
    if "tastes" in names:
        unscaled = _with_tastes(unscaled, dataset, statistics, text, delay, float(ratings.values.std()))
    raw = Evidence(plain, unscaled, statistics, dataset.action_values, text, delay)
    x, y = _training_columns(dataset, raw)
    center, spread = x.mean(0), _spread(x)
    # The products are not standardized here, because `center` covers only the columns without products.
    products = np.ascontiguousarray(standardized(x.T, center, spread, names)[width:].T)
    center, spread = np.append(center, products.mean(0)), np.append(spread, _spread(products))
    penalties = np.append(np.full(width, RIDGE), np.full(products.shape[1], CROSS_RIDGE))
    beta = _logistic_regression(np.ascontiguousarray(standardized(x.T, center, spread, names).T), y, penalties)
    return replace(unscaled, center=center, spread=spread, weights=beta[1:], intercept=float(beta[0]))


def _spread(x: Doubles) -> Doubles:
    return np.maximum(x.std(0), 1e-6)


def _with_tastes(
    model: EvidenceModel, dataset: Dataset, statistics: ItemStatistics, text: Floats | None, delay: int, scale: float
) -> EvidenceModel:
    """The model with the parameters of the descriptors for tastes; scale: standard deviation of the values."""
    # The two columns of the group "items", unscaled. The division makes the descriptors' standard deviation
    # STATISTICS_SCALE * scale, which sets their prior effect on the value (see `tastes`).
    plain = replace(model, center=np.zeros(2), spread=np.ones(2))
    items = Evidence(("items",), plain, statistics, dataset.action_values, None, delay)
    x, _ = _training_columns(dataset, items)
    found = replace(model, taste_center=x.mean(0), taste_spread=_spread(x) / (STATISTICS_SCALE * scale))
    if text is None:
        return found
    return replace(found, taste_text=principal_components(unit_rows(text, model.text_center)) * TEXT_SCALE * scale)


def _training_columns(dataset: Dataset, evidence: Evidence) -> tuple[Doubles, Doubles]:
    """Columns [X, F] and labels [X] of the training exposures of the first users, until MAX_EXPOSURES are reached."""
    by_second = dataset.visibility == "second"
    columns, labels, count = [], [], 0
    for events, targets, user in _training_users(dataset):
        seconds = events.timestamps[targets]
        seen = visible_before(events.timestamps, seconds - evidence.delay) if by_second else targets
        columns.append(evidence.columns(events, seen, events.item_ids[targets], seconds, user, fitted=True))
        labels.append(events.labels[targets])
        count += targets.size
        if count >= MAX_EXPOSURES:
            break
    return np.concatenate(columns).astype(np.float64), np.concatenate(labels).astype(np.float64)


def _training_users(dataset: Dataset) -> Iterator[tuple[Events, Ints, int]]:
    """(complete training sequence, indices of its exposures, user id) of every training user with an exposure."""
    for group in dataset.row_groups("train"):
        for piece in dataset.sequences([group]).pieces():
            if piece.exposures.size:
                yield piece, piece.exposures, piece.user_id


def _last_training_second(dataset: Dataset) -> int:
    seconds = (dataset.sequences([group], ["timestamps"]).timestamps for group in dataset.row_groups("train"))
    return max(int(some.max()) for some in seconds if some.size)


def _logistic_regression(x: Doubles, y: Doubles, penalties: Doubles) -> Doubles:
    """[F + 1] bias and weights of a logistic regression of labels [X] on columns [X, F]; Newton steps, ridge [F]."""
    with_bias = np.column_stack([np.ones(len(x)), x])
    ridge = np.diag([1e-9, *penalties])
    beta = np.zeros(with_bias.shape[1])
    for _ in range(NEWTON_STEPS):
        p = 1 / (1 + np.exp(-with_bias @ beta))
        hessian = with_bias.T @ (with_bias * (p * (1 - p))[:, None]) + ridge
        beta = beta + np.linalg.solve(hessian, with_bias.T @ (y - p) - ridge @ beta)
    return beta
