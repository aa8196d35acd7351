"""Models compared on the same exposures: prediction directories in, the content of `metrics.json` out."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hllm_torchrec.metrics.auc import delong_test, roc_curve
from hllm_torchrec.metrics.bootstrap import percentile_interval, user_bootstrap
from hllm_torchrec.metrics.ranking import finite_or_none, ranking_metrics, reliability_curve, standard_slices

SCHEMA_VERSION = 1

COLUMNS = {
    "user_id": np.int64,
    "position": np.int64,
    "item_id": np.int64,
    "label": np.float64,
    "score": np.float64,
    "probability": np.float64,
    "history_length": np.int64,
    "item_is_cold": np.bool_,
}
"""What is read of a prediction file. Only `probability` may be null (a model without probabilities)."""


@dataclass(frozen=True)
class Predictions:
    """One model's predictions, sorted by (user_id, position); every array has n rows."""

    user_id: np.ndarray
    position: np.ndarray
    item_id: np.ndarray
    label: np.ndarray
    score: np.ndarray
    probability: np.ndarray | None
    """None if the model gives scores only."""
    history_length: np.ndarray
    item_is_cold: np.ndarray


def read_predictions(directory: str | Path) -> Predictions:
    """Reads `part-*.parquet` of a prediction directory and sorts the rows by (user_id, position).

    Raises:
        ValueError: no such files, a missing column, a null where there may be none, a probability that is
            null in some rows only, an exposure that appears twice; naming file, column or exposure.
    """
    files = sorted(Path(directory).glob("part-*.parquet"))
    if not files:
        raise ValueError(f"{directory} holds no part-*.parquet; pass the directory that a model's predictions went to")
    table = pa.concat_tables([_read_file(file) for file in files])
    columns = {name: table[name].to_numpy().astype(kind) for name, kind in COLUMNS.items() if name != "probability"}
    missing = table["probability"].null_count
    if missing not in (0, len(table)):
        raise ValueError(
            f"{directory}: column probability is null in {missing} of {len(table)} rows; a model gives a "
            "probability for every row or for none; write nulls only"
        )
    probability = None if missing else table["probability"].to_numpy().astype(np.float64)
    order = np.lexsort((columns["position"], columns["user_id"]))
    columns = {name: values[order] for name, values in columns.items()}
    _check_no_duplicates(directory, columns["user_id"], columns["position"])
    return Predictions(**columns, probability=None if probability is None else probability[order])


