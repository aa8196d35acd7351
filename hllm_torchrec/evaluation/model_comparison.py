"""Models compared on the same exposures: prediction directories in, the content of `metrics.json` out."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hllm_torchrec.data.validation import error_location
from hllm_torchrec.distributed.array_collectives import SINGLE_RANK
from hllm_torchrec.evaluation.metrics_schema import SCHEMA_VERSION as SCHEMA_VERSION
from hllm_torchrec.evaluation.offline_evaluation import EvaluationSettings, evaluate_predictions
from hllm_torchrec.evaluation.prediction_files import column_names
from hllm_torchrec.evaluation.prediction_rows import (
    PredictionModel,
    RowBatch,
    cold_slices,
    history_slices,
    row_keys,
    time_slices,
)

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
    timestamp: np.ndarray | None = None
    """int64 seconds UTC, if the files have them."""


class _InMemorySource:
    """Predictions in memory, all of the same exposures, as the source of `job.evaluate`."""

    weighted, has_users = False, True

    def __init__(self, loaded: Mapping[str, Predictions]):
        self.models = [
            PredictionModel(name, (), "score", None if model.probability is None else "probability")
            for name, model in loaded.items()
        ]
        self._loaded, self._first = loaded, next(iter(loaded.values()))
        self.rows = len(self._first.label)

    def score_type(self, model: PredictionModel) -> np.dtype:
        """Of the predictions that `read_predictions` gives."""
        return self._loaded[model.name].score.dtype

    def batches(self, rank: int, world_size: int, size: int) -> Iterator[RowBatch]:
        """All rows at once: they are in memory already, on one rank."""
        assert world_size == 1
        first = self._first
        slices = [cold_slices(first.item_is_cold), history_slices(first.history_length)]
        if first.timestamp is not None:
            slices += time_slices(first.timestamp)
        yield RowBatch(
            first.label == 1,
            None,
            {name: model.score for name, model in self._loaded.items()},
            {name: model.probability for name, model in self._loaded.items() if model.probability is not None},
            first.user_id,
            row_keys(first.label == 1, None, first.user_id, first.item_id),
            slices,
        )


def read_predictions(directory: str | Path) -> Predictions:
    """Reads `part-*.parquet` of a prediction directory and sorts the rows by (user_id, position).

    Raises:
        ValueError: no such files, a missing column, a null where there may be none, a label that is not 0 or 1, a
            score that is NaN, a probability outside 0..1 or null in some rows only, an exposure that appears
            twice; naming file, row and column, or the exposure.
    """
    files = sorted(Path(directory).glob("part-*.parquet"))
    if not files:
        raise ValueError(f"{directory} holds no part-*.parquet; pass the directory that a model's predictions went to")
    tables = [_read_file(file) for file in files]
    shared = [name for name in tables[0].column_names if all(name in part.column_names for part in tables)]
    with error_location(directory, "predict again"):
        table = pa.concat_tables([part.select(shared) for part in tables])
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
    times = table["timestamp"].to_numpy().astype(np.int64)[order] if "timestamp" in table.column_names else None
    return Predictions(**columns, probability=None if probability is None else probability[order], timestamp=times)


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
        draws: resamples of the bootstrap over users, 0 for none.
        seed: of the bootstrap.
        retrieval, provenance: carried over.

    Returns:
        A dict that JSON can hold, see `docs/evaluation.md`; the same keys as `job.evaluate`, with `retrieval` and
        `provenance`.

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
    first = {reference: rows} | loaded
    metrics = evaluate_predictions(
        _InMemorySource(first), EvaluationSettings(split=split, draws=draws, seed=seed), SINGLE_RANK
    )
    metrics["models"] = {name: metrics["models"][name] for name in loaded}
    return metrics | {
        "retrieval": None if retrieval is None else dict(retrieval),
        "provenance": dict(provenance or {}),
    }


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """The short table for a terminal: one line a model, best AUC first.

    The AUC's interval is DeLong's (rows as independent), that of the difference takes users as independent.
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
    caption = f"{metrics['split']}: {metrics['rows']:,} exposures{users}"
    return "\n".join([caption, *text])


def format_number(value: float | None, signed: bool = False) -> str:
    """Four decimals, or `n/a` for an undefined metric."""
    return "n/a" if value is None else f"{value:+.4f}" if signed else f"{value:.4f}"


def format_interval(low: float | None, high: float | None, signed: bool = False) -> str:
    """`[low, high]`, or `n/a` where there is none."""
    return "n/a" if low is None or high is None else f"[{format_number(low, signed)}, {format_number(high, signed)}]"


def format_with_interval(value: float | None, low: float | None, high: float | None, signed: bool = False) -> str:
    """`value [low, high]`, or the value alone where there is no interval."""
    text = format_number(value, signed)
    return text if low is None or high is None else f"{text} {format_interval(low, high, signed)}"


def by_users(block: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """The interval with users as independent units: the bootstrap's if there is one, else the formula's."""
    kind = "bootstrap" if block.get("bootstrap_low") is not None else "clustered"
    return block.get(f"{kind}_low"), block.get(f"{kind}_high")


def _read_file(file: Path) -> pa.Table:
    """The columns of one file, with nulls where they may be only."""
    found = column_names(file)
    missing = [name for name in COLUMNS if name not in found]
    if missing:
        raise ValueError(f"{file} has no column {missing[0]}; it has {', '.join(found)}; write all of {list(COLUMNS)}")
    with error_location(file, "predict again"):
        table = pq.read_table(file, columns=[*COLUMNS, *(["timestamp"] if "timestamp" in found else [])])
        table.validate(full=True)
    for name in table.column_names:
        kind = table[name].type
        whole = name != "timestamp" and np.dtype(COLUMNS[name]).kind == "i"
        if not (pa.types.is_integer(kind) or pa.types.is_boolean(kind) or (pa.types.is_floating(kind) and not whole)):
            rule = "whole numbers" if whole else "numbers"
            raise ValueError(f"{file}: column {name} is {kind}; it must hold {rule}; predict again")
    for name in COLUMNS:
        if name != "probability" and table[name].null_count:
            row = int(table[name].is_null().to_numpy().argmax())
            raise ValueError(f"{file}: column {name} is null in row {row}; only probability may be null; leave it out")
    _check_values(file, table)
    return table


def _check_values(file: Path, table: pa.Table) -> None:
    label, score, probability = (
        table[name].to_numpy().astype(np.float64) for name in ("label", "score", "probability")
    )
    rules = {
        "label": (label, (label == 0) | (label == 1), "a label is 0 or 1; leave rows without a label out"),
        "score": (score, ~np.isnan(score), "a score is a number; look in log.jsonl for the step of the first nan loss"),
        "probability": (probability, ~((probability < 0) | (probability > 1)), "a probability lies in 0..1"),
    }
    for name, (values, good, rule) in rules.items():
        if not good.all():
            row = int((~good).argmax())
            raise ValueError(f"{file}: column {name} is {values[row]:g} in row {row}; {rule}")


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
