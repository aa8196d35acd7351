"""Metrics of a model's additional tasks, from the columns `label_<task>` and `score_<task>` of its predictions.

A task with a column `probability_<task>` is binary: it gets the metrics of the first label, computed on the rows where
the task's label is defined. A task with a column `prediction_<task>` predicts a number: it gets MAE, RMSE, Spearman's
correlation and XAUC. The rows are read (and paired) once for all tasks.
"""

from typing import Any, Protocol

import numpy as np

from hllm_torchrec.common.arrays import Doubles
from hllm_torchrec.distributed.array_collectives import gather_objects, group_rank, world_size
from hllm_torchrec.evaluation.label_evaluation import LabelEvaluation
from hllm_torchrec.evaluation.metrics_schema import finite_or_none
from hllm_torchrec.evaluation.prediction_rows import PredictionRows
from hllm_torchrec.evaluation.row_batch import RowBatch
from hllm_torchrec.evaluation.spooled_rows import Spool, SpooledRows
from hllm_torchrec.metrics.number_metrics import NumberSums, number_metrics

IN_BINARY = ("rows", "users", "reference", "weighted", "models", "paired")
"""Keys of the first label's block that a binary task's block also has."""

ROW_BYTES = 128
"""Bytes per row for the computation of Spearman's correlation and XAUC, including temporary memory of sorting."""


class TaskEvaluation(Protocol):
    """Computes the block of `metrics.json` for an additional task, from rows that are added once."""

    def add(self, start: int, rows: Any) -> None:
        """Add rows as in `ReadRows.tasks`."""

    def metrics(self) -> dict[str, Any]:
        """The task's block. Collective."""


def task_evaluation(source: PredictionRows, task: str, spool: Spool) -> TaskEvaluation:
    """Create the evaluation of a task of the rows `source`."""
    own = source.of_task(task)
    return BinaryTask(own, spool) if source.layout.tasks[task] == "binary" else NumberTask(own, spool)


class BinaryTask:
    """Metrics of all models on the label of a binary task: those of the first label, without bootstrap and curves.

    `add` only stores the rows. `metrics` evaluates them, so the tasks are evaluated one after the other, and each can
    use all of the memory.
    """

    def __init__(self, source: PredictionRows, spool: Spool) -> None:
        self.source, self.spool = source, spool
        self._rows = SpooledRows(spool)

    def add(self, start: int, rows: RowBatch) -> None:
        """Store rows for `metrics`."""
        self._rows.add(start, rows)

    def metrics(self) -> dict[str, Any]:
        """The task's block. Collective."""
        evaluation = LabelEvaluation(self.source, self.spool, self._rows)
        for start, rows in self._rows:
            evaluation.add(start, rows)
        found = evaluation.metrics()
        return {"kind": "binary"} | {name: found[name] for name in IN_BINARY}


class NumberTask:
    """Metrics of all models on a task that predicts numbers.

    For Spearman's correlation and XAUC every rank gathers all rows. If they do not fit into the memory, these two
    metrics are computed on a uniform sample of the rows. MAE, RMSE and means are always computed on all rows.
    """

    def __init__(self, source: PredictionRows, spool: Spool) -> None:
        self.names, self.weighted = [model.name for model in source.models], source.weighted
        self._most = max(1, spool.memory // ROW_BYTES)
        self._random = np.random.default_rng((0, group_rank()))
        self._rows, self._places = np.empty((0, 2 + len(self.names))), np.empty(0)
        self._parts: list[tuple[Doubles, Doubles]] = []
        self._share = 1.0
        self._sums = NumberSums(len(self.names))

    def add(self, start: int, rows: Doubles) -> None:
        """Add rows: label, weight and each model's prediction."""
        self._sums.add(rows)
        places = self._random.random(len(rows))
        self._parts.append((rows[places < self._share], places[places < self._share]))
        if sum(len(part) for part, _ in self._parts) + len(self._rows) > self._most // world_size():
            self._join()

    def _join(self, share: float = 1.0) -> None:
        """Concatenate the parts; if there are too many rows, halve the share of rows in the sample until they fit."""
        parts = [(self._rows, self._places), *self._parts]
        self._rows, self._places = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        self._parts, self._share = [], min(self._share, share)
        while (kept := self._places < self._share).sum() > self._most // world_size():
            self._share /= 2
        self._rows, self._places = self._rows[kept], self._places[kept]

    def metrics(self) -> dict[str, Any]:
        """The task's block. Collective."""
        self._join()
        self._join(min(gather_objects(self._share)))
        every = np.concatenate(gather_objects(self._rows))
        sums = self._sums.over_ranks()
        labels, weights, models = every[:, 0], every[:, 1] if self.weighted else None, {}
        for place, name in enumerate(self.names):
            found = number_metrics(labels, every[:, 2 + place], weights)
            if self._share < 1:
                found |= sums.means(place)
            models[name] = {key: finite_or_none(value) for key, value in found.items()}
        head = {"kind": "number", "rows": sums.rows, "reference": self.names[0], "weighted": self.weighted}
        return head | ({"rows_ranked": len(every)} if self._share < 1 else {}) | {"models": models}
