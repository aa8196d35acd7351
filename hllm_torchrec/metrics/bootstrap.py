"""Bootstrap over users: variation of an AUC, or of a difference of two, over samples of users.

A user's exposures are correlated, so an interval that treats rows as independent (DeLong's) is too narrow for
conclusions about other users. Here users are drawn with replacement, each with all of its rows.
"""

import math
from collections.abc import Mapping

import numpy as np
from tqdm import tqdm

from hllm_torchrec.metrics.input_checks import UserIds, Values, as_groups, as_labels, as_scores

CHUNK_VALUES = 2_000_000
"""Values per temporary array of a chunk of draws (16 MB)."""


def user_bootstrap(
    labels: Values, scores: Mapping[str, Values], user_ids: UserIds, draws: int = 1000, seed: int = 0
) -> dict[str, np.ndarray]:
    """AUCs of resampled users, with the same draws for every model, so that differences per draw are paired.

    Each draw samples, with replacement, as many users as there are; the rows of a user drawn k times have weight k. The
    AUC of a draw is exact with ties. Rows are sorted once; a draw costs O(n).

    Args:
        labels: 0 or 1, [n].
        scores: model → scores [n].
        user_ids: [n].
        draws: number of resamples.
        seed: the same seed gives the same draws, on any machine.

    Returns:
        model → float64 [draws]; `nan` for a draw without one of the classes.

    Raises:
        ValueError: bad rows as in `auc.roc_auc`, fewer than one draw, no rows.
    """
    is_positive = as_labels(labels)
    users = as_groups(user_ids, len(is_positive))
    if draws < 1 or not len(users):
        raise ValueError(f"{draws} draws of {len(users)} rows; at least one of each is needed; 1000 draws are usual")
    sorted_models = {
        name: _SortedRows(is_positive, as_scores(values, len(is_positive)), users) for name, values in scores.items()
    }
    user_count = int(users.max()) + 1
    chunk = max(1, min(draws, CHUNK_VALUES // len(users)))
    random = np.random.default_rng(seed)
    aucs: dict[str, list[np.ndarray]] = {name: [] for name in scores}
    with tqdm(total=draws, desc="bootstrap over users", delay=5) as progress:
        for start in range(0, draws, chunk):
            size = min(chunk, draws - start)
            counts_UC = np.stack([_draw_users(random, user_count) for _ in range(size)], axis=1)
            for name, rows in sorted_models.items():
                aucs[name].append(rows.weighted_auc(counts_UC))
            progress.update(size)
    return {name: np.concatenate(parts) for name, parts in aucs.items()}


def user_mean_interval(values: np.ndarray, user_ids: UserIds) -> tuple[float, float]:
    """Bounds of the 95% interval of the mean of `values` [n] over samples of users, each drawn with all of its rows.

    Differences of two models on the same rows are paired: give the differences as values.

    Raises:
        ValueError: no rows.
    """
    return user_ratio_interval(values, np.ones(len(values)), user_ids)


def user_ratio_interval(values: np.ndarray, bases: np.ndarray, user_ids: UserIds) -> tuple[float, float]:
    """Bounds of the 95% interval of sum(values) / sum(bases), both [n], over samples of users with all of their rows.

    Raises:
        ValueError: no rows.
    """
    users, draws = as_groups(user_ids, len(values)), 1000
    if not len(users):
        raise ValueError(f"{draws} draws of {len(users)} rows; at least one of each is needed; 1000 draws are usual")
    below = np.bincount(users, np.asarray(bases, np.float64))
    above = np.bincount(users, np.asarray(values, np.float64))
    random = np.random.default_rng(0)
    ratios = np.full(draws, math.nan)
    for draw in range(draws):
        weights = _draw_users(random, below.size)
        total = weights @ below
        if total:
            ratios[draw] = weights @ above / total
    return percentile_interval(ratios)


def percentile_interval(draws: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Bounds of the central share `confidence` of the draws; `nan` draws are ignored, `nan` bounds if all are."""
    kept = draws[~np.isnan(draws)]
    if not len(kept):
        return math.nan, math.nan
    low, high = np.quantile(kept, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def _draw_users(random: np.random.Generator, count: int) -> np.ndarray:
    """Number of times that each user is drawn, float64 [users]."""
    return np.bincount(random.integers(count, size=count), minlength=count).astype(np.float64)


class _SortedRows:
    """One model's rows sorted by score, reused by all draws."""

    def __init__(self, is_positive: np.ndarray, scores: np.ndarray, users: np.ndarray):
        negatives = np.flatnonzero(~is_positive)
        negatives = negatives[scores[negatives].argsort(kind="stable")]
        positives = np.flatnonzero(is_positive)
        positives = positives[scores[positives].argsort(kind="stable")]  # ascending reads stay in the cache
        self.negative_users = users[negatives]
        self.positive_users = users[positives]
        self.below = np.searchsorted(scores[negatives], scores[positives], side="left")
        self.not_above = np.searchsorted(scores[negatives], scores[positives], side="right")

    def weighted_auc(self, counts_UC: np.ndarray) -> np.ndarray:
        """The AUC of each draw [C], with users weighted by `counts_UC` [users, C]."""
        draws = counts_UC.shape[1]
        # Row i: weight of the i negatives with the lowest scores. A positive outranks the first `below` negatives and
        # ties with those up to `not_above`, so the mean of the two sums counts ties as one half.
        cumulated = np.zeros((len(self.negative_users) + 1, draws))
        np.cumsum(counts_UC[self.negative_users], axis=0, out=cumulated[1:])
        weights = counts_UC[self.positive_users]
        concordant = np.einsum("pc,pc->c", weights, cumulated[self.below] + cumulated[self.not_above]) / 2
        pairs = weights.sum(axis=0) * cumulated[-1]
        return np.divide(concordant, pairs, out=np.full(draws, math.nan), where=pairs > 0)
