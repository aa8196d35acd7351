"""Report of a run: one self-contained HTML page that loads nothing from the network.

The template of the page is `report.html.j2`; this module computes its contents.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from hllm_torchrec.common.atomic_files import replace_file
from hllm_torchrec.common.errors import without_credentials
from hllm_torchrec.evaluation.metrics_schema import read_fields, read_metrics
from hllm_torchrec.evaluation.model_comparison import SHOWN, by_users, format_interval, format_number
from hllm_torchrec.evaluation.report_figures import Series
from hllm_torchrec.evaluation.report_sections import (
    curve_figures,
    paired_figure,
    slice_parts,
    time_figure,
    training_figures,
)
from hllm_torchrec.metrics.metric import ProbabilityMetric
from hllm_torchrec.metrics.registry import METRICS

LOSSES = {"loss": "loss", "loss_cls": "classification loss", "loss_gen": "generative loss"}

Table = tuple[Sequence[str], list[Sequence[str]]]
"""(header, rows), all cells as text."""


@dataclass
class TrainingLog:
    """Contents of a training log (`log.jsonl`)."""

    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Step → its last line in the log; a resumed run logs some steps again."""
    evaluations: dict[tuple[str, int], float] = field(default_factory=dict)
    """(split, step) → the last logged AUC."""
    unreadable: list[int] = field(default_factory=list)
    """Numbers of the lines that are not JSON objects with an event, such as an incomplete line of a killed run."""


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run directory from the files in it.

    The files are `metrics.json`, `log.jsonl` (lines `{"event": "step", "step", "loss", "loss_cls", "loss_gen"}` and
    `{"event": "eval", "step", "split", "auc"}`; others are ignored) and `config.yaml`. Sections of missing files are
    omitted.

    Returns:
        The path of the report.

    Raises:
        ValueError: the directory has neither metrics nor a log, or its `metrics.json` is damaged, has an unsupported
            schema version or does not have a required field.
    """
    run_dir = Path(run_dir)
    file, config = run_dir / "metrics.json", run_dir / "config.yaml"
    metrics = read_metrics(file) if file.is_file() else {}
    log = read_training_log(run_dir / "log.jsonl")
    if not metrics and not log.steps and not log.evaluations:
        raise ValueError(
            f"{run_dir} has neither metrics.json nor a log.jsonl with steps; train or evaluate into it first"
        )
    losses = [series for key, name in LOSSES.items() if (series := _step_series(log, key, name))]
    aucs = _auc_series(log)
    shown: dict[str, Any] = {
        "title": run_dir.resolve().name,
        "metrics": metrics,
        "training": training_figures(losses, aucs),
        "training_note": _training_note(log, aucs),
        "configuration": config.read_text(encoding="utf-8", errors="replace") if config.is_file() else None,
    }
    with read_fields(file):
        shown["provenance"] = _flatten(metrics.get("provenance") or {})
        shown["retrieval_table"] = _retrieval_table(metrics.get("retrieval") or {})
        page = _template().render(shown | _model_parts(metrics))
    path = run_dir / "report.html"
    replace_file(path, without_credentials(page))
    return path


@cache
def _template() -> Template:
    loader = PackageLoader("hllm_torchrec", "evaluation")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template("report.html.j2")


def read_training_log(path: Path) -> TrainingLog:
    """Read the steps and evaluations of a `log.jsonl`; empty if the file does not exist."""
    log = TrainingLog()
    if not path.is_file():
        return log
    for line_number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            event, step = entry["event"], int(entry.get("step", 0))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            log.unreadable.append(line_number)  # reported on the page
            continue
        if event == "step":
            log.steps[step] = entry
        elif event == "eval" and _is_number(entry.get("auc")):
            log.evaluations[str(entry.get("split", "valid")), step] = float(entry["auc"])
    return log


def _model_parts(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Tables and figures of the models; the reference comes first, and every figure uses the same order of colors."""
    found, reference = metrics.get("models") or {}, metrics.get("reference")
    models = {name: found[name] for name in sorted(found, key=lambda name: name != reference)}
    order, probability = _metric_tables(models)
    slices, drawn = slice_parts(models)
    return {
        "models": models,
        "order_table": order,
        "probability_table": probability,
        "meanings": " ".join(f"{metric.title}: {metric.meaning}." for metric in METRICS),
        "paired_table": _paired_table(metrics.get("paired") or {}, str(reference)),
        "paired_figure": paired_figure(metrics.get("paired") or {}, str(reference)),
        "curves": curve_figures(models, metrics.get("curves") or {}),
        "time_figure": time_figure(models),
        "tasks": {name: _task_tables(block) for name, block in (metrics.get("tasks") or {}).items()},
        "slice_table": slices,
        "slice_figure": drawn,
    }


