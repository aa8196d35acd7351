"""Regression gate for a model repository: tests whether AUC, GAUC or XAUC is lower than a baseline's."""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hllm_torchrec.common.errors import did_you_mean
from hllm_torchrec.evaluation.metrics_schema import finite_or_none, read_fields, read_metrics
from hllm_torchrec.metrics.intervals import normal_quantile

EXIT_STATUS = {"pass": 0, "fail": 3, "unsure": 4}
"""Exit status by verdict; 2 is for usage errors, such as a baseline for other rows, 1 for a crash."""


_NAMES = {"auc": "AUC", "gauc": "GAUC", "xauc": "XAUC"}
_SEVERITY = ("pass", "unsure", "fail")


@dataclass(frozen=True)
class Verdict:
    """Result of the gate for one metric, or the worst of several."""

    baseline: str
    max_drop: float
    """The allowed drop."""
    status: str
    """`pass`: the drop is at most `max_drop`. `fail`: the drop is larger, and its interval is above 0. `unsure`: the
    drop is larger, but its interval contains 0, or there is no interval."""
    drop: float
    low: float
    high: float
    """95% interval of the drop; NaN without an interval."""
    text: str

    @property
    def exit_status(self) -> int:
        """Exit status of the process (`EXIT_STATUS`)."""
        return EXIT_STATUS[self.status]

    def as_json(self) -> dict[str, Any]:
        """The verdict as an entry of `metrics.json`."""
        low, high = (finite_or_none(bound) for bound in (self.low, self.high))
        content = {"baseline": self.baseline, "max_drop": self.max_drop, "status": self.status, "text": self.text}
        return content | {"drop": self.drop, "drop_low": low, "drop_high": high}


def judge(
    metrics: Mapping[str, Any],
    baseline: str,
    limits: Mapping[str, float | None],
    tasks: Mapping[str, float] | None = None,
) -> Verdict:
    """The worst verdict of `compare_with_baseline` over several metrics, with the texts of all verdicts.

    limits: "auc" or "gauc" -> maximum allowed drop; None: the metric is not judged. tasks: additional task -> maximum
    allowed drop of its AUC, or of its XAUC if it predicts numbers.

    Raises:
        ValueError: see `compare_with_baseline`; or a task was not evaluated.
    """
    found = [compare_with_baseline(metrics, baseline, limit, key) for key, limit in limits.items() if limit is not None]
    for task, limit in (tasks or {}).items():
        of_task = _of_task(metrics, task, "the evaluation")
        key = "auc" if of_task["tasks"][task]["kind"] == "binary" else "xauc"
        found.append(compare_with_baseline(of_task, baseline, limit, key, task))
    worst = max(found, key=lambda verdict: _SEVERITY.index(verdict.status))  # the first one if several are equal
    return replace(worst, text="; ".join(verdict.text for verdict in found))


def _of_task(metrics: Mapping[str, Any], task: str, place: object) -> dict[str, Any]:
    """The content of a `metrics.json` in which the models of a task replace those of the first label."""
    tasks = metrics.get("tasks") or {}
    if task not in tasks:
        has = ", ".join(tasks) or "none"
        raise ValueError(
            f"--max-task-drop: {place} has no task {task!r}{did_you_mean(task, tasks)}; it has {has}; the first "
            "label has --max-drop"
        )
    return {**metrics, **tasks[task]}


def compare_with_baseline(
    metrics: Mapping[str, Any], baseline: str | Path, max_drop: float, key: str = "auc", task: str | None = None
) -> Verdict:
    """Compare the AUC, GAUC or XAUC of the reference model of `metrics` with a baseline's.

    Args:
        metrics: the content of a `metrics.json` (`offline_evaluation.evaluate_predictions`).
        baseline: a `metrics.json`, whose interval is combined with the new one as if the samples were independent (too
            wide, because both must have scored the same rows); or the name of another model in `metrics`, whose rows
            are paired.
        max_drop: maximum allowed drop (in 0..1: 0.001 is a tenth of a percentage point), >= 0.
        key: "auc", "gauc", or "xauc", which has no interval, so that a drop above `max_drop` is always "unsure".
        task: additional task whose models are in `metrics`; None: the first label.

    Raises:
        ValueError: max_drop is negative or NaN, the baseline does not exist or has different rows, or a metric is
            undefined.
    """
    if not max_drop >= 0:  # also refuses NaN
        option = "--max-task-drop" if task else "--max-drop" if key == "auc" else "--max-gauc-drop"
        raise ValueError(f"{option} {max_drop}: must be 0 or more, in {_NAMES[key]}, e.g. 0.001")
    name, other_name = metrics["reference"], str(baseline)
    own = _defined(metrics["models"].get(name), key, f"the model {name!r}")
    paired = other_name in metrics["models"]
    if other_name == name:
        raise ValueError(f"--baseline {baseline} is the judged model itself; name another model of the comparison")
    with nullcontext() if paired else read_fields(Path(baseline)):
        block = metrics["models"][other_name] if paired else _baseline_block(metrics, Path(baseline), task)
        other = _defined(block, key, f"the model {other_name!r}" if paired else other_name)
        pair = metrics["paired"][other_name] if paired and key != "xauc" else None
        interval, how = (math.nan, math.nan), ""
        if key != "xauc":
            interval, how = _paired_interval(pair, key) if pair is not None else _interval(own, other, key)
        judged = name if task is None else f"{task} by {name}"
        return _verdict(key, (judged, own[key]), (other_name, other[key]), interval, max_drop, how)


