"""Tasks of a model: labels to predict, each with a loss, a weight and the conversion of outputs to predictions.

`resolve_tasks` combines `objective.tasks` with the labels that the dataset declares. Values of a task that are computed
from the training part (mean and deviation of a regression) are buffers of the model, so checkpoints contain them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hllm_torchrec.common.errors import ConfigError, did_you_mean
from hllm_torchrec.config.objective import ObjectiveConfig, TaskConfig
from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.event_schema import EventSchema, LabelColumn
from hllm_torchrec.modules.losses.task_losses import ROW_LOSSES, TaskLoss, expected_class

LOSSES_OF_KIND = {"binary": ("bce",), "ordinal": ("ordinal",), "regression": ("huber", "weighted_logistic")}
"""Kind of a label -> losses for this kind, the default first."""


@dataclass(frozen=True)
class Task:
    """A label, its loss and its weight in L_cls.

    start: initial values of the outputs [O]; center, scale: the loss of a regression gets (label - center) / scale; a
    label that has a transform is transformed first.
    """

    label: LabelColumn
    loss: str = "bce"
    weight: float = 1.0
    start: tuple[float, ...] = (0.0,)
    center: float = 0.0
    scale: float = 1.0

    @property
    def name(self) -> str:
        """The label's name."""
        return self.label.name

    @property
    def is_binary(self) -> bool:
        """True if the output is the logit of a probability."""
        return self.loss == "bce"

    @property
    def outputs(self) -> int:
        """Number O of outputs of the head."""
        return len(self.label.values) if self.loss == "ordinal" else 1

    @property
    def values(self) -> tuple[float, ...]:
        """Numbers of an ordinal label's classes: the values themselves, or their indices if they are texts."""
        values = self.label.values
        is_numeric = all(type(value) in (int, float) for value in values)
        return tuple(map(float, values)) if is_numeric else tuple(range(len(values)))

    def losses(self, outputs: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        """Loss [X] of each exposure; scale: [2], center and scale of this task from the model's buffer."""
        if self.label.kind == "regression":
            labels = (_transformed(labels, self.label) - scale[0]) / scale[1]
        return ROW_LOSSES[self.loss](outputs, labels)

    def predictions(self, outputs: Tensor, scale: Tensor) -> Tensor:
        """Predictions [X] from the outputs [X, O]: probabilities, or numbers in the label's unit."""
        if self.is_binary:
            return torch.sigmoid(outputs[:, 0])
        if self.loss == "ordinal":
            return expected_class(outputs, torch.tensor(self.values))
        found = outputs[:, 0].exp() if self.loss == "weighted_logistic" else outputs[:, 0]
        found = found * scale[1] + scale[0]
        return torch.expm1(found) if self.label.transform == "log1p" else found

    def scores(self, outputs: Tensor) -> Tensor:
        """Scores [X] with the same order as the predictions, but without saturation."""
        return expected_class(outputs, torch.tensor(self.values)) if self.loss == "ordinal" else outputs[:, 0]

    def units(self, labels: NDArray[Any]) -> NDArray[Any]:
        """Convert stored labels [X] to the unit of the predictions."""
        if self.loss != "ordinal":
            return labels
        known = np.isfinite(labels)
        return np.where(known, np.array(self.values)[np.where(known, labels, 0).astype(np.int64)], np.nan)


def _transformed(labels: Tensor, label: LabelColumn) -> Tensor:
    return torch.log1p(labels) if label.transform == "log1p" else labels


def task_losses(
    tasks: Sequence[Task], batch: HybridBatch, outputs: Tensor, scales: Tensor, log_variances: Tensor | None
) -> dict[str, TaskLoss]:
    """Return task name -> weighted sum of the task's losses over the exposures for which its label is defined.

    Args:
        outputs: [X, O] outputs of all tasks.
        scales: [tasks, 2] see `Task.losses`.
        log_variances: [tasks] learned s of the uncertainty weighting exp(-s) L + s; None: no such weighting.
    """
    assert batch.task_labels is not None and batch.task_weights is not None, "the batch has no labels of tasks"
    found, start = {}, 0
    for k, task in enumerate(tasks):
        predicted = outputs[:, start : start + task.outputs]
        start += task.outputs
        if k == 0 and batch.logit_offset is not None:
            predicted = predicted + batch.logit_offset[:, None]
        weights = batch.task_weights[:, k]
        # An undefined label is NaN, and NaN times its weight 0 would be NaN, so replace it before the loss.
        losses = task.losses(predicted, batch.task_labels[:, k].nan_to_num(), scales[k])
        raw = (losses * weights).sum()
        trained = raw
        if log_variances is not None:
            # s is added per unit of weight: after division by the global weight, it is added once per step.
            log_variance = log_variances[k]
            trained = (-log_variance).exp() * raw + log_variance * weights.sum()
        found[task.name] = TaskLoss(raw.detach(), trained)
    return found


PLACE = "objective.tasks"
"""Setting of a model's tasks, in messages."""


def task_problems(tasks: Mapping[str, TaskConfig], schema: EventSchema, setting: str = PLACE) -> list[str]:
    """One message for each entry of `setting` that the dataset's labels do not allow."""
    problems, known = [], schema.label_names
    for name, task in tasks.items():
        place = f"{setting}.{name}"
        if name not in known:
            problems.append(f"{place}: no label of the dataset{did_you_mean(name, known)}; it has {', '.join(known)}")
            continue
        kind = schema.label(name).kind
        if task.loss not in ("auto", *LOSSES_OF_KIND[kind]):
            allowed = ", ".join(LOSSES_OF_KIND[kind])
            problems.append(f"{place}.loss: {task.loss!r}: the label is {kind}; choose {allowed}, or leave it out")
        if task.loss == "weighted_logistic" and schema.label(name).transform is not None:
            problems.append(
                f"{place}.loss: 'weighted_logistic' predicts the mean of the label itself, which the dataset declares "
                "with a transform; prepare it without one, or choose huber"
            )
    if tasks and known[0] not in tasks:
        problems.append(
            f"{setting}: {known[0]!r} is missing, the label that defines exposures and selects the checkpoint; "
            "add it (weight: 0 leaves its loss out)"
        )
    return problems


def resolve_tasks(tasks: Mapping[str, TaskConfig], schema: EventSchema, setting: str = PLACE) -> tuple[Task, ...]:
    """The tasks of a configuration on a dataset, the first label's task first; without tasks, only the first label.

    Raises:
        ConfigError: see `task_problems`.
    """
    if problems := task_problems(tasks, schema, setting):
        raise ConfigError(problems)
    if not tasks:
        return (Task(schema.labels[0]),)
    found = []
    for name, config in tasks.items():
        label = schema.label(name)
        loss = LOSSES_OF_KIND[label.kind][0] if config.loss == "auto" else config.loss
        task = Task(label, loss, config.weight)
        found.append(replace(task, start=(0.0,) * task.outputs))
    return tuple(sorted(found, key=lambda task: task.name != schema.labels[0].name))


def fit_tasks(tasks: Sequence[Task], dataset: Dataset, since: int = 0, setting: str = PLACE) -> tuple[Task, ...]:
    """The tasks with start, center and scale computed from the training exposures from second `since` on.

    Raises:
        ConfigError: a label of a weighted logistic regression is below 0.
    """
    schema, columns = dataset.schema, ["labels", "timestamps"]
    columns += [task.label.column for task in tasks if task.name != schema.labels[0].name]
    parts: list[list[NDArray[Any]]] = [[] for _ in tasks]
    for events in dataset.recent("train", since, columns):
        for part, task in zip(parts, tasks, strict=True):
            values = schema.label_values(task.name, events.labels, events.extra)
            part.append(values[~np.isnan(values)])
    known = [np.concatenate([np.zeros(0), *part]) for part in parts]
    return tuple(_fitted(task, values, setting) for task, values in zip(tasks, known, strict=True))


def _fitted(task: Task, values: NDArray[Any], setting: str) -> Task:
    """The task with start, center and scale computed from its training labels `values` [n]."""
    if not values.size:
        return task
    if task.is_binary:
        rate = float(values.mean())
        return replace(task, start=(math.log(rate / (1 - rate)) if 0 < rate < 1 else 0.0,))
    if task.loss == "ordinal":
        counts = np.bincount(values.astype(np.int64), minlength=task.outputs) + 1.0
        return replace(task, start=tuple(np.log(counts / counts.sum()).tolist()))
    if task.loss == "weighted_logistic":
        if values.min() < 0:
            raise ConfigError(
                f"{setting}.{task.name}.loss: 'weighted_logistic': a label is {values.min():g}, below 0, and this loss "
                "predicts labels as odds; choose huber"
            )
        return replace(task, scale=float(values.mean()) or 1.0)
    numbers = np.log1p(values) if task.label.transform == "log1p" else values
    return replace(task, center=float(numbers.mean()), scale=float(numbers.std()) or 1.0)


def binary_outputs(tasks: Sequence[Task]) -> list[int]:
    """Index of the output of each binary task (its logit) among the outputs of all tasks."""
    starts = np.cumsum([0, *(task.outputs for task in tasks)]).tolist()
    return [start for start, task in zip(starts, tasks, strict=False) if task.is_binary]


def is_single(tasks: Sequence[Task], objective: ObjectiveConfig) -> bool:
    """True if there is one binary task with weight 1 and no experts, as without `objective.tasks`."""
    only = tasks[0]
    return len(tasks) == 1 and only.is_binary and only.weight == 1.0 and objective.towers == "shared_bottom"
