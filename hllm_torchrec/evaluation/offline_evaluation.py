"""Distributed offline evaluation of one or more models on the same rows; produces `metrics.json`.

The rows are read once, for the first label and all further tasks together.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hllm_torchrec.distributed.array_collectives import gather_objects, group_rank, world_size
from hllm_torchrec.evaluation.label_evaluation import LabelEvaluation
from hllm_torchrec.evaluation.metrics_schema import SCHEMA_VERSION
from hllm_torchrec.evaluation.prediction_rows import MEMORY, PredictionRows
from hllm_torchrec.evaluation.spooled_rows import Spool
from hllm_torchrec.evaluation.task_evaluation import TaskEvaluation, task_evaluation

MIN_MEMORY = 1 << 16


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of `evaluate_predictions`."""

    split: str = "test"
    memory: int = MEMORY
    """Bytes for rows per rank; interpreter and libraries (about 0.4 GB) are additional."""
    draws: int = 0
    """Resamples of the bootstrap over users; 0: none."""
    seed: int = 0
    spill: str | None = None
    """Directory for spilled rows; None: the system's temporary directory."""


def evaluate_predictions(source: PredictionRows, settings: EvaluationSettings) -> dict[str, Any]:
    """Evaluate all models; `docs/evaluation.md` describes the keys. Collective; the same result on every rank.

    Raises:
        ValueError: a bad value, with its file and row; raised on every rank.
    """
    if settings.memory < MIN_MEMORY:
        raise ValueError(f"memory is {settings.memory} bytes; at least {MIN_MEMORY} are needed, 1 GiB is usual")
    if settings.draws < 0:
        raise ValueError(f"draws is {settings.draws}; 0 for no bootstrap, 1000 is usual")
    with tempfile.TemporaryDirectory(prefix="hllm-evaluate-", dir=settings.spill) as folder:
        spool = Spool(settings.memory, Path(folder))
        first = LabelEvaluation(source, spool, draws=settings.draws, seed=settings.seed)
        tasks = {task: task_evaluation(source, task, spool) for task in source.layout.tasks}
        _read(source, first, tasks, spool.read_rows)
        metrics = {"schema_version": SCHEMA_VERSION, "split": settings.split} | first.metrics()
        blocks = {task: one.metrics() for task, one in tasks.items()}
        spilled = sum(gather_objects(spool.spilled + source.spilled))
    metrics["memory"] = {"limit": settings.memory, "spilled": spilled}
    return metrics | ({"tasks": blocks} if tasks else {})


def _read(source: PredictionRows, first: LabelEvaluation, tasks: Mapping[str, TaskEvaluation], size: int) -> None:
    """Read the rank's share of the rows once. An error on one rank is raised on all ranks. Collective."""
    problem = None
    try:
        for rows in source.read(group_rank(), world_size(), size):
            first.add(rows.start, rows.first)
            for task, one in tasks.items():
                one.add(rows.start, rows.tasks[task])
    except ValueError as error:
        problem = str(error)
    # Every rank gathers, also one that failed: the others learn of the error here, so that none waits in a collective.
    if problems := [text for text in gather_objects(problem) if text]:
        raise ValueError(problems[0])
