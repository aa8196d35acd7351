"""The loss of a step: shares of ranks and micro-batches add up to the whole, and what is wrong stops the run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hllm_torchrec.config.schema import Config
from hllm_torchrec.training.loss import LossWeights, StepCounts, StepStats, describe_step, micro_batch_loss, step_counts
from tests.helpers import fixtures
from tests.helpers.distributed import run_ranks
from tests.helpers.training_fixtures import config


def parts(cfg: Config, shares: list[tuple[int, int]]) -> tuple[float, torch.Tensor, torch.Tensor]:
    """(loss, numbers, gradient) of users cut into shares [start, end)."""
    model = fixtures.model(cfg).train()
    collator = fixtures.collator(cfg, training=True)
    batches = [collator(fixtures.pieces()[start:end], 0, 0) for start, end in shares]
    counts, weights = step_counts(batches), LossWeights.of(cfg)
    results = [micro_batch_loss(model(batch), counts, weights, encodes_items=True) for batch in batches]
    total = torch.stack([loss for loss, _ in results]).sum()
    total.backward()
    stats = sum((stats for _, stats in results), StepStats())
    return total.item(), stats.to_tensor(), model.user.backbone.layers[0].mlp.up_proj.weight.grad


@pytest.mark.parametrize(
    "objective",
    [
        {"fusion": "late"},
        {"fusion": "early", "generative_weight": 0.3, "negatives": 40},
        {"fusion": "none", "negatives": 40},
    ],
)
def test_shares_add_up_to_the_whole(objective: dict[str, Any]) -> None:
    """With all items as negatives: each share draws the same ones."""
    cfg = fixtures.config(objective=objective)
    whole, numbers, gradient = parts(cfg, [(0, 9)])
    again, of_shares, of_gradient = parts(cfg, [(0, 2), (2, 2), (2, 9)])
    assert again == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(of_shares[:5], numbers[:5], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(of_gradient, gradient, rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_mean_over_exposures_plus_lambda_times_that_over_targets() -> None:
    cfg = fixtures.config(objective={"fusion": "late", "generative_weight": 0.3})
    batch = fixtures.collator(cfg, training=True)(fixtures.pieces()[:6], 0, 0)
    output = fixtures.model(cfg)(batch)
    loss, _ = micro_batch_loss(output, step_counts([batch]), LossWeights.of(cfg), encodes_items=True)
    mean = torch.nn.functional.binary_cross_entropy_with_logits(output.logits, batch.labels)
    expected = mean + 0.3 * output.generative.loss_sum / batch.next_rows.numel()
    torch.testing.assert_close(loss, expected)


def test_a_task_has_labels_if_some_exposure_of_the_step_has_its_label_and_a_weight() -> None:
    cfg = fixtures.config()
    batch = fixtures.collator(cfg, training=True)(fixtures.pieces()[:6], 0, 0)
    first = batch.weights[:, None]
    assert step_counts([batch]).labelled == (True,)
    for weights, labelled in (
        (first * torch.tensor([1.0, 0.0]), (True, False)),
        (first * torch.zeros(2), (False,) * 2),
    ):
        changed = replace(batch, task_weights=weights)
        assert step_counts([changed, changed]).labelled == labelled


def test_counts_of_nothing_are_one() -> None:
    cfg = fixtures.config()
    batch = fixtures.collator(cfg, training=True)([], 0, 0)
    assert step_counts([batch, batch]) == StepCounts((1.0,), 1.0, 1.0, 1.0, labelled=(False,))


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ({"fusion": "late", "generative_weight": 0.4}, LossWeights(0.4, 0.0)),
        ({"fusion": "none", "generative_weight": 0.4}, LossWeights(1.0, 0.0)),
        ({"fusion": "early", "value_weight": 0.2}, LossWeights(0.0, 0.2)),
    ],
)
def test_weights_of_the_losses(objective: dict[str, Any], expected: LossWeights) -> None:
    assert LossWeights.of(fixtures.config(objective=objective)) == expected


# --- what the log shows ----------------------------------------------------------------------------------


def described(settings: Config, *numbers: float, alarm: bool = True, norm: float = 1.0) -> dict[str, float]:
    return describe_step(StepStats(*numbers), norm, settings, alarm)


def test_the_step_is_described_by_the_losses_that_it_has(tmp_path: Path) -> None:
    lam = config(tmp_path, objective__generative_weight=0.5)
    assert described(lam, 0.7, 2.0, 0.0, 6.5, 0.25, 0.6, 2.0) == {
        "loss": 1.7,
        "loss_cls": 0.7,
        "loss_gen": 2.0,
        "effective_negatives": 6.5,
        "gen_accuracy": 0.25,
        "item_similarity": 0.3,
    }
    value = config(tmp_path, objective__value_weight=0.1)
    assert described(value, 0.7, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0) == pytest.approx(
        {"loss": 0.9, "loss_cls": 0.7, "loss_value": 2.0}
    )
    none = config(tmp_path, objective__fusion="none")
    assert described(none, 0.0, 2.0, 0.0, 6.5, 0.25, 0.0, 0.0)["loss"] == 2.0
    assert "loss_cls" not in described(none, 0.0, 2.0, 0.0, 6.5, 0.25, 0.0, 0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_an_error(bad: float, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf): lower optim.lr or optim.table_lr, or set"):
        described(config(tmp_path), bad, 0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_are_an_error(bad: float, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"the norm of the gradients is (nan|inf) at a loss of 0.5: lower"):
        described(config(tmp_path), 0.5, 0, 0, 0, 0, 0, 0, norm=bad)


def test_collapsed_items_are_an_error_after_the_warm_up(tmp_path: Path) -> None:
    settings = config(tmp_path, objective__generative_weight=1, objective__collapse_above=0.9)
    numbers = (0.7, 2.0, 0.0, 6.5, 0.25, 1.9, 2.0)
    with pytest.raises(FloatingPointError, match=r"similarity is 0.9500 > objective.collapse_above 0.9; lower"):
        described(settings, *numbers)
    assert described(settings, *numbers, alarm=False)["item_similarity"] == 0.95
    without = config(tmp_path, objective__collapse_above=0.9)
    assert described(without, *numbers)["item_similarity"] == 0.95  # frozen text in a classifier may be alike


def test_a_collapse_limit_of_one_is_never_exceeded_by_rounding(tmp_path: Path) -> None:
    settings = config(tmp_path, objective__generative_weight=1, objective__collapse_above=1.0)
    assert described(settings, 0.7, 2.0, 0.0, 6.5, 0.25, 2.000_000_2, 2.0)["item_similarity"] == 1.0


# --- statistics of a step --------------------------------------------------------------------------------


def test_statistics_survive_the_tensor_that_ranks_exchange() -> None:
    stats = StepStats(*(0.1 * number for number in range(9)))
    assert StepStats.from_tensor(stats.to_tensor()) == stats and stats.to_tensor().dtype == torch.float64


def sum_of_two_ranks() -> None:
    """Each rank with its own numbers; one of them was asked to stop."""
    rank = dist.get_rank()
    mine = StepStats(classification=1.0 + rank, similarities=2.0, asked_to_stop=float(rank == 1))
    assert mine.over_ranks() == StepStats(classification=3.0, similarities=4.0, asked_to_stop=1.0)


def test_ranks_add_their_statistics_up() -> None:
    run_ranks(sum_of_two_ranks, 2)
