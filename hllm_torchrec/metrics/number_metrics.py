"""Metrics of predicted numbers, such as watch time: MAE, RMSE, Spearman's correlation and XAUC; exact with weights.

Legend: n rows.
"""

import math

import numpy as np
from numpy.typing import NDArray

from hllm_torchrec.distributed.array_collectives import gather_objects

_Doubles = NDArray[np.float64]


class NumberSums:
    """Weighted sums over rows, from which the metrics that are means are computed."""

    def __init__(self, models: int) -> None:
        self.rows, self._weight = 0, 0.0
        self._sums = np.zeros((4, models))

    def add(self, rows: _Doubles) -> None:
        """Add rows [n, 2 + m]: label, weight, predictions of m models."""
        labels, weights, predictions = rows[:, 0], rows[:, 1], rows[:, 2:]
        error = predictions - labels[:, None]
        terms = (np.abs(error), error**2, np.broadcast_to(labels[:, None], error.shape), predictions)
        self._sums += np.stack([weights @ term for term in terms])
        self.rows += len(rows)
        self._weight += float(weights.sum())

    def over_ranks(self) -> "NumberSums":
        """The sums of all ranks. Collective."""
        total = NumberSums(self._sums.shape[1])
        for rows, weight, sums in gather_objects((self.rows, self._weight, self._sums)):
            total.rows += rows
            total._weight += weight
            total._sums += sums
        return total

    def means(self, model: int) -> dict[str, float]:
        """The metrics of `number_metrics` that are means."""
        absolute, squared, label, prediction = (self._sums[:, model] / (self._weight or math.nan)).tolist()
        return {"mae": absolute, "rmse": math.sqrt(squared), "mean_label": label, "mean_prediction": prediction}


def number_metrics(labels: _Doubles, predictions: _Doubles, weights: _Doubles | None = None) -> dict[str, float]:
    """Compute the metrics of predictions [n] of labels [n]; weights [n] > 0, or None for 1 each.

    An undefined metric is NaN. For a calibrated model, `mean_prediction` / `mean_label` is 1.
    """
    if not labels.size:
        return dict.fromkeys(("mae", "rmse", "spearman", "xauc", "mean_label", "mean_prediction"), math.nan)
    weight = np.ones(labels.size) if weights is None else weights
    error = predictions - labels
    return {
        "mae": float(np.average(np.abs(error), weights=weight)),
        "rmse": math.sqrt(float(np.average(error**2, weights=weight))),
        "spearman": spearman(labels, predictions, weight),
        "xauc": xauc(labels, predictions, weight),
        "mean_label": float(np.average(labels, weights=weight)),
        "mean_prediction": float(np.average(predictions, weights=weight)),
    }


def spearman(labels: _Doubles, predictions: _Doubles, weights: _Doubles) -> float:
    """Weighted Pearson correlation of the weighted mid-ranks; NaN if the labels or the predictions are constant."""
    ranks = [_middle_ranks(values, weights) for values in (labels, predictions)]
    first, second = (rank - np.average(rank, weights=weights) for rank in ranks)
    spread = math.sqrt(float((weights * first**2).sum() * (weights * second**2).sum()))
    return float((weights * first * second).sum() / spread) if spread > 0 else math.nan


def _middle_ranks(values: _Doubles, weights: _Doubles) -> _Doubles:
    """Weighted mid-rank of each value [n]: the weight of all smaller values plus half the weight of equal values.

    A row of weight 2 is therefore equivalent to two rows of weight 1.
    """
    unique, index = np.unique(values, return_inverse=True)
    mass = np.bincount(index, weights, minlength=unique.size)
    ranks: _Doubles = (np.cumsum(mass) - mass / 2)[index]
    return ranks


def xauc(labels: _Doubles, predictions: _Doubles, weights: _Doubles) -> float:
    """Share of the pairs of rows with different labels that the predictions order as the labels do.

    Pairs with equal predictions count one half. The weight of a pair is the product of its rows' weights. With labels 0
    and 1, XAUC is the AUC. O(n log^2 n).
    """
    rank = np.unique(predictions, return_inverse=True)[1].astype(np.int64)
    # Rows with equal labels are sorted by descending prediction, so that `_ascending` does not count their pairs.
    order = np.lexsort((-rank, labels))
    y, r, w = labels[order], rank[order], weights[order]
    concordant = _ascending(r, w)
    same_label, same_rank = _equal_pairs([y], w), _equal_pairs([r], w)
    ties = same_rank - _equal_pairs([y, r], w)
    pairs = (w.sum() ** 2 - (w**2).sum()) / 2 - same_label
    return float((concordant + ties / 2) / pairs) if pairs > 0 else math.nan


def _equal_pairs(columns: list[NDArray], weights: _Doubles) -> float:
    """Weight of the pairs of different rows that are equal in all columns."""
    index = np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)[1].reshape(-1)
    total, squares = np.bincount(index, weights), np.bincount(index, weights**2)
    return float((total**2 - squares).sum() / 2)


def _ascending(ranks: NDArray[np.int64], weights: _Doubles) -> float:
    """Weight of the pairs i < j with ranks[i] < ranks[j], by a merge sort whose levels are vectorized."""
    number, total = ranks.size, 0.0
    index, high = np.arange(number), int(ranks.max(initial=0)) + 1
    width = 1
    while width < number:
        block, right = index // (2 * width), (index // width) % 2 == 1
        # Sort by (block, rank). Of equal ranks, those in the right half come first, so that their pairs do not count.
        order = np.argsort((block * high + ranks) * 2 + ~right, kind="stable")
        left_mass = np.where(right[order], 0.0, weights[order])
        before = np.cumsum(left_mass)
        first = np.searchsorted(block[order], block[order])
        since_start = before - np.where(first > 0, before[first - 1], 0.0)
        total += float((weights[order] * since_start)[right[order]].sum())
        width *= 2
    return total
