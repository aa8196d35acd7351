"""Losses of single tasks, one value per exposure, and the expected value of an ordinal output.

Legend: X exposures, O outputs of the task, C ordered classes. All run in at least float32.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from hllm_torchrec.modules.precision import widen


class RowLoss(Protocol):
    """(outputs [X, O], labels [X]) -> loss of each exposure [X]."""

    def __call__(self, outputs: Tensor, labels: Tensor, /) -> Tensor:
        """Return the loss of each exposure."""


def bce(outputs: Tensor, labels: Tensor) -> Tensor:
    """Eq. (2): binary cross-entropy of a logit [X, 1] with labels 0 or 1."""
    return F.binary_cross_entropy_with_logits(widen(outputs[:, 0]), widen(labels), reduction="none")


def ordinal_softmax(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of a softmax over C classes; labels are class indices as floats."""
    return F.cross_entropy(widen(outputs), labels.long(), reduction="none")


def huber(outputs: Tensor, labels: Tensor) -> Tensor:
    """Huber loss of a standardized number: squared error / 2, linear for differences above 1."""
    return F.huber_loss(widen(outputs[:, 0]), widen(labels), reduction="none")


def weighted_logistic(outputs: Tensor, labels: Tensor) -> Tensor:
    """Weighted logistic regression: the odds exp(z) predict a label y >= 0, such as seconds of watch time.

    y * softplus(-z) + softplus(z), minimal at exp(z) = E[y]. Covington et al. (2016) weight positive impressions by y
    and all others by 1, so that their odds are E[y] / (1 - P(click)); with a negative of weight 1 in every row they are
    E[y] exactly.
    """
    z = widen(outputs[:, 0])
    return widen(labels) * F.softplus(-z) + F.softplus(z)


class TaskLoss(NamedTuple):
    """Weighted loss sums of one task over the exposures of a batch, 0-d.

    raw: the task's loss; trained: the value that is minimized, which with uncertainty weighting is a function of `raw`.
    """

    raw: Tensor
    trained: Tensor


ROW_LOSSES: dict[str, RowLoss] = {
    "bce": bce,
    "ordinal": ordinal_softmax,
    "huber": huber,
    "weighted_logistic": weighted_logistic,
}


def expected_class(outputs: Tensor, values: Tensor) -> Tensor:
    """Expected value [X] of a softmax over classes with `values` [C]."""
    return torch.softmax(widen(outputs), dim=-1) @ values.to(outputs.device, torch.float32)
