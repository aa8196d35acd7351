"""One self-contained HTML page about a run: nothing to install, nothing fetched, safe to mail."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hllm_torchrec.metrics.compare import SCHEMA_VERSION, interval, number
from hllm_torchrec.metrics.page import figure, folded, page, paragraph, section, side_by_side, table
from hllm_torchrec.metrics.plots import (
    NEUTRALS,
    Estimate,
    Series,
    estimates,
    line_panels,
    step_lines,
    unit_square,
)

LOSSES = {"loss": "loss", "loss_cls": "classification loss", "loss_gen": "generative loss"}


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
        ValueError: neither metrics nor a log, a broken `metrics.json` or one of another schema version.
    """
    run_dir = Path(run_dir)
    metrics = _read_metrics(run_dir / "metrics.json")
    log = read_log(run_dir / "log.jsonl")
    if not metrics and not log.steps and not log.evaluations:
        raise ValueError(
            f"{run_dir} has neither metrics.json nor a log.jsonl with steps; train or evaluate into it first"
        )
    parts = [
        _headline(metrics),
        _paired(metrics),
        _training(log),
        _curves(metrics),
        _slices(metrics),
        _retrieval(metrics.get("retrieval")),
        _configuration(run_dir / "config.yaml"),
        _provenance(metrics.get("provenance")),
    ]
    path = run_dir / "report.html"
    unfinished = path.with_suffix(".html.tmp")
    unfinished.write_text(page(run_dir.resolve().name, parts), encoding="utf-8")
    os.replace(unfinished, path)
    return path


def read_log(path: Path) -> TrainingLog:
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


def _read_metrics(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); evaluate again to write it anew") from error
    version = metrics.get("schema_version") if isinstance(metrics, dict) else None
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema_version {version}, this report reads {SCHEMA_VERSION}; evaluate again to write it anew"
        )
    return metrics


def _headline(metrics: Mapping[str, Any]) -> str:
    models = _models(metrics)
    if not models:
        return ""
    plain = {
        "GAUC": "gauc",
        "log loss": "log_loss",
        "normalized entropy": "normalized_entropy",
        "calibration": "calibration",
        "ECE": "ece",
    }
    rows = [
        (
            name,
            number(model["auc"]),
            interval(model["auc_low"], model["auc_high"]),
            interval(model.get("bootstrap_low"), model.get("bootstrap_high")),
            *(number(model.get(key)) for key in plain.values()),
        )
        for name, model in models.items()
    ]
    first = next(iter(models.values()))
    size = f"{metrics['split']} split: {metrics['rows']:,} exposures of {metrics['users']:,} users"
    note = (
        "AUC is exact, ties count one half. DeLong's interval takes exposures as independent; the other "
        "resamples users. GAUC is the AUC within a user, weighted by exposures: "
        f"{first['gauc_users']:,} users count, {first['gauc_users_left_out']:,} with one class only do not. "
        "Normalized entropy is useful below 1; calibration is right at 1."
    )
    header = ("model", "AUC", "95% (DeLong)", "95% (users)", *plain)
    return paragraph(size, "lead") + section("Models", table(header, rows), paragraph(note))


def _paired(metrics: Mapping[str, Any]) -> str:
    paired = metrics.get("paired")
    if not paired:
        return ""
    reference = str(metrics["reference"])
    rows = [
        (
            name,
            number(pair["difference"], signed=True),
            interval(pair["delong_low"], pair["delong_high"], signed=True),
            _p_value(pair["delong_p"]),
            interval(pair["bootstrap_low"], pair["bootstrap_high"], signed=True),
        )
        for name, pair in paired.items()
    ]
    kinds = {"DeLong": "delong", "bootstrap over users": "bootstrap"}
    groups = {
        name: [
            Estimate(kind, pair["difference"], pair[f"{key}_low"], pair[f"{key}_high"]) for kind, key in kinds.items()
        ]
        for name, pair in paired.items()
        if pair["difference"] is not None
    }
    note = (
        "Both intervals compare the models on the same exposures. One that does not contain 0 says that the "
        "difference would show on other exposures (DeLong) or with other users (bootstrap) too."
    )
    header = ("model", f"AUC minus {reference}", "95% (DeLong)", "p (DeLong)", "95% (users)")
    picture = ""
    if groups:
        axis = f"AUC minus AUC of {reference}"
        label = f"{axis} with 95% intervals: {', '.join(groups)}"
        picture = figure("", estimates(groups, list(kinds), axis, label, "paired", zero=True, palette=NEUTRALS))
    return section("Paired differences", table(header, rows), picture, paragraph(note))


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


