"""Predictions of exposures: their columns, and the Parquet files that the evaluation job reads."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hllm_torchrec.common.atomic_files import remove_folder
from hllm_torchrec.distributed.coordination import rank as this_rank
from hllm_torchrec.distributed.coordination import run_on_all_ranks, run_on_rank_zero

Columns = dict[str, NDArray]


def join_columns(parts: Sequence[Columns]) -> Columns:
    """The rows of all parts, of which there is at least one."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def write_predictions(columns: Columns, directory: Path, rank: int) -> Path:
    """Write this rank's part, beside first and then renamed."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"part-{rank:05d}.parquet"
    beside = path.with_suffix(".tmp")
    pq.write_table(pa.table(columns), beside)
    beside.rename(path)
    return path


def save_predictions(columns: Columns, directory: Path) -> None:
    """Write every rank's part; what the directory held is replaced once all parts are written. Collective."""
    beside = directory.with_name(f"{directory.name}.tmp")

    def replace() -> None:
        remove_folder(directory)
        beside.rename(directory)

    run_on_rank_zero(lambda: remove_folder(beside))
    run_on_all_ranks(lambda: str(write_predictions(columns, beside, this_rank())))
    run_on_rank_zero(replace)