def _task_tables(task: Mapping[str, Any]) -> dict[str, Any]:
    """Tables of an additional task: those of the first label if it is binary, else a table of regression metrics."""
    models = task["models"]
    if task["kind"] != "binary":
        names = list(dict.fromkeys(key for model in models.values() for key in model))
        rows = [(name, *(format_number(model.get(key)) for key in names)) for name, model in models.items()]
        return {"rows": task["rows"], "tables": [(("model", *(SHOWN.get(key, key) for key in names)), rows)]}
    paired = [_paired_table(task["paired"], task["reference"])] if task.get("paired") else []
    return {"rows": task["rows"], "tables": [*_metric_tables(models), *paired]}


def _metric_tables(models: Mapping[str, Any]) -> tuple[Table, Table]:
    """Two tables with a row per model: (AUC and single-number metrics of scores, all other metrics of the registry)."""
    order: dict[str, list[str]] = {
        "AUC": [format_number(model["auc"]) for model in models.values()],
        "95% (DeLong)": [format_interval(model["auc_low"], model["auc_high"]) for model in models.values()],
        "95% (users)": [format_interval(*by_users(model)) for model in models.values()],
    }
    others: dict[str, list[str]] = {}
    for metric in METRICS:
        values = [model.get(metric.key) for model in models.values()]
        names = dict.fromkeys(name for value in values if isinstance(value, Mapping) for name in value)
        for name in names:
            others[f"{metric.title} {name}"] = [format_number((value or {}).get(name)) for value in values]
        if not names and not getattr(metric, "names", ()):
            table = others if isinstance(metric, ProbabilityMetric) else order
            table[metric.title] = [format_number(value) for value in values]
    first, second = ((("model", *table), list(zip(models, *table.values()))) for table in (order, others))
    return first, second


def _paired_table(paired: Mapping[str, Any], reference: str) -> Table:
    header = ("model", f"AUC minus {reference}", "95% (DeLong)", "p (DeLong)", "95% (users)")
    rows: list[Sequence[str]] = [
        (
            name,
            format_number(pair["difference"], signed=True),
            format_interval(pair["delong_low"], pair["delong_high"], signed=True),
            _p_value(pair["delong_p"]),
            format_interval(*by_users(pair), signed=True),
        )
        for name, pair in paired.items()
    ]
    return header, rows


def _auc_series(log: TrainingLog) -> list[Series]:
    """AUC over steps, one line per split."""
    lines = []
    for color, split in enumerate(dict.fromkeys(split for split, _ in log.evaluations)):
        points = sorted((step, auc) for (name, step), auc in log.evaluations.items() if name == split)
        lines.append(Series(split, [step for step, _ in points], [auc for _, auc in points], color))
    return lines


def _training_note(log: TrainingLog, lines: Sequence[Series]) -> str:
    notes = [f"{max(log.steps):,} steps."] if log.steps else []
    for line in lines:
        best = max(range(len(line.y)), key=lambda index: line.y[index])
        notes.append(f"Best {line.name} AUC {line.y[best]:.4f} at step {line.x[best]:,}.")
    if log.unreadable:
        shown = ", ".join(map(str, log.unreadable[:5]))
        notes.append(f"Lines of log.jsonl that could not be read: {len(log.unreadable)} (line {shown}).")
    return " ".join(notes)


def _retrieval_table(retrieval: Mapping[str, Any]) -> Table:
    """Table with a row per model; metrics that are not grouped by model get one row."""
    by_model = all(isinstance(value, Mapping) for value in retrieval.values())
    models: Mapping[str, Any] = retrieval if by_model else {"model": retrieval}
    keys = list(dict.fromkeys(key for block in models.values() for key in block))
    return ("model", *keys), [(name, *(_value(block.get(key)) for key in keys)) for name, block in models.items()]


def _step_series(log: TrainingLog, key: str, name: str) -> Series | None:
    """A logged number over steps; None if it was logged less than twice or is always 0 (an unused loss)."""
    steps = [step for step in sorted(log.steps) if _is_number(log.steps[step].get(key))]
    values = [float(log.steps[step][key]) for step in steps]
    return Series(name, steps, values) if len(steps) > 1 and any(values) else None


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as (dotted name, value) rows."""
    rows = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += _flatten(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", str(value)))
    return rows


def _p_value(value: float | None) -> str:
    return "n/a" if value is None else "< 1e-16" if value < 1e-16 else f"{value:.2g}"


def _value(value: Any) -> str:
    return format_number(value) if isinstance(value, float) or value is None else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
