"""Memory-mapped Arrow tables, and `RawIndex`, which finds the row of one raw id in a few microseconds.

`RawIndex` serves lookups of single ids. `inference.raw_ids.RawIds` is for many ids per call; its vectorized hash costs
about 160 microseconds per call.
"""

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.common.hashing import hash_file
from hllm_torchrec.data.validation import error_location

Hashes = NDArray[np.uint64]


def write_mapped(path: Path, table: pa.Table) -> None:
    """Write a table to an Arrow file as a single record batch, so that each column is read as one array."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks(), max_chunksize=max(1, len(table)))


def read_mapped(path: Path, schema: pa.Schema, remedy: str) -> dict[str, pa.Array]:
    """Map a file that `write_mapped` wrote into memory; returns each column as one array.

    Raises:
        ValueError: the file is missing, damaged, or has other columns.
    """
    with error_location(path, remedy):
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all().cast(schema)
        table.validate(full=True)
        columns = (table.column(name) for name in schema.names)
        return {n: c.chunk(0) if c.num_chunks else pa.array([], c.type) for n, c in zip(schema.names, columns)}


def check_files(folder: Path, hashes: Mapping[str, str], remedy: str) -> None:
    """Compare the SHA-256 of files in a folder with `hashes` (file name to hexadecimal digest).

    Raises:
        ValueError: a file is missing, or its digest differs.
    """
    for name, digest in hashes.items():
        if not (folder / name).is_file() or hash_file(folder / name) != digest:
            raise ValueError(f"{folder / name}: missing or changed since it was written; {remedy}")


def read_hashes(path: Path, number: int, remedy: str) -> Hashes:
    """Map an .npy file of sorted id hashes, uint64 [number], into memory.

    Raises:
        ValueError: the file does not hold such an array.
    """
    with error_location(path, remedy):
        found = np.load(path, mmap_mode="r")
        if found.dtype != np.uint64 or found.shape != (number,) or (found[1:] < found[:-1]).any():
            raise ValueError(f"not {number} sorted hashes")
    # A plain array on the same memory: indexing an np.memmap costs one microsecond more.
    return np.asarray(found)


def hash_id(raw: str) -> int:
    """64-bit hash of a raw id."""
    return int.from_bytes(blake2b(raw.encode(), digest_size=8).digest(), "little")


def hash_order(raw_ids: Sequence[str]) -> tuple[Hashes, Ints]:
    """Return the sorted hashes [n] of raw ids, and the permutation [n] of `raw_ids` that sorts them."""
    hashes = np.fromiter((hash_id(raw) for raw in raw_ids), np.uint64, len(raw_ids))
    order = np.argsort(hashes, kind="stable")
    return hashes[order], order


class RawIndex:
    """Index of a table whose rows are sorted by the hash of their raw id (`hash_order`).

    Ids with equal hashes are told apart by comparing the ids themselves.

    Args:
        hashes: [n] ascending.
        ids: [n] raw ids in the same order.
    """

    def __init__(self, hashes: Hashes, ids: pa.Array) -> None:
        self._hashes, self._ids = hashes, ids

    def find(self, raw: str) -> int:
        """Return the row of a raw id, or -1 if the table does not contain the id."""
        wanted = np.uint64(hash_id(raw))
        at = int(self._hashes.searchsorted(wanted))
        while at < self._hashes.size and self._hashes[at] == wanted:
            if self._ids[at].as_py() == raw:
                return at
            at += 1
        return -1