def _paired_interval(pair: Mapping[str, Any], key: str) -> tuple[tuple[float, float], str]:
    """(95% interval of the metric's drop on the same rows, description of the method)."""
    kind = "gauc" if key == "gauc" else "clustered" if pair.get("clustered_low") is not None else "delong"
    # The paired difference is baseline minus reference model, which is the drop.
    return (_number(pair[f"{kind}_low"]), _number(pair[f"{kind}_high"])), f"paired on the same rows, {_UNITS[kind]}"


def _interval(own: Mapping[str, Any], other: Mapping[str, Any], key: str) -> tuple[tuple[float, float], str]:
    """(95% interval of the metric's drop for independent samples, description of the method)."""
    kind = "clustered" if own.get("clustered_se") and other.get("clustered_se") else "auc"
    if key == "gauc":  # a metrics.json of an earlier version has no standard error of GAUC
        kind, other = "gauc", {"gauc_se": None, **other}
    # The variance of the difference of independent estimates is the sum of their variances.
    half = normal_quantile(0.95) * math.hypot(_number(own[f"{kind}_se"]), _number(other[f"{kind}_se"]))
    drop = other[key] - own[key]
    return (drop - half, drop + half), f"not paired, {_UNITS[kind]}"


_UNITS = dict.fromkeys(("clustered", "gauc"), "users as independent") | dict.fromkeys(
    ("delong", "auc"), "rows as independent"
)


def _verdict(
    key: str,
    judged: tuple[str, float],
    baseline: tuple[str, float],
    interval: tuple[float, float],
    max_drop: float,
    how: str,
) -> Verdict:
    """Verdict on two models, each given as (name, metric)."""
    drop, (low, high) = baseline[1] - judged[1], interval
    if drop <= max_drop:
        status = "pass"
        reason = f"at most the {max_drop:g} allowed"
        if not math.isnan(low) and not high <= max_drop:
            reason += f", though these rows cannot rule out a drop of up to {high:.5f}"
    elif low > 0:
        status, reason = "fail", f"more than the {max_drop:g} allowed, and the interval lies above 0"
    else:
        status = "unsure"
        unknown = "the interval contains 0" if low <= 0 else "there is no interval"
        remedy = "evaluate on more rows, or evaluate both models in one command"
        reason = f"more than the {max_drop:g} allowed, but {unknown}" + (f": {remedy}" if key != "xauc" else " of XAUC")
    bounds = "no interval" if math.isnan(low) else f"95% [{low:+.5f}, {high:+.5f}], {how}"
    text = (
        f"{status.upper()}: {_NAMES[key]} of {judged[0]} {judged[1]:.5f}, of {baseline[0]} {baseline[1]:.5f}; the drop "
        f"is {drop:+.5f} ({bounds}), {reason}"
    )
    return Verdict(baseline[0], max_drop, status, drop, low, high, text)


def _baseline_block(metrics: Mapping[str, Any], path: Path, task: str | None) -> Mapping[str, Any] | None:
    """The reference model's block of a baseline `metrics.json`; raises ValueError if it has different rows."""
    if not path.is_file():
        hint = did_you_mean(str(path), metrics["models"])
        raise ValueError(f"--baseline {path} is neither a file nor a compared model{hint}; name a metrics.json")
    baseline: Mapping[str, Any] = read_metrics(path)
    if task is not None:
        baseline = _of_task(baseline, task, path)
    for key in ("split", "rows", "users", "exposures"):
        ours, theirs = metrics.get(key), baseline.get(key)
        if ours != theirs and not (key == "exposures" and None in (ours, theirs)):
            raise ValueError(
                f"--baseline {path} was measured on other rows: {key} {theirs} there, {ours} here; AUCs of "
                "different rows are not comparable: evaluate the baseline on the same rows"
            )
    return (baseline.get("models") or {}).get(baseline.get("reference"))


def _defined(block: Mapping[str, Any] | None, key: str, what: str) -> Mapping[str, Any]:
    """Return the block. Raises ValueError if the metric is undefined."""
    if not block or block.get(key) is None:
        needs = {"auc": "rows of both classes", "xauc": "different labels"}
        needs |= {"gauc": "users (--user) with rows of both classes"}
        raise ValueError(f"{what} has no {_NAMES[key]} to compare: it needs {needs[key]}")
    return block


def _number(value: float | None) -> float:
    return math.nan if value is None else value
