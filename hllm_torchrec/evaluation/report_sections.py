"""Parts of the report that show how AUC differs: curves, time, slices; and the warnings above them."""

from collections.abc import Mapping
from typing import Any

from hllm_torchrec.evaluation.model_comparison import format_interval, format_number
from hllm_torchrec.evaluation.report_figures import Estimate, Interval, Series, estimates, interval_lines, unit_square
from hllm_torchrec.evaluation.report_html import figure, html_list, html_table, paragraph, section, side_by_side

DAY = "day_"
MAX_DRAWN = 40
"""Slices in the figure; the table has all."""


def warnings_section(metrics: Mapping[str, Any]) -> str:
    """What `metric_warnings` found, and the gate's verdict."""
    gate = metrics.get("gate")
    verdict = paragraph(f"Regression gate: {gate['text']}.", "lead") if gate else ""
    found = metrics.get("cautions") or []
    return verdict + (section("Warnings", html_list(found)) if found else "")


def curves_section(metrics: Mapping[str, Any]) -> str:
    """ROC, precision-recall and reliability curves of all models."""
    models, points_of = models_of(metrics), metrics.get("curves") or {}
    roc, precision, reliability = [], [], []
    for color, (name, model) in enumerate(models.items()):
        points = (points_of.get(name) or {}).get("roc") or {}
        if points.get("false_positive_rate"):
            label = f"{name}  {format_number(model['auc'])}"
            roc.append(Series(label, points["false_positive_rate"], points["true_positive_rate"], color))
        points = (points_of.get(name) or {}).get("pr") or {}
        if points.get("recall"):
            label = f"{name}  {format_number(model['pr_auc'])}"
            precision.append(Series(label, points["recall"], points["precision"], color))
        bins = (points_of.get(name) or {}).get("reliability") or {}
        if bins.get("rows"):
            label = f"{name}  {format_number(model['ece'])}"
            reliability.append(Series(label, bins["mean_probability"], bins["observed_rate"], color))
    figures = []
    if roc:
        axes = ("false positive rate", "true positive rate")
        figures.append(figure("ROC curve and AUC", unit_square(roc, *axes, "ROC curve of every model", "roc")))
    if precision:
        axes = ("recall", "precision")
        drawn = unit_square(precision, *axes, "Precision-recall curve of every model", "pr", diagonal=False)
        figures.append(figure("Precision-recall curve and PR-AUC", drawn))
    if reliability:
        axes = ("mean predicted probability", "observed rate of positives")
        drawn = unit_square(reliability, *axes, "Reliability curve of every model", "reliability", markers=True)
        figures.append(figure("Reliability and expected calibration error (ECE)", drawn))
    note = (
        "Each point of a reliability curve is a tenth of the exposures by predicted probability; on the "
        "dashed diagonal the predicted probability is the observed rate."
    )
    shown = paragraph(note) if reliability else ""
    return section("Order and calibration", side_by_side(figures), shown) if figures else ""


def slices_section(metrics: Mapping[str, Any]) -> str:
    """AUC by slice, except the days, which `time_section` shows."""
    models = models_of(metrics)
    names = list(dict.fromkeys(name for model in models.values() for name in model.get("slices") or {}))
    names = [name for name in names if not name.startswith(DAY)]
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
        "earlier seconds. Intervals are DeLong's, 95%; n/a where a class is missing. Hours are UTC."
    )
    drawn = {name: row for name, row in groups.items() if row}
    drawn = dict(list(drawn.items())[:MAX_DRAWN])
    label = f"AUC with 95% intervals of every model by slice: {', '.join(drawn)}"
    picture = figure("", estimates(drawn, list(models), "AUC", label, "slices")) if drawn else ""
    header = ("slice", "exposures", "positives", *models)
    return section("AUC by slice", picture, html_table(header, rows, "dense"), paragraph(note)) if rows else ""


def time_section(metrics: Mapping[str, Any]) -> str:
    """AUC by day of all models, with intervals; nothing for fewer than two days."""
    models = models_of(metrics)
    days = {name for model in models.values() for name in model.get("slices") or {} if name.startswith(DAY)}
    if len(days) < 2:
        return ""
    lines, ordered = [], sorted(days)
    for color, (name, model) in enumerate(models.items()):
        blocks = [model["slices"].get(day) or {} for day in ordered]
        points = [(block.get("auc"), block.get("auc_low"), block.get("auc_high")) for block in blocks]
        lines.append(Interval(name, points, color))
    label = f"AUC with 95% intervals of every model over {len(days)} days"
    drawn = interval_lines(lines, [day.removeprefix(DAY) for day in ordered], "AUC", label, "time")
    note = (
        "Each day of exposures apart (UTC), with DeLong's 95% interval where there is one; gaps are days of one class."
    )
    return section("AUC over time", figure("", drawn), paragraph(note))


def models_of(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The models, the reference first: the order of colours in every figure."""
    models, reference = metrics.get("models") or {}, metrics.get("reference")
    return {name: models[name] for name in sorted(models, key=lambda name: name != reference)}


def _auc_cell(part: Mapping[str, Any] | None) -> str:
    """AUC, and below it the interval, which does not break."""
    if part is None or part["auc"] is None:
        return "n/a"
    bounds = format_interval(part["auc_low"], part["auc_high"]).replace(" ", "\N{NO-BREAK SPACE}")
    return f"{format_number(part['auc'])}\n{bounds}"


def _slice_title(name: str) -> str:
    """`history_1-9` → `history 1-9`, `item_cold` → `cold items`, `hour_07` → `hour 07`."""
    kind, _, part = name.partition("_")
    return f"{part} items" if kind == "item" else f"{kind} {part}" if kind in ("history", "hour") else name
