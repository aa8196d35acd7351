"""Comparison of models on the same exposures: from prediction files to the content of `metrics.json` and a table."""

import resource
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hllm_torchrec.distributed.array_collectives import gather_objects
from hllm_torchrec.evaluation.offline_evaluation import EvaluationSettings, evaluate_predictions
from hllm_torchrec.evaluation.prediction_files import unchanged_files
from hllm_torchrec.evaluation.prediction_layout import ColumnLayout, PredictionModel, describe_predictions
from hllm_torchrec.evaluation.prediction_rows import PredictionRows, known_items
from hllm_torchrec.evaluation.sanity_checks import Overlap, file_overlap

SHOWN = {"mae": "MAE", "rmse": "RMSE", "spearman": "Spearman", "xauc": "XAUC"}
"""Key of a metric of predicted numbers -> its name in the table."""


def compare(
    predictions: Mapping[str, str | Path], *, split: str = "test", draws: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Metrics of every model and its difference from the first, from predictions of this library. Collective.

    Args:
        predictions: model → directory of its predictions. All models must have scored the same exposures, which are
            paired by user and position, in any order.
        split: name of the split, copied to the result.
        draws: resamples of the bootstrap over users, 0 for none.
        seed: seed of the bootstrap.

    Returns:
        The content of `metrics.json`, see `docs/evaluation.md`; the same on every rank.

    Raises:
        ValueError: unreadable predictions; models with different exposures, or with different labels or items for the
            same exposure.
    """
    with unchanged_files(predictions.values()):
        models, layout = describe_predictions(predictions)
        return evaluate_files(models, layout, EvaluationSettings(split, draws=draws, seed=seed), paired=True)[0]


def evaluate_files(
    models: Sequence[PredictionModel],
    layout: ColumnLayout,
    settings: EvaluationSettings,
    *,
    paired: bool,
    train: Sequence[str] = (),
    item_events: np.ndarray | None = None,
) -> tuple[dict[str, Any], Overlap | None]:
    """Evaluate prediction files on all ranks. Collective; the same result on every rank.

    Args:
        paired: exposures are paired by user and position, else by their row in the files.
        train: files of training exposures. Without a column `item_is_cold`, items that are not in these files are cold.
        item_events: see `PredictionRows`.

    Returns:
        The content of `metrics.json`, and the overlap of the exposures with `train`, or None without `train`.

    Raises:
        ValueError: a bad value; the message names its file and row.
    """
    with tempfile.TemporaryDirectory(prefix="hllm-files-", dir=settings.spill) as name:
        folder = Path(name)
        warm = known_items(train, layout.item, folder) if train and layout.item else None
        rows = PredictionRows(
            models, layout, folder, warm, paired=paired, memory=settings.memory, item_events=item_events
        )
        metrics = evaluate_predictions(rows, settings)
        overlap = file_overlap(models[0].files, train, layout, settings.memory, folder) if train else None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    metrics["memory"]["peak"] = max(gather_objects(peak))
    return metrics, overlap


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """A short table for the terminal: one line per model, best AUC first.

    The interval of the AUC is DeLong's (rows as independent); that of the difference has users as independent units.
    """
    reference = metrics["reference"]
    header = ("model", "AUC [95%]", f"difference to {reference} [95% by users]", "GAUC", "log loss")
    lines: list[tuple[str, ...]] = [header]
    for name, model in sorted(metrics["models"].items(), key=lambda entry: -(entry[1]["auc"] or 0.0)):
        paired = metrics["paired"].get(name)
        lines.append(
            (
                name,
                format_with_interval(model["auc"], model["auc_low"], model["auc_high"]),
                "reference"
                if paired is None
                else format_with_interval(paired["difference"], *by_users(paired), signed=True),
                format_number(model["gauc"]),
                format_number(model["log_loss"]),
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    lines.insert(1, tuple("-" * width for width in widths))
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    users = "" if metrics["users"] is None else f" of {metrics['users']:,} users"
    text += _task_lines(metrics.get("tasks", {}))
    caption = f"{metrics['split']}: {metrics['rows']:,} exposures{users}"
    return "\n".join([caption, *text])


def _task_lines(tasks: Mapping[str, Any]) -> list[str]:
    """A line for each further task and model."""
    lines = []
    for task, block in tasks.items():
        for name, model in block["models"].items():
            if block["kind"] == "binary":
                interval = format_with_interval(model["auc"], model["auc_low"], model["auc_high"])
                numbers = (
                    f"AUC {interval}, GAUC {format_number(model['gauc'])}, log loss {format_number(model['log_loss'])}"
                )
            else:
                shown = ("mae", "rmse", "spearman", "xauc")
                numbers = ", ".join(f"{SHOWN[key]} {format_number(model[key])}" for key in shown)
            lines.append(f"task {task}, {name}: {numbers} ({block['rows']:,} rows)")
    return lines


def format_number(value: float | None, signed: bool = False) -> str:
    """Four decimals, or `n/a` for an undefined metric."""
    return "n/a" if value is None else f"{value:+.4f}" if signed else f"{value:.4f}"


def format_interval(low: float | None, high: float | None, signed: bool = False) -> str:
    """`[low, high]`, or `n/a` without an interval."""
    return "n/a" if low is None or high is None else f"[{format_number(low, signed)}, {format_number(high, signed)}]"


def format_with_interval(value: float | None, low: float | None, high: float | None, signed: bool = False) -> str:
    """`value [low, high]`, or only the value without an interval."""
    text = format_number(value, signed)
    return text if low is None or high is None else f"{text} {format_interval(low, high, signed)}"


def by_users(block: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """The interval with users as independent units: the bootstrap's if there is one, else the formula's."""
    kind = "bootstrap" if block.get("bootstrap_low") is not None else "clustered"
    return block.get(f"{kind}_low"), block.get(f"{kind}_high")
