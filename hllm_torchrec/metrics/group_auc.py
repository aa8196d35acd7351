"""AUC within groups of rows, vectorized over groups."""

from dataclasses import dataclass

import numpy as np

NO_USER, ROWS_WITHOUT_USER = -(1 << 63), 1 << 40
"""Rows without a user have different ids in [NO_USER, NO_USER + ROWS_WITHOUT_USER). Each is an independent unit in
standard errors, but is not counted as a user."""


@dataclass(frozen=True)
class AucPerGroup:
    """AUC of each group that has both classes, sorted by group."""

    groups: np.ndarray
    aucs: np.ndarray
    weights: np.ndarray
    """Sum of the weights of the group's rows."""
    left_out: int
    """Number of groups with only one class, which have no pair to rank."""


def grouped_auc(
    groups: np.ndarray, is_positive: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None
) -> AucPerGroup:
    """Exact AUC of each group, ties as one half. O(n log n).

    Args:
        groups: int64 [n] in 0..G-1; each group has at least one row.
        is_positive: bool [n].
        scores: [n] without NaN.
        weights: > 0, [n]; the weight of a pair is the product of its rows' weights.
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
    has_both = (group_positives > 0) & (group_negatives > 0)
    sizes = (group_positives + group_negatives)[has_both]
    # Normalize within each group: otherwise the cumulative sums of heavy groups lose the precision of light ones.
    if weights is not None:
        positives /= np.where(has_both, group_positives, 1)[tie_groups]
        negatives /= np.where(has_both, group_negatives, 1)[tie_groups]
        positives, negatives = positives * has_both[tie_groups], negatives * has_both[tie_groups]
        group_positives, group_negatives = np.bincount(tie_groups, positives), np.bincount(tie_groups, negatives)
    # below: negatives of the same group with a lower score (the cumulative sum over all rows minus that of the earlier
    # groups); concordant: weight of the correctly ranked (positive, negative) pairs of a group.
    before = group_negatives.cumsum() - group_negatives
    below = negatives.cumsum() - negatives - before[tie_groups]
    concordant = np.bincount(tie_groups, positives * (below + negatives / 2))
    aucs = concordant[has_both] / (group_positives[has_both] * group_negatives[has_both])
    return AucPerGroup(np.flatnonzero(has_both), aucs, sizes, int((~has_both).sum()))
