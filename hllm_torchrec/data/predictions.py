"""Predictions of exposures: their columns, and reading and writing of the evaluation job's Parquet files."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hllm_torchrec.common.atomic_files import atomic_folder
from hllm_torchrec.common.machine_errors import path_in_errors
from hllm_torchrec.distributed.coordination import rank as this_rank
from hllm_torchrec.distributed.coordination import run_on_all_ranks, run_on_rank_zero

PredictionColumns = dict[str, NDArray]


@dataclass(frozen=True)
class Predictions:
    """One model's predictions, sorted by (user_id, position); every array has n rows."""

    user_id: np.ndarray
    position: np.ndarray
    item_id: np.ndarray
    label: np.ndarray
    score: np.ndarray
    probability: np.ndarray | None
    """None if the model has only scores."""
    history_length: np.ndarray
    item_is_cold: np.ndarray
    timestamp: np.ndarray | None = None
    """int64 seconds UTC; None if the files do not have them."""


def read_predictions(directory: str | Path) -> Predictions:
    """Read the predictions of a job into memory for inspection, without validation; `hllm evaluate` uses another
    reader.

    Raises:
        ValueError: a column is missing.
        OSError: `directory` does not exist.
    """
    table = pq.read_table(directory).sort_by([("user_id", "ascending"), ("position", "ascending")])
    columns = {name: table[name].to_numpy() for name in Predictions.__dataclass_fields__ if name in table.column_names}
    missing = [name for name in Predictions.__dataclass_fields__ if name not in columns and name != "timestamp"]
    if missing:
        raise ValueError(f"{directory} has no column {missing[0]}; it has {', '.join(table.column_names)}")
    if table["probability"].null_count:  # models that have only scores write nulls
        columns["probability"] = None
    for name in ("label", "score", "probability"):
        if columns[name] is not None:
            columns[name] = columns[name].astype(np.float64)
    return Predictions(**columns)


def join_columns(parts: Sequence[PredictionColumns]) -> PredictionColumns:
    """Concatenate the rows of all parts (at least one)."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def write_predictions(columns: PredictionColumns, directory: Path, rank: int) -> Path:
    """Write this rank's part under a temporary name, then rename it."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"part-{rank:05d}.parquet"
    temporary = path.with_suffix(".tmp")
    with path_in_errors(path):
        pq.write_table(pa.table(columns), temporary)
    temporary.rename(path)
    return path


def save_predictions(columns: PredictionColumns, directory: Path) -> None:
    """Write every rank's part; when all parts are written, they replace the directory's contents. Collective."""
    with ExitStack() as replacement:  # rank 0's; empty on other ranks
        # Each call waits for all ranks, so no rank is still writing when the directory is replaced.
        folder = run_on_rank_zero(lambda: replacement.enter_context(atomic_folder(directory, replace=True)))
        run_on_all_ranks(lambda: str(write_predictions(columns, folder, this_rank())))
        run_on_rank_zero(replacement.close)
