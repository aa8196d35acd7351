"""Mapping of the columns of prediction files to their roles, by options or by standard names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hllm_torchrec.evaluation.prediction_files import column_names, find_files, has_values

STANDARD_COLUMNS = {
    "label": "label",
    "weight": "weight",
    "user": "user_id",
    "item": "item_id",
    "timestamp": "timestamp",
    "history_length": "history_length",
    "item_is_cold": "item_is_cold",
}
"""Field of `ColumnLayout` → standard column, which is used if the first model's files have it."""

RAW = "raw_"
"""Prefix of the columns with probabilities before calibration."""

NONE = "NONE"
"""Value given instead of a column name to ignore the column even if the files have it."""


@dataclass(frozen=True)
class PredictionModel:
    """Files and columns of a model's scores."""

    name: str
    files: tuple[str | Path, ...]
    """Files with the same rows as the first model's files, in the same order unless rows are paired by key."""
    score: str = "score"
    probability: str | None = None
    """Column of probabilities, which may be the column of the scores; None: no metrics of probabilities."""


@dataclass(frozen=True)
class ColumnLayout:
    """Names of the other columns in the first model's files; None or empty: no such column."""

    label: str = "label"
    weight: str | None = None
    user: str | None = None
    item: str | None = None
    timestamp: str | None = None
    """Seconds UTC, or an Arrow timestamp; used for the slices by day and by hour of the day."""
    history_length: str | None = None
    item_is_cold: str | None = None
    slices: tuple[str, ...] = ()
    """Additional columns; each of their values is a slice."""
    tasks: dict[str, Literal["binary", "number"]] = field(default_factory=dict)
    """Additional tasks that the first model predicts, with columns `label_<task>` and `score_<task>`."""

    @property
    def all(self) -> list[str]:
        """Names of all columns that are set."""
        single = (self.label, self.weight, self.user, self.item, self.timestamp, self.history_length, self.item_is_cold)
        return [*filter(None, single), *self.slices, *map(label_of, self.tasks)]


def label_of(task: str) -> str:
    """Column of an additional task's label."""
    return f"label_{task}"


def task_columns(task: str, kind: str) -> tuple[str, str]:
    """(column of an additional task's score, column of its prediction)."""
    return f"score_{task}", f"{'probability' if kind == 'binary' else 'prediction'}_{task}"


def find_tasks(columns: Sequence[str]) -> dict[str, Literal["binary", "number"]]:
    """Additional task -> kind, for the tasks whose columns are in `columns`."""
    found: dict[str, Literal["binary", "number"]] = {}
    kinds: tuple[Literal["binary", "number"], ...] = ("binary", "number")
    for column in columns:
        task = column.removeprefix("label_")
        for kind in kinds:
            if column != task and {*task_columns(task, kind)} <= set(columns):
                found[task] = kind
    return found


def describe_predictions(
    paths: Mapping[str, str | Path],
    *,
    scores: Mapping[str, str] | None = None,
    probabilities: Mapping[str, str] | None = None,
    columns: Mapping[str, str] | None = None,
    slices: Sequence[str] = (),
) -> tuple[list[PredictionModel], ColumnLayout]:
    """Models and column layout of prediction files, from the given names and the columns of the files.

    Args:
        paths: model → its files; the first model's contain the columns that models share.
        scores: model → column, if it is not `score`.
        probabilities: model → column, if it is not `probability`, or `NONE`.
        columns: field of `ColumnLayout` → column, or `NONE`.
        slices: additional columns; each of their values is a slice.

    Raises:
        ValueError: the files do not exist, or there is no column of labels.
    """
    files = {name: find_files([path]) for name, path in paths.items()}
    models = []
    for name, path in paths.items():
        score, probability = (scores or {}).get(name, "score"), (probabilities or {}).get(name)
        if probability is None and score == "score" and has_values(files[name], "probability"):
            probability = "probability"  # if the score has a different name, `probability` may belong to another model
        models.append(PredictionModel(name, (path,), score, None if probability == NONE else probability))
        # A calibrated run is listed with its probabilities after and before calibration; its scores are the same.
        if probability == "probability" and has_values(files[name], f"{RAW}probability"):
            models.append(PredictionModel(f"{name} (not calibrated)", (path,), score, f"{RAW}probability"))
    found = column_names(next(iter(files.values()))[0])
    usual = {field: column for field, column in STANDARD_COLUMNS.items() if column in found}
    named = {field: column for field, column in (usual | dict(columns or {})).items() if column != NONE}
    if "label" not in named:
        file = next(iter(files.values()))[0]
        raise ValueError(
            f"{file}: no column 'label'; it has {', '.join(found)}; name the column of labels with --label"
        )
    return models, ColumnLayout(**named, slices=tuple(slices), tasks=find_tasks(found))
