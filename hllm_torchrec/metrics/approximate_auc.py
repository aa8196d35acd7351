"""Approximate AUC from a histogram of scores, with a guaranteed error bound.

The histogram is fast, has a fixed size, and can be merged over batches and ranks. It is meant for progress during
training; reported metrics use the exact AUC. The bin of a score is given by the first `bits` bits of its float32
representation (sign, exponent, leading mantissa bits), ordered like the numbers, so bins have equal relative width.
Pairs of rows in different bins are ranked exactly; a pair within a bin counts one half, which is wrong by at most one
half. Hence, with P_b positives and N_b negatives in bin b, P positives and N negatives (numbers, or sums of weights):

    |approximate - exact| <= 1/2 sum_b P_b N_b / (P N), over the bins with more than one distinct score

`ScoreHistogram.auc` returns this bound with the AUC. Scores are rounded to float32 first, so different float64 scores
may become ties; the bound refers to the rounded scores.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

BITS = 16


@dataclass(frozen=True)
class BoundedAuc:
    """Approximate AUC, and the maximum of its difference from the exact AUC; both `nan` if a class is empty."""

    auc: float
    error: float


class ScoreHistogram:
    """Counts of positives and negatives by score.

    With 16 bits a bin is at most 0.8% wide and the histogram takes 1.5 MB; each further bit halves the width and
    doubles the memory.
    """

    def __init__(self, bits: int = BITS, *, weighted: bool = False):
        """Create an empty histogram. weighted: rows have weights, so that bins contain float64 sums.

        Raises:
            ValueError: `bits` is outside 10..24.
        """
        if not 10 <= bits <= 24:
            raise ValueError(f"bits is {bits}; a histogram has 10 to 24 (16: 1.5 MB, error about 1e-3 or less)")
        self.bits = bits
        kind = torch.float64 if weighted else torch.int64
        self.counts = torch.zeros((2, 1 << bits), dtype=kind)
        """Number or weight of the negatives and positives by bin, [2, bins]."""
        self.lowest = torch.full((1 << bits,), 2**31 - 1, dtype=torch.int32)
        """Smallest score of each bin as an ordered integer, [bins]: equal to `highest` if all scores are tied."""
        self.highest = torch.full_like(self.lowest, -(2**31))

    def add(self, labels: Tensor, scores: Tensor, weights: Tensor | None = None) -> None:
        """Add rows: labels 0 or 1, scores without NaN, and weights >= 0 or None, all [n].

        Raises:
            ValueError: a label is not 0 or 1, or a score is NaN.
        """
        if torch.isnan(scores).any() or not ((labels == 0) | (labels == 1)).all():
            raise ValueError("the histogram takes labels 0 or 1 and scores that are numbers; leave out other rows")
        # The shift is arithmetic: negative scores give negative values, so half the number of bins is added.
        ordered = _ordered(scores.detach())
        bins = ((ordered >> (32 - self.bits)) + (1 << (self.bits - 1))).to(torch.int64)
        size = self.counts.shape[1]
        weights = None if weights is None else weights.double()
        self.counts += torch.bincount(bins + size * (labels == 1), weights, minlength=2 * size).view(2, size)
        self.lowest.scatter_reduce_(0, bins, ordered, "amin")
        self.highest.scatter_reduce_(0, bins, ordered, "amax")

    def all_reduce(self) -> None:
        """Replace the histogram of every rank by the sum of all. Collective; no effect without a process group.

        Counts are integers, so the result does not depend on the order of rows and ranks. Sums of weights are rounded.
        """
        if not dist.is_initialized():
            return
        dist.all_reduce(self.counts)
        dist.all_reduce(self.lowest, dist.ReduceOp.MIN)
        dist.all_reduce(self.highest, dist.ReduceOp.MAX)

    def auc(self) -> BoundedAuc:
        """The AUC of the rows added so far, with its error bound."""
        negatives, positives = self.counts.double()
        pairs = float(positives.sum() * negatives.sum())
        if not pairs:
            return BoundedAuc(math.nan, math.nan)
        below = negatives.cumsum(0) - negatives
        within = positives * negatives
        # Only bins with different scores contribute to the error: for pairs of equal scores, one half is exact.
        mixed = float(within[self.lowest < self.highest].sum())
        return BoundedAuc(float(positives @ below + within.sum() / 2) / pairs, mixed / 2 / pairs)


def _ordered(scores: Tensor) -> Tensor:
    """Map float32 scores to int32 values with the same order."""
    bits = (scores.to(torch.float32) + 0.0).contiguous().view(torch.int32)  # + 0.0 turns -0.0 into 0.0: a tie
    # The bit patterns of negative floats have the reverse order, so all bits but the sign are flipped.
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
