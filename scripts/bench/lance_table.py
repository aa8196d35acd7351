"""Vectors with int64 ids in Lance's format (package pylance), which bench_store.py compares with the store."""

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa

from hllm_torchrec.common.arrays import Ints

INSTALLED = find_spec("lance") is not None
REMEDY = "Lance is left out: it is not installed (pip install 'hllm_torchrec[bench]', package pylance)"


class LanceTable:
    """A Lance dataset at `path` of int64 `id` and fp16 `vector` [D]."""

    def __init__(self, path: Path, width: int) -> None:
        self.path = path
        vector = pa.list_(pa.float16(), width)
        self.schema = pa.schema([("id", pa.int64()), ("vector", vector)])

    def batch(self, ids: Ints, vectors: np.ndarray) -> pa.RecordBatch:
        """Record batch of rows; `vectors` [n, D] are not copied."""
        values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
        return pa.record_batch([pa.array(ids), values], schema=self.schema)

    def write(self, batches: Iterator[pa.RecordBatch]) -> None:
        """Write a new dataset, replacing an existing one."""
        import lance

        shutil.rmtree(self.path, ignore_errors=True)
        lance.write_dataset(pa.RecordBatchReader.from_batches(self.schema, batches), str(self.path))

    def index_ids(self) -> None:
        """Build a B-tree of the ids, by which upserts find their rows."""
        import lance

        lance.dataset(str(self.path)).create_scalar_index("id", "BTREE")

    def gather(self, rows: Ints) -> np.ndarray:
        """Vectors [n, D] of rows by row number, without a look-up of ids."""
        if not hasattr(self, "_open"):
            import lance

            self._open = lance.dataset(str(self.path))
        values = self._open.take(rows, columns=["vector"]).column("vector").combine_chunks().flatten()
        return values.to_numpy().reshape(len(rows), -1)

    def upsert(self, ids: Ints, vectors: np.ndarray) -> None:
        """Replace the vectors of existing ids and add those of new ids, as one new version."""
        import lance

        table = pa.Table.from_batches([self.batch(ids, vectors)])
        merge = lance.dataset(str(self.path)).merge_insert("id")
        merge.when_matched_update_all().when_not_matched_insert_all().execute(table)
