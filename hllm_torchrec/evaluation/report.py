"""One self-contained HTML page about a run: nothing to install, nothing fetched, safe to mail."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hllm_torchrec.common.atomic_files import replace_file
from hllm_torchrec.evaluation.metrics_schema import read_metrics
from hllm_torchrec.evaluation.model_comparison import by_users, format_interval, format_number
from hllm_torchrec.evaluation.report_figures import NEUTRALS, Estimate, Series, estimates, line_panels, step_lines
from hllm_torchrec.evaluation.report_html import collapsible, figure, html_table, page, paragraph, section
from hllm_torchrec.evaluation.report_sections import (
    curves_section,
    models_of,
    slices_section,
    time_section,
    warnings_section,
)

LOSSES = {"loss": "loss", "loss_cls": "classification loss", "loss_gen": "generative loss"}

ORDER = {"PR-AUC": "pr_auc", "GAUC": "gauc", "GAUC by user": "gauc_user_weighted"}
PROBABILITY = {
    "log loss": "log_loss",
    "NE": "normalized_entropy",
    "Brier": "brier",
    "calibration": "calibration",
    "ECE": "ece",
}


@dataclass
class TrainingLog:
    """What `log.jsonl` says of the course of training."""

    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Step → its last line: a resumed run writes some steps again."""
    evaluations: dict[tuple[str, int], float] = field(default_factory=dict)
    """(split, step) → AUC, the last of each."""
    unreadable: list[int] = field(default_factory=list)
    """Numbers of the lines that are no JSON object, such as the one a killed run left half-written."""


def write_report(run_dir: str | Path) -> Path:
    """Writes `report.html` into a run directory from what is there.

    Read are `metrics.json` (as `metrics.compare.compare` returns it), `log.jsonl` (lines `{"event": "step",
    "step", "loss", "loss_cls", "loss_gen"}` and `{"event": "eval", "step", "split", "auc"}`; others are
    ignored) and `config.yaml`. A part that is missing leaves its sections out.

    Returns:
        The path of the report.

    Raises:
        ValueError: neither metrics nor a log, or a `metrics.json` that is broken, of another schema version or
            without a field that is shown.
    """
    run_dir = Path(run_dir)
    file = run_dir / "metrics.json"
    metrics = read_metrics(file) if file.is_file() else {}
    log = read_training_log(run_dir / "log.jsonl")
    if not metrics and not log.steps and not log.evaluations:
        raise ValueError(
            f"{run_dir} has neither metrics.json nor a log.jsonl with steps; train or evaluate into it first"
        )
    parts = [
        warnings_section(metrics),
        _headline(metrics),
        _paired(metrics),
        _training(log),
        curves_section(metrics),
        time_section(metrics),
        slices_section(metrics),
        _retrieval(metrics.get("retrieval")),
        _configuration(run_dir / "config.yaml"),
        _provenance(metrics.get("provenance")),
    ]
    path = run_dir / "report.html"
    replace_file(path, page(run_dir.resolve().name, parts))
    return path


def read_training_log(path: Path) -> TrainingLog:
    """The steps and evaluations of a `log.jsonl`; empty if there is no such file."""
    log = TrainingLog()
    if not path.is_file():
        return log
    for line_number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            event, step = entry["event"], int(entry.get("step", 0))
        except (ValueError, TypeError, KeyError, AttributeError):
            log.unreadable.append(line_number)  # reported on the page
            continue
        if event == "step":
            log.steps[step] = entry
        elif event == "eval" and _is_number(entry.get("auc")):
            log.evaluations[str(entry.get("split", "valid")), step] = float(entry["auc"])
    return log


def _headline(metrics: Mapping[str, Any]) -> str:
    models = models_of(metrics)
    if not models:
        return ""
    rows = [
        (
            name,
            format_number(model["auc"]),
            format_interval(model["auc_low"], model["auc_high"]),
            format_interval(*by_users(model)),
            *(format_number(model.get(key)) for key in ORDER.values()),
        )
        for name, model in models.items()
    ]
    first = next(iter(models.values()))
    users = f" of {metrics['users']:,} users" if metrics.get("users") else ""
    size = f"{metrics['split']} split: {metrics['rows']:,} exposures{users}"
    within = (
        ""
        if first["gauc_users"] is None
        else (
            "GAUC is the AUC within a user, weighted by exposures, GAUC by user with all users alike: "
            f"{first['gauc_users']:,} users count, {first['gauc_users_left_out']:,} with one class only do not. "
        )
    )
    note = (
        "AUC is exact, ties count one half. DeLong's interval takes exposures as independent, the other takes users: "
        "exposures of one user resemble each other, so it is the one to trust. "
        f"{within}PR-AUC is average precision. NE, normalized entropy, is "
        "useful below 1; calibration is right at 1. "
        f"{'Exposures are weighted.' if metrics.get('weighted') else ''}"
    )
    header = ("model", "AUC", "95% (DeLong)", "95% (users)", *ORDER)
    return paragraph(size, "lead") + section(
        "Models", html_table(header, rows), paragraph(note.strip()), _probabilities(models)
    )