def _curves(metrics: Mapping[str, Any]) -> str:
    models, curves = _models(metrics), metrics.get("curves") or {}
    roc, reliability = [], []
    for color, (name, model) in enumerate(models.items()):
        points = (curves.get(name) or {}).get("roc") or {}
        if points.get("false_positive_rate"):
            label = f"{name}  {number(model['auc'])}"
            roc.append(Series(label, points["false_positive_rate"], points["true_positive_rate"], color))
        bins = (curves.get(name) or {}).get("reliability") or {}
        if bins.get("rows"):
            label = f"{name}  {number(model['ece'])}"
            reliability.append(Series(label, bins["mean_probability"], bins["observed_rate"], color))
    figures = []
    if roc:
        axes = ("false positive rate", "true positive rate")
        figures.append(figure("ROC curve and AUC", unit_square(roc, *axes, "ROC curve of every model", "roc")))
    if reliability:
        axes = ("mean predicted probability", "observed rate of positives")
        drawn = unit_square(reliability, *axes, "Reliability curve of every model", "reliability", markers=True)
        figures.append(figure("Reliability and expected calibration error (ECE)", drawn))
    note = (
        "Each point of a reliability curve is a tenth of the exposures by predicted probability; on the "
        "dashed diagonal the predicted probability is the observed rate."
    )
    return section("Order and calibration", side_by_side(figures), paragraph(note)) if figures else ""


def _slices(metrics: Mapping[str, Any]) -> str:
    models = _models(metrics)
    names = list(dict.fromkeys(name for model in models.values() for name in model.get("slices") or {}))
    groups: dict[str, list[Estimate]] = {}
    rows = []
    for name in names:
        parts = {model: block["slices"][name] for model, block in models.items() if name in block["slices"]}
        size = next(iter(parts.values()))
        if not size["rows"]:
            continue
        cells = [_auc_cell(parts.get(model)) for model in models]
        rows.append((_slice_title(name), f"{size['rows']:,}", f"{size['positives']:,}", *cells))
        groups[f"{_slice_title(name)}  ({size['rows']:,})"] = [
            Estimate(model, part["auc"], part["auc_low"], part["auc_high"])
            for model, part in parts.items()
            if part["auc"] is not None
        ]
    note = (
        "Cold items have no event in the training part. History length counts the user's events in strictly "
        "earlier seconds. Intervals are DeLong's, 95%; n/a where a class is missing."
    )
    drawn = {name: row for name, row in groups.items() if row}
    label = f"AUC with 95% intervals of every model by slice: {', '.join(drawn)}"
    picture = figure("", estimates(drawn, list(models), "AUC", label, "slices")) if drawn else ""
    header = ("slice", "exposures", "positives", *models)
    return section("AUC by slice", picture, table(header, rows, "dense"), paragraph(note)) if rows else ""


def _retrieval(retrieval: Mapping[str, Any] | None) -> str:
    """A row a model; metrics that are not given by model get one row."""
    if not retrieval:
        return ""
    by_model = all(isinstance(value, Mapping) for value in retrieval.values())
    models: Mapping[str, Any] = retrieval if by_model else {"model": retrieval}
    keys = list(dict.fromkeys(key for block in models.values() for key in block))
    rows = [(name, *(_value(block.get(key)) for key in keys)) for name, block in models.items()]
    note = "Over the whole catalogue; an item that ties with the target stands before it."
    return section("Retrieval", table(("model", *keys), rows), paragraph(note))


def _configuration(file: Path) -> str:
    if not file.is_file():
        return ""
    return section("Configuration", folded(file.name, file.read_text(encoding="utf-8")))


def _provenance(provenance: Mapping[str, Any] | None) -> str:
    if not provenance:
        return ""
    return section("Provenance", table(("what", "value"), _flatten(provenance), "text"))


def _models(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The models, the reference first: the order of colours in every figure."""
    models, reference = metrics.get("models") or {}, metrics.get("reference")
    return {name: models[name] for name in sorted(models, key=lambda name: name != reference)}


def _auc_cell(part: Mapping[str, Any] | None) -> str:
    """AUC, and below it the interval, which does not break."""
    if part is None or part["auc"] is None:
        return "n/a"
    bounds = interval(part["auc_low"], part["auc_high"]).replace(" ", "\N{NO-BREAK SPACE}")
    return f"{number(part['auc'])}\n{bounds}"


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


def _slice_title(name: str) -> str:
    """`history_1-9` → `history 1-9`, `item_cold` → `cold items`."""
    kind, _, part = name.partition("_")
    return f"{part} items" if kind == "item" else f"history {part}" if kind == "history" else name


def _p_value(value: float | None) -> str:
    return "n/a" if value is None else "< 1e-16" if value < 1e-16 else f"{value:.2g}"


def _value(value: Any) -> str:
    return number(value) if isinstance(value, float) or value is None else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
