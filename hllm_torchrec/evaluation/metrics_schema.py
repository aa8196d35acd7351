"""Schema of `metrics.json`: its parts as plain numbers, None for undefined metrics (JSON has no NaN)."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hllm_torchrec.metrics.exact_auc import RankStatistics
from hllm_torchrec.metrics.intervals import PairedDifference, logit_interval, wald_difference
from hllm_torchrec.metrics.metric import Value
from hllm_torchrec.metrics.probabilities import ReliabilityCurve
from hllm_torchrec.metrics.registry import METRICS
from hllm_torchrec.metrics.user_metrics import GAUC
from hllm_torchrec.metrics.user_statistics import UserStatistics

SCHEMA_VERSION = 2
"""Version 1 did not have PR-AUC, recall at precision, intervals over users by formula, or weights."""

READABLE = (1, 2)
"""Versions that the report and the gate can read."""

_AGAIN = "evaluate again to replace it"


def retrieval_alone(split: str, retrieval: Mapping[str, Any] | None, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a `metrics.json` that has only retrieval metrics."""
    head: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "split": split, "models": {}}
    return head | {"retrieval": retrieval, "provenance": provenance}


def model_block(
    statistics: RankStatistics, probability: dict[str, float], users: UserStatistics | None, place: int
) -> dict[str, Any]:
    """One model's metrics; `probability` may be empty, `place` is the model's index in `users`."""
    by_user = {} if users is None else {key: values[place] for key, values in users.metrics.items()}
    found: dict[str, Value] = {**statistics.metrics, **by_user, **probability}
    block = slice_block(statistics) | {"auc_se": finite_or_none(statistics.interval.standard_error)}
    block |= {metric.key: _plain(found.get(metric.key, math.nan)) for metric in METRICS}
    if users is None:
        names = ("users", "gauc_users", "gauc_users_left_out", "clustered_se", "gauc_se")
        undefined = bounds("clustered", math.nan, math.nan) | bounds("gauc", math.nan, math.nan)
        return block | dict.fromkeys(names) | undefined
    clustered = logit_interval(statistics.interval.auc, users.standard_error[place])
    within = logit_interval(users.metrics[GAUC.key][place], users.gauc_error[place])
    return block | {
        "users": users.users,
        "gauc_users": users.users_counted,
        "gauc_users_left_out": users.users - users.users_counted,
        "clustered_se": finite_or_none(users.standard_error[place]),
        **bounds("clustered", clustered.low, clustered.high),
        "gauc_se": finite_or_none(users.gauc_error[place]),
        **bounds("gauc", within.low, within.high),
    }


def finite_or_none(value: float) -> float | None:
    """The number, or None for NaN and infinities, which JSON cannot represent."""
    return float(value) if math.isfinite(value) else None


def _plain(value: Value) -> float | dict[str, float | None] | None:
    if isinstance(value, dict):
        return {name: finite_or_none(number) for name, number in value.items()}
    return finite_or_none(value)


def slice_block(statistics: RankStatistics) -> dict[str, Any]:
    """Number of rows and positives, AUC and its interval, as a block of `metrics.json`."""
    return {
        "rows": statistics.rows,
        "positives": statistics.positives,
        "auc": finite_or_none(statistics.interval.auc),
        "auc_low": finite_or_none(statistics.interval.low),
        "auc_high": finite_or_none(statistics.interval.high),
    }


def paired_block(delong: PairedDifference, users: UserStatistics | None, place: int) -> dict[str, Any]:
    """Difference of a model from the reference: DeLong's test, and the test with users as independent units.

    place: index of the model in `users`.
    """
    error = users.difference_error[place] if users else math.nan
    clustered = wald_difference(delong.difference, error)
    gauc = users.metrics[GAUC.key] if users else []
    within = wald_difference(gauc[place] - gauc[0], users.gauc_difference_error[place]) if users else clustered
    return {
        "difference": finite_or_none(delong.difference),
        **bounds("delong", delong.low, delong.high),
        "delong_p": finite_or_none(delong.p_value),
        **bounds("clustered", clustered.low, clustered.high),
        "clustered_p": finite_or_none(clustered.p_value),
        "gauc_difference": finite_or_none(within.difference if users else math.nan),
        **bounds("gauc", within.low, within.high),
    }


def bounds(name: str, low: float, high: float) -> dict[str, float | None]:
    """Entries `name_low` and `name_high`; NaN becomes None."""
    return {f"{name}_low": finite_or_none(low), f"{name}_high": finite_or_none(high)}


def curves_block(statistics: RankStatistics, reliability: ReliabilityCurve | None) -> dict[str, Any]:
    """Rounded points of the curves, a few kB per model, so that the report does not need the predictions."""
    false_positive, recall, precision = statistics.curve.round(5).tolist()
    found: dict[str, Any] = {
        "roc": {"false_positive_rate": false_positive, "true_positive_rate": recall},
        "pr": {"recall": recall, "precision": precision},
        "reliability": None,
    }
    if reliability is not None:
        found["reliability"] = {
            "mean_probability": reliability.mean_probability.round(5).tolist(),
            "observed_rate": reliability.observed_rate.round(5).tolist(),
            "rows": reliability.rows.tolist(),
        }
    return found


def read_metrics(path: Path) -> dict[str, Any]:
    """Read a `metrics.json`. Access to a missing field of the result, or of an object in it, raises ValueError.

    Raises:
        ValueError: the file is not JSON, or has an unsupported schema version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); {_AGAIN}") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version not in READABLE:
        reads = ", ".join(map(str, READABLE))
        raise ValueError(f"{path} has schema_version {version}, this program reads {reads}; {_AGAIN}")
    return _Fields(content, path)


@contextmanager
def read_fields(path: Path) -> Iterator[None]:
    """Context manager for code that only reads fields of a `metrics.json`; errors for wrong types name the file.

    Raises:
        ValueError: a field has a value of a wrong type.
    """
    try:
        yield
    except (AttributeError, TypeError, KeyError, IndexError, ValueError) as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path} has a value of a wrong type ({error}); {_AGAIN}") from error


class _Fields(dict[str, Any]):
    """Object in a JSON file; the error for a missing field has the file and the dotted path of the field."""

    def __init__(self, content: Mapping[str, Any], path: Path, place: str = "") -> None:
        self._path, self._place = path, place
        for name, value in content.items():
            self[name] = _Fields(value, path, f"{place}{name}.") if isinstance(value, dict) else value

    def __missing__(self, name: str) -> Any:
        raise ValueError(f"{self._path}: {self._place}{name} is missing; {_AGAIN}")