def _probabilities(models: Mapping[str, Any]) -> str:
    """Metrics of probabilities and recall at precision (none in the first schema), a row a model."""
    recalls = {name: model.get("recall_at_precision") or {} for name, model in models.items()}
    wanted = list(dict.fromkeys(precision for found in recalls.values() for precision in found))
    rows = [
        (
            name,
            *(format_number(model.get(key)) for key in PROBABILITY.values()),
            *(format_number(recalls[name].get(precision)) for precision in wanted),
        )
        for name, model in models.items()
    ]
    header = ("model", *PROBABILITY, *(f"recall at precision {precision}" for precision in wanted))
    return html_table(header, rows)


def _paired(metrics: Mapping[str, Any]) -> str:
    paired = metrics.get("paired")
    if not paired:
        return ""
    reference = str(metrics["reference"])
    rows = [
        (
            name,
            format_number(pair["difference"], signed=True),
            format_interval(pair["delong_low"], pair["delong_high"], signed=True),
            _p_value(pair["delong_p"]),
            format_interval(*by_users(pair), signed=True),
        )
        for name, pair in paired.items()
    ]
    kinds = ["DeLong", "users"]
    groups = {
        name: [
            Estimate("DeLong", pair["difference"], pair["delong_low"], pair["delong_high"]),
            Estimate("users", pair["difference"], *by_users(pair)),
        ]
        for name, pair in paired.items()
        if pair["difference"] is not None
    }
    note = (
        "Both intervals compare the models on the same exposures. One that does not contain 0 says that the "
        "difference would show on other exposures (DeLong) or with other users too."
    )
    header = ("model", f"AUC minus {reference}", "95% (DeLong)", "p (DeLong)", "95% (users)")
    picture = ""
    if groups:
        axis = f"AUC minus AUC of {reference}"
        label = f"{axis} with 95% intervals: {', '.join(groups)}"
        picture = figure("", estimates(groups, kinds, axis, label, "paired", zero=True, palette=NEUTRALS))
    return section("Paired differences", html_table(header, rows), picture, paragraph(note))


def _training(log: TrainingLog) -> str:
    figures: list[str] = []
    lines: list[Series] = []
    panels = [series for key, name in LOSSES.items() if (series := _step_series(log, key, name))]
    if panels:
        figures.append(figure("Loss", line_panels(panels, "Training loss over steps")))
    for split in dict.fromkeys(split for split, _ in log.evaluations):
        points = sorted((step, auc) for (name, step), auc in log.evaluations.items() if name == split)
        lines.append(Series(split, [step for step, _ in points], [auc for _, auc in points], len(lines)))
    if lines:
        figures.append(figure("AUC in training", step_lines(lines, "AUC", "AUC of evaluations over steps")))
    if not figures:
        return ""
    notes = [f"{max(log.steps):,} steps." if log.steps else ""]
    for line in lines:
        best = max(range(len(line.y)), key=lambda index: line.y[index])
        notes.append(f"Best {line.name} AUC {line.y[best]:.4f} at step {line.x[best]:,}.")
    if log.unreadable:
        shown = ", ".join(map(str, log.unreadable[:5]))
        notes.append(f"Lines of log.jsonl that could not be read: {len(log.unreadable)} (line {shown}).")
    return section("Training", *figures, paragraph(" ".join(notes).strip()))


def _retrieval(retrieval: Mapping[str, Any] | None) -> str:
    """A row a model; metrics that are not given by model get one row."""
    if not retrieval:
        return ""
    by_model = all(isinstance(value, Mapping) for value in retrieval.values())
    models: Mapping[str, Any] = retrieval if by_model else {"model": retrieval}
    keys = list(dict.fromkeys(key for block in models.values() for key in block))
    rows = [(name, *(_value(block.get(key)) for key in keys)) for name, block in models.items()]
    note = "Over the whole catalogue; an item that ties with the target stands before it."
    return section("Retrieval", html_table(("model", *keys), rows), paragraph(note))


def _configuration(file: Path) -> str:
    if not file.is_file():
        return ""
    return section("Configuration", collapsible(file.name, file.read_text(encoding="utf-8")))


def _provenance(provenance: Mapping[str, Any] | None) -> str:
    if not provenance:
        return ""
    return section("Provenance", html_table(("what", "value"), _flatten(provenance), "text"))


def _step_series(log: TrainingLog, key: str, name: str) -> Series | None:
    """A logged number over steps; None if logged less than twice or always 0 (a loss not in use)."""
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