def compare(
    predictions: Mapping[str, str | Path],
    reference: str,
    *,
    split: str = "test",
    draws: int = 1000,
    seed: int = 0,
    retrieval: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Metrics of every model and paired differences to the reference, as they stand in `metrics.json`.

    Args:
        predictions: model → directory of its predictions (`read_predictions`). All models must have scored
            the same exposures, which are paired by (user_id, position).
        reference: the model that the others are compared with; a difference is other minus reference.
        split: name of the split, only carried over.
        draws: resamples of the bootstrap over users.
        seed: of the bootstrap.
        retrieval, provenance: carried over.

    Returns:
        A dict that JSON can hold: `schema_version`, `split`, `reference`, `rows`, `users`, `models` (model →
        `ranking_metrics` with `bootstrap_low`, `bootstrap_high`, the AUC's interval over users), `paired`
        (other model → `difference`, `delong_low`, `delong_high`, `delong_p`, `bootstrap_low`,
        `bootstrap_high`), `curves` (model → points of the ROC and reliability curves, for the report),
        `bootstrap` (draws, seed), `retrieval` and `provenance`.

    Raises:
        ValueError: unknown reference, unreadable predictions (`read_predictions`), models with different
            exposures, or with different labels or items for the same exposure.
    """
    if reference not in predictions:
        raise ValueError(f"reference {reference!r} is not among the models {sorted(predictions)}; choose one of them")
    loaded = {name: read_predictions(directory) for name, directory in predictions.items()}
    rows = loaded[reference]
    for name in loaded:
        _check_same_exposures(name, loaded[name], reference, rows)
    slices = standard_slices(rows.history_length, rows.item_is_cold)
    resampled = user_bootstrap(
        rows.label, {name: model.score for name, model in loaded.items()}, rows.user_id, draws, seed
    )
    models = {}
    for name, model in loaded.items():
        models[name] = ranking_metrics(model.label, model.score, model.probability, model.user_id, slices)
        models[name] |= _bounds("bootstrap", *percentile_interval(resampled[name]))
    return {
        "schema_version": SCHEMA_VERSION,
        "split": split,
        "reference": reference,
        "rows": len(rows.label),
        "users": models[reference]["users"],
        "models": models,
        "paired": {
            name: _paired(model, rows, resampled[name] - resampled[reference])
            for name, model in loaded.items()
            if name != reference
        },
        "curves": {name: _curves(model) for name, model in loaded.items()},
        "bootstrap": {"draws": draws, "seed": seed},
        "retrieval": None if retrieval is None else dict(retrieval),
        "provenance": dict(provenance or {}),
    }


def table(metrics: Mapping[str, Any]) -> str:
    """The short table for a terminal: one line a model, best AUC first.

    The AUC's interval is DeLong's (rows as independent), that of the difference the bootstrap over users.
    """
    reference = metrics["reference"]
    header = ("model", "AUC [95%]", f"difference to {reference} [95% by users]", "GAUC", "log loss")
    lines: list[tuple[str, ...]] = [header]
    for name, model in sorted(metrics["models"].items(), key=lambda entry: -(entry[1]["auc"] or 0.0)):
        paired = metrics["paired"].get(name)
        lines.append(
            (
                name,
                with_interval(model["auc"], model["auc_low"], model["auc_high"]),
                "reference"
                if paired is None
                else with_interval(
                    paired["difference"], paired["bootstrap_low"], paired["bootstrap_high"], signed=True
                ),
                number(model["gauc"]),
                number(model["log_loss"]),
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    lines.insert(1, tuple("-" * width for width in widths))
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    caption = f"{metrics['split']}: {metrics['rows']:,} exposures of {metrics['users']:,} users"
    return "\n".join([caption, *text])


def number(value: float | None, signed: bool = False) -> str:
    """Four decimals, or `n/a` for an undefined metric."""
    return "n/a" if value is None else f"{value:+.4f}" if signed else f"{value:.4f}"


def interval(low: float | None, high: float | None, signed: bool = False) -> str:
    """`[low, high]`, or `n/a` where there is none."""
    return "n/a" if low is None or high is None else f"[{number(low, signed)}, {number(high, signed)}]"


def with_interval(value: float | None, low: float | None, high: float | None, signed: bool = False) -> str:
    """`value [low, high]`, or the value alone where there is no interval."""
    text = number(value, signed)
    return text if low is None or high is None else f"{text} {interval(low, high, signed)}"


def _read_file(file: Path) -> pa.Table:
    """The columns of one file, with nulls where they may be only."""
    found = pq.read_schema(file).names
    missing = [name for name in COLUMNS if name not in found]
    if missing:
        raise ValueError(f"{file} has no column {missing[0]}; it has {', '.join(found)}; write all of {list(COLUMNS)}")
    table = pq.read_table(file, columns=list(COLUMNS))
    for name in COLUMNS:
        if name != "probability" and table[name].null_count:
            row = int(table[name].is_null().to_numpy().argmax())
            raise ValueError(f"{file}: column {name} is null in row {row}; only probability may be null; leave it out")
    return table


def _check_no_duplicates(directory: str | Path, user_id: np.ndarray, position: np.ndarray) -> None:
    repeated = (user_id[1:] == user_id[:-1]) & (position[1:] == position[:-1])
    if repeated.any():
        row = int(repeated.argmax())
        raise ValueError(
            f"{directory}: {int(repeated.sum())} exposures appear more than once, for example user_id "
            f"{user_id[row]}, position {position[row]}; each may appear once; empty the directory and "
            "predict again"
        )


def _check_same_exposures(name: str, model: Predictions, reference: str, rows: Predictions) -> None:
    same_keys = np.array_equal(model.user_id, rows.user_id) and np.array_equal(model.position, rows.position)
    if not same_keys:
        own = set(zip(model.user_id.tolist(), model.position.tolist()))
        wanted = set(zip(rows.user_id.tolist(), rows.position.tolist()))
        user_id, position = min(own ^ wanted)
        raise ValueError(
            f"the predictions of {name!r} miss {len(wanted - own)} of the {len(wanted)} exposures of "
            f"{reference!r} and have {len(own - wanted)} that it misses, for example user_id {user_id}, "
            f"position {position}; all models must score the same exposures; predict with each on the same "
            "dataset and split"
        )
    for column in ("label", "item_id"):
        differs = getattr(model, column) != getattr(rows, column)
        if differs.any():
            row = int(differs.argmax())
            raise ValueError(
                f"{column} of user_id {rows.user_id[row]}, position {rows.position[row]} is "
                f"{getattr(model, column)[row]:g} in the predictions of {name!r} and "
                f"{getattr(rows, column)[row]:g} in those of {reference!r}; predict with each on the same "
                "dataset and split"
            )


def _paired(model: Predictions, reference: Predictions, differences: np.ndarray) -> dict[str, float | None]:
    test = delong_test(reference.label, model.score, reference.score)
    return {
        "difference": finite_or_none(test.difference),
        **_bounds("delong", test.low, test.high),
        "delong_p": finite_or_none(test.p_value),
        **_bounds("bootstrap", *percentile_interval(differences)),
    }


def _bounds(name: str, low: float, high: float) -> dict[str, float | None]:
    return {f"{name}_low": finite_or_none(low), f"{name}_high": finite_or_none(high)}


def _curves(model: Predictions) -> dict[str, Any]:
    """Rounded points, a few kB a model, so that the report needs no predictions."""
    roc = roc_curve(model.label, model.score, points=200)
    curves: dict[str, Any] = {
        "roc": {
            "false_positive_rate": roc.false_positive_rate.round(5).tolist(),
            "true_positive_rate": roc.true_positive_rate.round(5).tolist(),
        },
        "reliability": None,
    }
    if model.probability is not None:
        reliability = reliability_curve(model.label, model.probability)
        curves["reliability"] = {
            "mean_probability": reliability.mean_probability.round(5).tolist(),
            "observed_rate": reliability.observed_rate.round(5).tolist(),
            "rows": reliability.rows.tolist(),
        }
    return curves
