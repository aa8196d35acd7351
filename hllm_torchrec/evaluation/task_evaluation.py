"""Metrics of a model's further tasks, from the columns `label_<task>` and `score_<task>` of its predictions.

A task with a column `probability_<task>` is binary and gets the metrics of the first label, on the rows where its label
is defined; one with `prediction_<task>` predicts a number and gets MAE, RMSE, Spearman's correlation and XAUC. All
tasks share one reading (and pairing) of the rows.
"""

from typing import Any, Protocol

import numpy as np

from hllm_torchrec.common.arrays import Doubles
from hllm_torchrec.distributed.array_collectives import Group, gather_objects
from hllm_torchrec.evaluation.label_evaluation import LabelEvaluation
from hllm_torchrec.evaluation.metrics_schema import finite_or_none
from hllm_torchrec.evaluation.prediction_rows import PredictionRows, RowBatch
from hllm_torchrec.evaluation.spooled_rows import Spool, SpooledRows
from hllm_torchrec.metrics.number_metrics import number_metrics

IN_BINARY = ("rows", "users", "reference", "weighted", "models", "paired")
"""Keys of a binary task's block, as they are of the first label."""


class TaskEvaluation(Protocol):
    """Takes the rows of a further task once, and says what is in its block of `metrics.json`."""

    def add(self, start: int, rows: Any) -> None:
        """Add rows as in `ReadRows.tasks`."""

    def metrics(self) -> dict[str, Any]:
        """The task's block. Collective."""


def task_evaluation(source: PredictionRows, task: str, spool: Spool, group: Group = None) -> TaskEvaluation:
    """The evaluation of a task among the rows `source`."""
    own = source.of_task(task)
    return BinaryTask(own, spool, group) if source.layout.tasks[task] == "binary" else NumberTask(own, group)


class BinaryTask:
    """Metrics of all models on the label of a binary task: those of the first label, without bootstrap and curves.

    The rows are kept while they are read, and evaluated afterwards, each task alone with the whole memory.
    """

    def __init__(self, source: PredictionRows, spool: Spool, group: Group = None) -> None:
        self.source, self.spool, self.group = source, spool, group
        self._rows = SpooledRows(spool)

    def add(self, start: int, rows: RowBatch) -> None:
        """Keep rows."""
        self._rows.add(start, rows)

    def metrics(self) -> dict[str, Any]:
        """The task's block. Collective."""
        evaluation = LabelEvaluation(self.source, self.spool, self._rows, group=self.group)
        for start, rows in self._rows:
            evaluation.add(start, rows)
        found = evaluation.metrics()
        return {"kind": "binary"} | {name: found[name] for name in IN_BINARY}


class NumberTask:
    """Metrics of all models on a task that predicts numbers."""

    def __init__(self, source: PredictionRows, group: Group = None) -> None:
        self.names, self.weighted, self.group = [model.name for model in source.models], source.weighted, group
        self._parts: list[Doubles] = [np.empty((0, 2 + len(self.names)))]

    def add(self, start: int, rows: Doubles) -> None:
        """Add rows: label, weight and each model's prediction."""
        self._parts.append(rows)

    def metrics(self) -> dict[str, Any]:
        """The task's block. Collective."""
        # Spearman and XAUC need all rows: 8 bytes a value.
        every = np.concatenate(gather_objects(np.concatenate(self._parts), self.group))
        labels, weights = every[:, 0], every[:, 1]
        models = {}
        for place, name in enumerate(self.names, start=2):
            found = number_metrics(labels, every[:, place], weights if self.weighted else None)
            models[name] = {key: finite_or_none(value) for key, value in found.items()}
        head = {"kind": "number", "rows": len(labels), "reference": self.names[0], "weighted": self.weighted}
        return head | {"models": models}
