"""Losses of single tasks, one value per exposure, and what their outputs predict.

Legend: X exposures, C ordered classes. All run in at least float32.
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
    """Squared error / 2 of a standardized number, linear beyond a difference of 1."""
    return F.huber_loss(widen(outputs[:, 0]), widen(labels), reduction="none")


def weighted_logistic(outputs: Tensor, labels: Tensor) -> Tensor:
    """Logistic regression whose odds exp(z) are the expected label y >= 0, such as seconds of watch time.

    y * softplus(-z) + softplus(z), minimal at exp(z) = E[y]. Covington et al. (2016) weight positive impressions by y
    and all others by 1, so that their odds are E[y] / (1 - P(click)); with a negative of weight 1 in every row they are
    E[y] exactly.
    """
    z = widen(outputs[:, 0])
    return widen(labels) * F.softplus(-z) + F.softplus(z)


class TaskLoss(NamedTuple):
    """Sums over the exposures of a batch, with the weights of one task.

    raw: the loss; trained: what is minimized (with uncertainty weighting another function of the loss); both 0-d.
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
