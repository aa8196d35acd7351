"""Which columns of prediction files are what: named by options, or found by their usual names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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
"""Field of `ColumnLayout` → the column that is taken for it if the first model's files have it."""

NONE = "NONE"
"""Given for a column: there is none, whatever the files have."""


@dataclass(frozen=True)
class PredictionModel:
    """Where a model's scores are."""

    name: str
    files: tuple[str | Path, ...]
    """Of the same rows in the same order as the first model's."""
    score: str = "score"
    probability: str | None = None
    """Column of probabilities, which may be the score's; None: the metrics of probabilities are left out."""


@dataclass(frozen=True)
class ColumnLayout:
    """Names of the other columns, in the first model's files; None or empty: there is none."""

    label: str = "label"
    weight: str | None = None
    user: str | None = None
    item: str | None = None
    timestamp: str | None = None
    """Seconds UTC, or an Arrow timestamp: gives the slices by day and by hour of the day."""
    history_length: str | None = None
    item_is_cold: str | None = None
    slices: tuple[str, ...] = ()
    """Further columns, a slice for each of their values."""

    @property
    def all(self) -> list[str]:
        """All columns that are there."""
        single = (self.label, self.weight, self.user, self.item, self.timestamp, self.history_length, self.item_is_cold)
        return [name for name in (*single, *self.slices) if name]


def describe_predictions(
    paths: Mapping[str, str | Path],
    *,
    scores: Mapping[str, str] | None = None,
    probabilities: Mapping[str, str] | None = None,
    columns: Mapping[str, str] | None = None,
    slices: Sequence[str] = (),
) -> tuple[list[PredictionModel], ColumnLayout]:
    """Models and columns of prediction files, from the names given and the files' own.

    Args:
        paths: model → its files; the first model's hold what models share.
        scores, probabilities: model → column, where it is not the usual one or is `NONE`.
        columns: field of `ColumnLayout` → column, or `NONE`.
        slices: further columns, a slice for each of their values.

    Raises:
        ValueError: no such files, or no column of labels.
    """
    files = {name: find_files([path]) for name, path in paths.items()}
    models = []
    for name, path in paths.items():
        score, probability = (scores or {}).get(name, "score"), (probabilities or {}).get(name)
        if probability is None and score == "score" and has_values(files[name], "probability"):
            probability = "probability"  # that of a score of another name may be another
        models.append(PredictionModel(name, (path,), score, None if probability == NONE else probability))
    found = column_names(next(iter(files.values()))[0])
    usual = {field: column for field, column in STANDARD_COLUMNS.items() if column in found}
    named = {field: column for field, column in (usual | dict(columns or {})).items() if column != NONE}
    if "label" not in named:
        raise ValueError(f"no column 'label'; it has {', '.join(found)}; name the column of labels with --label")
    return models, ColumnLayout(**named, slices=tuple(slices))
