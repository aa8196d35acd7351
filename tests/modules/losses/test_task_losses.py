"""Losses of tasks: their minima are what they are said to predict."""

import pytest
import torch
from torch.nn import functional as F

from hllm_torchrec.modules.losses.task_losses import ROW_LOSSES, expected_class


def fitted(name: str, labels: torch.Tensor, outputs: int) -> torch.Tensor:
    """The constant outputs with the smallest mean loss."""
    z = torch.zeros(outputs, requires_grad=True)
    optimizer = torch.optim.LBFGS([z], max_iter=200, line_search_fn="strong_wolfe")

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = ROW_LOSSES[name](z.expand(len(labels), -1), labels).mean()
        loss.backward()
        return loss

    optimizer.step(step)
    return z.detach()


def test_the_best_constants_are_rate_frequencies_and_mean() -> None:
    torch.manual_seed(0)
    clicks = (torch.rand(500) < 0.3).float()
    assert torch.sigmoid(fitted("bce", clicks, 1)).item() == pytest.approx(clicks.mean().item(), abs=1e-4)
    stars = torch.randint(0, 4, (500,)).float()
    frequencies = torch.bincount(stars.long()) / 500
    torch.testing.assert_close(torch.softmax(fitted("ordinal", stars, 4), 0), frequencies, atol=1e-4, rtol=0)
    seconds = torch.where(torch.rand(500) < 0.5, torch.zeros(500), torch.rand(500) * 9)
    assert fitted("weighted_logistic", seconds, 1).exp().item() == pytest.approx(seconds.mean().item(), rel=1e-3)
    assert fitted("huber", clicks, 1).item() == pytest.approx(clicks.mean().item(), abs=1e-4)


@pytest.mark.parametrize("name", list(ROW_LOSSES))
def test_each_row_has_its_own_loss_also_of_extreme_outputs(name: str) -> None:
    outputs = torch.tensor([[60.0, -60.0], [-60.0, 60.0], [0.3, 0.1]], requires_grad=True)
    own = outputs if name == "ordinal" else outputs[:, :1]
    labels = torch.tensor([1.0, 1.0, 0.0])
    losses = ROW_LOSSES[name](own, labels)
    (grad,) = torch.autograd.grad(losses.sum(), outputs)
    assert losses.shape == (3,) and torch.isfinite(losses).all() and torch.isfinite(grad).all() and (losses >= 0).all()
    torch.testing.assert_close(losses[2], ROW_LOSSES[name](own[2:], labels[2:])[0])


def test_bce_is_that_of_the_single_head() -> None:
    z, y = torch.randn(20), (torch.rand(20) < 0.5).float()
    torch.testing.assert_close(
        ROW_LOSSES["bce"](z[:, None], y).sum(), F.binary_cross_entropy_with_logits(z, y, reduction="sum")
    )


def test_the_expected_class_lies_between_the_values() -> None:
    values = torch.tensor([1.0, 2.0, 5.0])
    assert expected_class(torch.tensor([[0.0, 0.0, 0.0], [99.0, 0.0, 0.0]]), values).tolist() == pytest.approx(
        [8 / 3, 1]
    )
