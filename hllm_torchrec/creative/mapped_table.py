"""Tables in memory-mapped Arrow files, and an index of raw ids in which one id is found in microseconds.

`RawIndex` and `inference.RawIds` have different purposes: the latter finds many ids at a time, and needs a hundred
microseconds for the first.
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
    """Write a table as one batch of an Arrow file, so that a row is one place in each column."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks(), max_chunksize=max(1, len(table)))


def read_mapped(path: Path, schema: pa.Schema, remedy: str) -> dict[str, pa.Array]:
    """The columns of a file of `write_mapped`, as one array each.

    Raises:
        ValueError: the file is missing, damaged, or has other columns.
    """
    with error_location(path, remedy):
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all().cast(schema)
        table.validate(full=True)
        columns = (table.column(name) for name in schema.names)
        return {n: c.chunk(0) if c.num_chunks else pa.array([], c.type) for n, c in zip(schema.names, columns)}


def check_files(folder: Path, hashes: Mapping[str, str], remedy: str) -> None:
    """Raise ValueError for a file of a folder that is missing, or whose SHA-256 is another one."""
    for name, digest in hashes.items():
        if not (folder / name).is_file() or hash_file(folder / name) != digest:
            raise ValueError(f"{folder / name}: missing or changed since it was written; {remedy}")


def read_hashes(path: Path, number: int, remedy: str) -> Hashes:
    """The sorted hashes [number] of a file, memory-mapped. Raises ValueError if the file holds something else."""
    with error_location(path, remedy):
        found = np.load(path, mmap_mode="r")
        if found.dtype != np.uint64 or found.shape != (number,) or (found[1:] < found[:-1]).any():
            raise ValueError(f"not {number} sorted hashes")
    # A plain array: indexing a memmap costs a microsecond more.
    return np.asarray(found)


def hash_id(raw: str) -> int:
    """64-bit hash of a raw id."""
    return int.from_bytes(blake2b(raw.encode(), digest_size=8).digest(), "little")


def hash_order(raw_ids: Sequence[str]) -> tuple[Hashes, Ints]:
    """Sorted hashes [n] of raw ids, and the place of each in `raw_ids`."""
    hashes = np.fromiter((hash_id(raw) for raw in raw_ids), np.uint64, len(raw_ids))
    order = np.argsort(hashes, kind="stable")
    return hashes[order], order


class RawIndex:
    """Finds the row of a raw id in a table sorted by `hash_order`.

    hashes: [n], ascending; ids: [n] the raw ids in this order, which decide.
    """

    def __init__(self, hashes: Hashes, ids: pa.Array) -> None:
        self._hashes, self._ids = hashes, ids

    def find(self, raw: str) -> int:
        """Row of an id; -1: it is not in the table."""
        wanted = np.uint64(hash_id(raw))
        at = int(self._hashes.searchsorted(wanted))
        while at < self._hashes.size and self._hashes[at] == wanted:
            if self._ids[at].as_py() == raw:
                return at
            at += 1
        return -1
