"""Regression gate for a model repository: tests whether the AUC is worse than a baseline's by more than chance."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hllm_torchrec.common.errors import did_you_mean
from hllm_torchrec.evaluation.metrics_schema import finite_or_none, read_metrics
from hllm_torchrec.metrics.intervals import normal_quantile

EXIT_STATUS = {"pass": 0, "fail": 3, "unsure": 4}
"""Exit status by verdict; 2 is for usage errors, such as a baseline of other rows, 1 for a crash."""


@dataclass(frozen=True)
class Verdict:
    """Result of the gate."""

    status: str
    """`pass`: the drop is at most the allowed one. `fail`: it is larger, and its interval lies above 0.
    `unsure`: it is larger, but its interval contains 0."""
    drop: float
    low: float
    high: float
    """95% interval of the drop."""
    text: str

    @property
    def exit_status(self) -> int:
        """Exit status of the process (`EXIT_STATUS`)."""
        return EXIT_STATUS[self.status]

    def as_json(self, baseline: str, max_drop: float) -> dict[str, Any]:
        """The verdict as an entry of `metrics.json`."""
        low, high = (finite_or_none(bound) for bound in (self.low, self.high))
        content = {"baseline": baseline, "max_drop": max_drop, "status": self.status, "text": self.text}
        return content | {"drop": self.drop, "drop_low": low, "drop_high": high}


def compare_with_baseline(metrics: Mapping[str, Any], baseline: str | Path, max_drop: float) -> Verdict:
    """Compare the AUC of the reference model of `metrics` with a baseline's.

    Args:
        metrics: the content of a `metrics.json` (`offline_evaluation.evaluate_predictions`).
        baseline: a `metrics.json`, whose interval is combined with the new one as if the samples were independent
            (too wide, because both must have scored the same rows); or the name of another model in `metrics`,
            whose rows are paired.
        max_drop: maximum allowed drop of the AUC (in 0..1: 0.001 is a tenth of a percentage point), >= 0.

    Raises:
        ValueError: max_drop is negative or NaN, the baseline does not exist or has other rows, or an AUC is
            undefined.
    """
    if not max_drop >= 0:  # also refuses NaN
        raise ValueError(f"--max-drop {max_drop}: must be 0 or more, in AUC, e.g. 0.001")
    name = metrics["reference"]
    own = _auc(metrics["models"].get(name), f"the model {name!r}")
    if str(baseline) in metrics["models"]:
        if str(baseline) == name:
            raise ValueError(f"--baseline {baseline} is the model to be judged itself; name another of the comparison")
        pair = metrics["paired"][str(baseline)]
        other = _auc(metrics["models"][str(baseline)], f"the model {baseline!r}")
        kind = "clustered" if pair.get("clustered_low") is not None else "delong"
        low, high = (_number(pair[f"{kind}_{end}"]) for end in ("low", "high"))
        how = "paired on the same rows, " + _UNITS[kind]
    else:
        block = _baseline_block(metrics, Path(baseline))
        other = _auc(block, f"{baseline}")
        key = "clustered_se" if own.get("clustered_se") and other.get("clustered_se") else "auc_se"
        # Standard errors of independent estimates add in squares.
        half = normal_quantile(0.95) * math.hypot(_number(own[key]), _number(other[key]))
        low, high = other["auc"] - own["auc"] - half, other["auc"] - own["auc"] + half
        how = "not paired, " + _UNITS["clustered" if key == "clustered_se" else "delong"]
    return _verdict(name, own["auc"], str(baseline), other["auc"], (low, high), max_drop, how)


_UNITS = {"clustered": "users as independent", "delong": "rows as independent"}


def _verdict(
    name: str, auc: float, baseline: str, other: float, interval: tuple[float, float], max_drop: float, how: str
) -> Verdict:
    drop, (low, high) = other - auc, interval
    if drop <= max_drop:
        status = "pass"
        reason = f"at most the {max_drop:g} allowed"
        if not high <= max_drop:
            reason += f", though these rows cannot rule out a drop of up to {high:.5f}"
    elif low > 0:
        status, reason = "fail", f"more than the {max_drop:g} allowed, and the interval lies above 0"
    else:
        status = "unsure"
        reason = f"more than the {max_drop:g} allowed, but the interval holds 0: evaluate on more rows, or pair them"
    bounds = "no interval" if math.isnan(low) else f"95% [{low:+.5f}, {high:+.5f}], {how}"
    text = (
        f"{status.upper()}: AUC of {name} {auc:.5f}, of {baseline} {other:.5f}; the drop is {drop:+.5f} ({bounds}), "
        f"{reason}"
    )
    return Verdict(status, drop, low, high, text)


def _baseline_block(metrics: Mapping[str, Any], path: Path) -> Mapping[str, Any] | None:
    """The reference model's block of a baseline `metrics.json`; raises ValueError if it has other rows."""
    if not path.is_file():
        hint = did_you_mean(str(path), metrics["models"])
        raise ValueError(f"--baseline {path} is neither a file nor a compared model{hint}; name a metrics.json")
    baseline = read_metrics(path)
    for key in ("split", "rows", "users", "exposures"):
        ours, theirs = metrics.get(key), baseline.get(key)
        if ours != theirs and not (key == "exposures" and None in (ours, theirs)):
            raise ValueError(
                f"--baseline {path} was measured on other rows: {key} {theirs} there, {ours} here; AUCs of "
                "different rows do not compare: evaluate the baseline on these"
            )
    return (baseline.get("models") or {}).get(baseline.get("reference"))


def _auc(block: Mapping[str, Any] | None, what: str) -> Mapping[str, Any]:
    if not block or block.get("auc") is None:
        raise ValueError(f"{what} has no AUC to compare: it needs rows of both classes")
    return block


def _number(value: float | None) -> float:
    return math.nan if value is None else value
