"""Figures and the slice table of the report, from the parts of `metrics.json`; "" for a missing figure."""

from collections.abc import Mapping, Sequence
from typing import Any

from hllm_torchrec.evaluation.model_comparison import by_users, format_interval, format_number
from hllm_torchrec.evaluation.report_figures import (
    NEUTRALS,
    Estimate,
    Interval,
    Series,
    Svg,
    estimates,
    interval_lines,
    line_panels,
    step_lines,
    unit_square,
)
from hllm_torchrec.evaluation.row_slices import DAY_SLICE

MAX_DRAWN = 40
"""Maximum number of slices in the figure; the table has all slices that are not empty, except the days."""

CURVES = {
    "roc": ("ROC curve and AUC", "auc", "false_positive_rate", "true_positive_rate"),
    "pr": ("Precision-recall curve and PR-AUC", "pr_auc", "recall", "precision"),
    "reliability": (
        "Reliability and expected calibration error (ECE)",
        "ece",
        "mean_probability",
        "observed_rate",
    ),
}
"""Curve in metrics.json → caption, the metric shown next to a model's name, and the keys of x and y."""

AXES = {
    "roc": ("false positive rate", "true positive rate", "ROC curve of every model"),
    "pr": ("recall", "precision", "Precision-recall curve of every model"),
    "reliability": (
        "mean predicted probability",
        "observed rate of positives",
        "Reliability curve of every model",
    ),
}


def training_figures(losses: Sequence[Series], aucs: Sequence[Series]) -> dict[str, Svg]:
    """Figures by caption: losses over steps, and AUC in training."""
    found = {}
    if losses:
        found["Loss"] = line_panels(losses, "Training loss over steps")
    if aucs:
        found["AUC in training"] = step_lines(aucs, "AUC", "AUC of evaluations over steps")
    return found


def paired_figure(paired: Mapping[str, Any], reference: str) -> Svg | str:
    """Figure of the AUC differences from the reference, with two 95% intervals: DeLong's, and that over users."""
    groups = {
        name: [
            Estimate("DeLong", pair["difference"], pair["delong_low"], pair["delong_high"]),
            Estimate("users", pair["difference"], *by_users(pair)),
        ]
        for name, pair in paired.items()
        if pair["difference"] is not None
    }
    if not groups:
        return ""
    axis = f"AUC minus AUC of {reference}"
    label = f"{axis} with 95% intervals: {', '.join(groups)}"
    return estimates(groups, ["DeLong", "users"], axis, label, "paired", zero=True, palette=NEUTRALS)


def curve_figures(models: Mapping[str, Any], points: Mapping[str, Any]) -> dict[str, Svg]:
    """Figures by caption: ROC, precision-recall and reliability curves of all models."""
    found = {}
    for kind, (caption, metric, x, y) in CURVES.items():
        lines = []
        for color, (name, model) in enumerate(models.items()):
            curve = (points.get(name) or {}).get(kind) or {}
            if curve.get(x):
                lines.append(Series(f"{name}  {format_number(model[metric])}", curve[x], curve[y], color))
        if lines:
            markers, diagonal = kind == "reliability", kind != "pr"
            found[caption] = unit_square(lines, *AXES[kind], kind, markers=markers, diagonal=diagonal)
    return found


def time_figure(models: Mapping[str, Any]) -> Svg | str:
    """Figure of the AUC by day of all models, with intervals; "" for fewer than two days."""
    days = {name for model in models.values() for name in model.get("slices") or {} if name.startswith(DAY_SLICE)}
    if len(days) < 2:
        return ""
    lines, ordered = [], sorted(days)
    for color, (name, model) in enumerate(models.items()):
        blocks = [model["slices"].get(day) or {} for day in ordered]
        points = [(block.get("auc"), block.get("auc_low"), block.get("auc_high")) for block in blocks]
        lines.append(Interval(name, points, color))
    label = f"AUC with 95% intervals of every model over {len(days)} days"
    return interval_lines(lines, [day.removeprefix(DAY_SLICE) for day in ordered], "AUC", label, "time")


def slice_parts(models: Mapping[str, Any]) -> tuple[tuple[Sequence[str], list[Sequence[str]]], Svg | str]:
    """Table and figure of the AUC by slice, without the days, which are in `time_figure`."""
    names = dict.fromkeys(name for model in models.values() for name in model.get("slices") or {})
    groups: dict[str, list[Estimate]] = {}
    rows: list[Sequence[str]] = []
    for name in (name for name in names if not name.startswith(DAY_SLICE)):
        parts = {model: block["slices"][name] for model, block in models.items() if name in block["slices"]}
        size = next(iter(parts.values()))
        if not size["rows"]:
            continue
        cells = [_auc_cell(parts.get(model)) for model in models]
        rows.append((_slice_title(name), f"{size['rows']:,}", f"{size['positives']:,}", *cells))
        row = [
            Estimate(model, part["auc"], part["auc_low"], part["auc_high"])
            for model, part in parts.items()
            if part["auc"] is not None
        ]
        if row and len(groups) < MAX_DRAWN:
            groups[f"{_slice_title(name)}  ({size['rows']:,})"] = row
    label = f"AUC with 95% intervals of every model by slice: {', '.join(groups)}"
    picture = estimates(groups, list(models), "AUC", label, "slices") if groups else ""
    return (("slice", "exposures", "positives", *models), rows), picture


def _auc_cell(part: Mapping[str, Any] | None) -> str:
    """Cell text: the AUC, and below it the interval with no-break spaces."""
    if part is None or part["auc"] is None:
        return "n/a"
    bounds = format_interval(part["auc_low"], part["auc_high"]).replace(" ", "\N{NO-BREAK SPACE}")
    return f"{format_number(part['auc'])}\n{bounds}"


def _slice_title(name: str) -> str:
    """`history_1-9` → `history 1-9`, `item_cold` → `cold items`, `hour_07` → `hour 07`, and so on."""
    kind, _, part = name.partition("_")
    if name.startswith("item_events_"):
        return f"items with {part.removeprefix('events_')} events"
    return f"{part} items" if kind == "item" else f"{kind} {part}" if kind in ("history", "hour") else name
