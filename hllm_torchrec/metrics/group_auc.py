"""AUC within groups of rows, all groups at once: no loop over users."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class AucPerGroup:
    """Of the groups with both classes, ascending in the group."""

    groups: np.ndarray
    aucs: np.ndarray
    weights: np.ndarray
    """Sum of the weights of the group's rows."""
    left_out: int
    """Groups with one class only: they have no pair to rank."""


def grouped_auc(
    groups: np.ndarray, is_positive: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None
) -> AucPerGroup:
    """Exact AUC of each group, ties as one half. O(n log n).

    Args:
        groups: int64 [n] in 0..G-1, each of them there.
        is_positive: bool [n].
        scores: [n] without NaN.
        weights: > 0, [n]; a pair weighs the product of its rows.
    """
    order = np.lexsort((scores, groups))
    groups, scores, positive = groups[order], scores[order], is_positive[order]
    weight = np.ones(len(order)) if weights is None else weights[order]
    new_tie = (groups[1:] != groups[:-1]) | (scores[1:] != scores[:-1])
    ties = np.concatenate([[0], np.flatnonzero(new_tie) + 1])
    tie_groups = groups[ties]
    positives = np.add.reduceat(weight * positive, ties)
    negatives = np.add.reduceat(weight * ~positive, ties)
    group_positives, group_negatives = np.bincount(tie_groups, positives), np.bincount(tie_groups, negatives)
    kept = (group_positives > 0) & (group_negatives > 0)
    sizes = (group_positives + group_negatives)[kept]
    if weights is not None:  # shares of the group, or a light group would drown in the sums of a heavy one
        positives /= np.where(kept, group_positives, 1)[tie_groups]
        negatives /= np.where(kept, group_negatives, 1)[tie_groups]
        positives, negatives = positives * kept[tie_groups], negatives * kept[tie_groups]
        group_positives, group_negatives = np.bincount(tie_groups, positives), np.bincount(tie_groups, negatives)
    before = group_negatives.cumsum() - group_negatives
    below = negatives.cumsum() - negatives - before[tie_groups]
    concordant = np.bincount(tie_groups, positives * (below + negatives / 2))
    aucs = concordant[kept] / (group_positives[kept] * group_negatives[kept])
    return AucPerGroup(np.flatnonzero(kept), aucs, sizes, int((~kept).sum()))
