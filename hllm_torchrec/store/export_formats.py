"""Export of a store for other programs: Parquet files, or a FAISS inner-product index."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hllm_torchrec.common.atomic_files import atomic_folder
from hllm_torchrec.store.store import Snapshot

_BATCH = 65_536


def export_parquet(snapshot: Snapshot, target: Path, rows_per_file: int = 2_000_000) -> int:
    """Write part-NNNN.parquet files with the columns `id` and `embedding` (fixed-size list of float32).

    Returns:
        The number of rows.

    Raises:
        ValueError: `target` exists.
    """
    _refuse_existing(target)
    rows = written = 0
    writer: pq.ParquetWriter | None = None
    with atomic_folder(target) as folder:
        try:
            for keys, vectors, _ in snapshot.rows(_BATCH):
                flat = pa.array(vectors.float().numpy().reshape(-1))
                table = pa.table({"id": keys, "embedding": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])})
                if writer is None:
                    writer = pq.ParquetWriter(folder / f"part-{written:04d}.parquet", table.schema)
                    written += 1
                writer.write_table(table)
                rows += len(keys)
                if rows >= written * rows_per_file:
                    writer.close()
                    writer = None
        finally:
            if writer is not None:
                writer.close()
    return rows


def export_faiss(snapshot: Snapshot, target: Path, *, normalize: bool = True) -> int:
    """Write index.faiss (exact search by inner product) and ids.parquet, whose row i is the id of vector i.

    normalize: scale vectors to length 1, so that the inner product is the cosine similarity that HLLM is trained with.

    Returns:
        The number of rows.

    Raises:
        ValueError: `target` exists, or faiss is not installed.
    """
    _refuse_existing(target)
    faiss = import_faiss()
    index, ids = faiss.IndexFlatIP(snapshot.store.width), []
    for keys, vectors, _ in snapshot.rows(_BATCH):
        values = np.ascontiguousarray(vectors.float().numpy())
        if normalize:
            faiss.normalize_L2(values)
        index.add(values)
        ids.append(keys)
    write_index(index, pa.chunked_array(ids or [pa.array([], pa.large_string())]), target)
    return int(index.ntotal)


def write_index(index: Any, ids: pa.Array | pa.ChunkedArray, target: Path) -> None:
    """Write a FAISS index as index.faiss, and `ids` as ids.parquet, whose row i is the id of vector i.

    Raises:
        ValueError: `target` exists.
    """
    _refuse_existing(target)
    with atomic_folder(target) as folder:
        import_faiss().write_index(index, str(folder / "index.faiss"))
        pq.write_table(pa.table({"id": ids}), folder / "ids.parquet")


def import_faiss() -> Any:
    """Import faiss, an optional dependency.

    Raises:
        ValueError: faiss is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ValueError(f"faiss: {error}: install it with `pip install faiss-cpu`") from None
    return faiss


def _refuse_existing(target: Path) -> None:
    if target.exists():
        raise ValueError(f"{target}: already exists: choose another folder, or remove it")
