"""Metrics of a model's further tasks, from the columns `label_<task>` and `score_<task>` of its predictions.

A task with a column `probability_<task>` is binary and gets the metrics of the first label, on the rows where its label
is defined; one with `prediction_<task>` predicts a number and gets MAE, RMSE, Spearman's correlation and XAUC. All
tasks share one reading (and pairing) of the rows.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from hllm_torchrec.distributed.array_collectives import gather_objects, group_rank, world_size
from hllm_torchrec.evaluation.metrics_schema import finite_or_none
from hllm_torchrec.evaluation.offline_evaluation import EvaluationSettings, evaluate_predictions
from hllm_torchrec.evaluation.prediction_rows import PredictionRows
from hllm_torchrec.metrics.number_metrics import number_metrics

_READ_ROWS = 1 << 18


def evaluate_tasks(rows: PredictionRows, settings: EvaluationSettings) -> dict[str, Any]:
    """Task -> its kind, rows and metrics by model; for binary tasks with the paired differences. Collective.

    Raises:
        ValueError: a bad value, with its file and row.
    """
    found: dict[str, Any] = {}
    for task, kind in rows.layout.tasks.items():
        own = rows.of_task(task)
        if kind == "binary":
            metrics = evaluate_predictions(own, replace(settings, draws=0))
            kept = ("rows", "users", "reference", "weighted", "models", "paired")
            found[task] = {"kind": kind} | {name: metrics[name] for name in kept}
        else:
            found[task] = {"kind": kind} | _numbers(own, task)
    return found


def _numbers(rows: PredictionRows, task: str) -> dict[str, Any]:
    names = [model.name for model in rows.models]
    parts: list[np.ndarray] = [np.empty((0, 2 + len(names)))]
    parts += rows.numbers(group_rank(), world_size(), _READ_ROWS)
    every = np.concatenate(gather_objects(np.concatenate(parts)))  # Spearman and XAUC need all rows: 8 bytes a value
    labels, weights = every[:, 0], every[:, 1]
    models = {}
    for place, name in enumerate(names, start=2):
        metrics = number_metrics(labels, every[:, place], weights if rows.weighted else None)
        models[name] = {key: finite_or_none(value) for key, value in metrics.items()}
    return {"rows": len(labels), "reference": names[0], "weighted": rows.weighted, "models": models}
