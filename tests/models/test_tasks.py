"""Tasks of a model: resolved against the labels of a dataset, and their losses in a step."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.config.objective import ObjectiveConfig
from hllm_torchrec.data.event_schema import LabelColumn
from hllm_torchrec.distributed.process_group import init_distributed
from hllm_torchrec.models.assembly import build_experiment
from hllm_torchrec.models.tasks import Task, fit_tasks, resolve_tasks
from hllm_torchrec.training.loss import LossWeights, micro_batch_loss, step_counts
from tests.helpers import task_shop, training_fixtures

ONE = torch.tensor([0.0, 1.0])


def test_tasks_are_resolved_with_the_first_label_first() -> None:
    objective = ObjectiveConfig(tasks={"stars": {"weight": 2.0}, "watch": {}, "click": {}, "like": {}})
    tasks = fit_tasks(resolve_tasks(objective.task_configs, task_shop.dataset().schema), task_shop.dataset())
    assert [(task.name, task.loss, task.outputs) for task in tasks] == [
        ("click", "bce", 1), ("stars", "ordinal", 3), ("watch", "huber", 1), ("like", "bce", 1),
    ]  # fmt: skip
    assert tasks[1].weight == 2.0 and np.exp(tasks[1].start).sum() == pytest.approx(1)
    rows = [task_shop.dataset().sequences([group]) for group in task_shop.dataset().row_groups("train")]
    watch = np.log1p(np.concatenate([one.extra["label_watch"] for one in rows]))
    assert (tasks[2].center, tasks[2].scale) == pytest.approx((watch.mean(), watch.std()), rel=1e-5)


def test_predictions_are_in_the_unit_of_the_label() -> None:
    outputs, scale = torch.tensor([[0.0], [1.0]]), torch.tensor([2.0, 0.5])
    log = Task(LabelColumn("watch", "regression", "log1p"), "huber")
    assert log.predictions(outputs, scale).tolist() == pytest.approx(np.expm1([2.0, 2.5]).tolist())
    assert log.losses(outputs, torch.tensor(np.expm1([2.0, 3.0])).float(), scale).tolist() == pytest.approx([0, 0.5])
    odds = Task(LabelColumn("watch", "regression"), "weighted_logistic")
    assert odds.predictions(outputs, torch.tensor([0.0, 8.0])).tolist() == pytest.approx([8.0, 8 * np.e])
    words = Task(LabelColumn("size", "ordinal", values=("s", "m", "l")), "ordinal")
    assert words.units(np.array([2.0, np.nan])).tolist() == pytest.approx([2, np.nan], nan_ok=True)
    assert words.predictions(torch.zeros(1, 3), ONE).tolist() == pytest.approx([1.0])


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"click": {}, "lik": {}}, r"objective\.tasks\.lik: no label of the dataset \(did you mean 'like'\?\); it has"),
        ({"like": {}}, r"objective\.tasks: 'click' is missing, the label that defines exposures"),
        ({"click": {"loss": "huber"}}, r"objective\.tasks\.click\.loss: 'huber': the label is binary; choose bce"),
        (
            {"click": {}, "watch": {"loss": "weighted_logistic"}},
            r"objective\.tasks\.watch\.loss: 'weighted_logistic' predicts the mean of the label itself",
        ),
    ],
)
def test_a_task_that_the_labels_do_not_allow_is_one_line(tasks: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_tasks(ObjectiveConfig(tasks=tasks).task_configs, task_shop.dataset().schema)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"data__context": ["devise"]},
            r"data\.context: 'devise': no context of the dataset \(did you mean 'device'\?\)",
        ),
        ({"objective__position_bias": ["price"]}, r"objective\.position_bias: 'price' is numeric; only categorical"),
        ({"data__context": ["place"], "objective__position_bias": ["place"]}, r"'place' is in data\.context too"),
        ({"objective__tasks": {"click": {"weights": 1}}}, r"objective\.tasks\.click\.weights: unknown"),
        ({"objective__tasks": {"click": {"weight": -1}}}, r"objective\.tasks\.click\.weight: -1: must be >= 0"),
        ({"objective__task_weighting": "uncertainty"}, r"'uncertainty' weighs several tasks; name them"),
        ({"objective__classification_weight": 0}, r"objective\.classification_weight: 0 without a generative loss"),
        ({"data__negative_rate": 0}, r"data\.negative_rate: 0(\.0)?: must be > 0"),
        ({"data__negative_rate": 1.5}, r"data\.negative_rate: 1\.5: must be"),
    ],
)
def test_mistakes_in_a_configuration_are_one_line(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    given = task_shop.SETTINGS | {"data__dataset": task_shop.dataset().root} | settings
    with pytest.raises(ConfigError, match=message):
        build_experiment(training_fixtures.config(tmp_path / "run", **given), init_distributed())


def step(tmp_path: Path, **settings: Any) -> tuple[Any, Any, Any]:
    given = task_shop.SETTINGS | {"data__dataset": task_shop.weighted().root, "objective__tasks": task_shop.TASKS}
    config = training_fixtures.config(tmp_path / "run", **(given | settings))
    experiment = build_experiment(config, init_distributed())
    batch = next(iter(experiment.loader("train", 6, training=True).batches(0)))
    return experiment, batch, experiment.model(batch)


def test_the_loss_is_the_weighted_sum_of_mean_losses_where_labels_are_defined(tmp_path: Path) -> None:
    experiment, batch, output = step(tmp_path)
    weights, total = LossWeights.of(experiment.config), 0.0
    start = 0
    for place, task in enumerate(experiment.hllm.tasks):
        own = output.outputs[:, start : start + task.outputs]
        start += task.outputs
        rows = [i for i in range(len(own)) if not torch.isnan(batch.task_labels[i, place])]
        offset = batch.logit_offset[rows, None] if place == 0 else 0.0
        scale = experiment.hllm.task_scales[place]
        losses = task.losses(own[rows] + offset, batch.task_labels[rows, place], scale)
        own_weights = batch.task_weights[rows, place]
        total += weights.tasks[task.name] * (losses @ own_weights / own_weights.sum()).item()
    loss, stats = micro_batch_loss(output, step_counts([batch]), weights, encodes_items=True)
    assert loss.item() == pytest.approx(total, rel=1e-5) and len(stats.tasks) == 4
    halves, counts = [], step_counts([batch, batch])
    for _ in range(2):
        halves.append(micro_batch_loss(experiment.model(batch), counts, weights, encodes_items=True)[0].item())
    assert sum(halves) == pytest.approx(total, rel=1e-5), "shares of two micro-batches add up"


def test_uncertainty_weighs_each_loss_by_a_learned_factor(tmp_path: Path) -> None:
    experiment, batch, output = step(tmp_path, objective__task_weighting="uncertainty")
    plain, _ = micro_batch_loss(output, step_counts([batch]), LossWeights.of(experiment.config), encodes_items=True)
    with torch.no_grad():
        experiment.hllm.task_log_variances.copy_(torch.tensor([0.5, -1.0, 0.0, 2.0]))
    again = experiment.model(batch)
    loss, stats = micro_batch_loss(again, step_counts([batch]), LossWeights.of(experiment.config), encodes_items=True)
    s, raw = [0.5, -1.0, 0.0, 2.0], stats.tasks
    by_name = {task.name: np.exp(-s[k]) * raw[k] + s[k] for k, task in enumerate(experiment.hllm.tasks)}
    expected = sum(LossWeights.of(experiment.config).tasks[name] * value for name, value in by_name.items())
    assert loss.item() == pytest.approx(expected, rel=1e-5) and loss.item() != pytest.approx(plain.item())
    loss.backward()
    gradient = experiment.hllm.task_log_variances.grad
    assert gradient is not None and gradient.abs().min() > 0


def test_the_offset_is_left_out_outside_of_training_and_scores_do_not_have_it(tmp_path: Path) -> None:
    single = {"objective__tasks": {}, "objective__generative_weight": 0}
    experiment, batch, output = step(tmp_path, **single)
    assert output.outputs is None and batch.logit_offset.max() == pytest.approx(np.log(4))
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        output.logits + batch.logit_offset, batch.labels, batch.weights, reduction="sum"
    )
    torch.testing.assert_close(output.tasks["click"].trained, expected)
    evaluated = next(iter(experiment.loader("train", 6).batches(0)))
    assert evaluated.logit_offset is None and evaluated.weights.max() > 2
