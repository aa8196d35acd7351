"""Prediction files for the tests of the job, and what the plain functions say of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

ROWS = 1200


def columns(rows: int = ROWS, seed: int = 0) -> dict[str, np.ndarray]:
    """Two models' scores (`score`, `other`) with ties, on the same rows of 60 users."""
    random = np.random.default_rng(seed)
    label = (random.random(rows) < 0.3).astype(np.float32)
    user_effect = random.normal(size=60)
    user = random.integers(0, 60, rows)
    score = (random.normal(size=rows) + label + user_effect[user]).round(2).astype(np.float32)
    other = (score + random.normal(size=rows)).astype(np.float64)
    return {
        "label": label,
        "score": score,
        "other": other,
        "probability": 1 / (1 + np.exp(-score.astype(np.float64))),
        "weight": random.choice([0.25, 1.0, 3.0], rows),
        "user_id": user,
        "item_id": random.integers(0, 90, rows),
        "timestamp": 1_700_000_000 + random.integers(0, 3 * 86_400, rows),
        "history_length": random.integers(0, 300, rows),
        "item_is_cold": random.random(rows) < 0.2,
        "country": random.choice(["de", "fr", "it"], rows),
    }


def write_parquet(values: dict[str, Any], folder: Path, files: int = 1, row_group: int = 250) -> Path:
    """A folder of files."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table(values)
    size = -(-len(table) // files)
    for part in range(files):
        pq.write_table(table.slice(part * size, size), folder / f"{part}.parquet", row_group_size=row_group)
    return folder


def write_csv(values: dict[str, Any], file: Path) -> Path:
    """One file."""
    pacsv.write_csv(pa.table(values), file)
    return file
