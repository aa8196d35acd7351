"""A segment: the immutable files with the rows of one commit, in a folder runs/<name>/ of the store.

    keys.arrow          [n + d] keys in the order of writing, deleted keys last (Arrow file, one column)
    marks.npy           uint64 [n] hash of the content that each vector was made from (of an item: its text; of a user:
                        number of events and last second)
    hashes.npy          uint64 [m] sorted hashes of the distinct keys
    rows.npy            int64 [m] row of each hash, the last one of a key that was written twice; n and above: a deleted
                        key
    vectors-NNNN.bin    vectors of the rows, `rows_per_file` in each file but the last

Legend: n vectors, d deleted keys, m = distinct keys of both, D width.
"""

import os
import secrets
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.common.atomic_files import sync_folder
from hllm_torchrec.common.hashing import crc32_file
from hllm_torchrec.common.machine_errors import path_in_errors
from hllm_torchrec.data.validation import error_location
from hllm_torchrec.store.files import SegmentFacts
from hllm_torchrec.store.keys import Hashes, KeyKind, as_keys, hash_keys

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_STORAGE: dict[str, np.dtype[Any]] = {"fp32": np.dtype("<f4"), "fp16": np.dtype("<f2"), "bf16": np.dtype("<i2")}
_BITS = {
    torch.float32: (torch.int32, 0x7F80_0000),
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
}
"""Type -> integer type of the same size, and mask of the exponent bits, which are all ones only in infinities and
NaN."""
_IN_CACHE = 2**17
"""Numbers that are checked at a time, so that the temporary array stays in the CPU's cache."""
FILE_BYTES = 2**32
"""Maximum size in bytes of a file of vectors; a segment has as many files as it needs."""
_VERIFY = "the store is damaged; `hllm store verify` says where: restore it or build it again"
_AHEAD = 4
"""Maximum number of writes with a pending checksum; the vectors of each stay in memory."""
_SYNCED_BYTES = 2**27
"""Number of bytes after which a file is synced in the background, so that the last sync is short."""


class SegmentReader:
    """A memory-mapped segment. Its open files stay readable after a compaction has deleted them.

    Raises:
        ValueError: a file is missing, does not have the size that the manifest states, or is malformed.
    """

    def __init__(self, folder: Path, facts: SegmentFacts, width: int, dtype: str) -> None:
        damage = next(find_segment_damage(folder, facts, contents=False), None)
        if damage is not None:
            raise ValueError(f"{damage}: the store is damaged; restore it or build it again")
        self.facts, self.width, self.dtype = facts, width, DTYPES[dtype]
        self.folder = folder
        with error_location(folder, _VERIFY):
            self._open(folder, dtype)
            self._check_shapes()

    def _check_shapes(self) -> None:
        """Check that the shapes and types of the files agree; their contents are checked when they are used."""
        vectors = sum(len(file) for file in self.files)
        rows, every = self.facts.rows, self.facts.rows + self.facts.deleted
        due = (("hashes", self.hashes, np.uint64, None), ("rows", self.rows, np.int64, self.hashes.size))
        for name, array, kind, size in (*due, ("marks", self.content_hashes, np.uint64, rows)):
            if array.dtype != kind or array.ndim != 1 or size not in (None, array.size):
                raise ValueError(f"{name}.npy holds {array.dtype} {list(array.shape)}")
        if vectors != rows or self.hashes.size > every:
            raise ValueError(f"there are {self.hashes.size} keys and {vectors} vectors, not {every} and {rows}")
        if any(len(file) != self.rows_per_file for file in self.files[:-1]):
            raise ValueError("the files of vectors are not of one size")

    def require_rows(self, rows: Ints) -> Ints:
        """Return `rows` [k], which were read from the index; raise ValueError with the path if one is out of range."""
        if rows.size and not 0 <= rows.min() <= rows.max() < self.facts.rows + self.facts.deleted:
            raise ValueError(f"{self.folder / 'rows.npy'}: is damaged; {_VERIFY}")
        return rows

    def require_keys(self) -> None:
        """Raise ValueError with the path if the number of keys is not that of the manifest."""
        if len(self.keys) != self.facts.rows + self.facts.deleted:
            raise ValueError(f"{self.folder / 'keys.arrow'}: has {len(self.keys)} keys; {_VERIFY}")

    def take_keys(self, rows: Ints) -> pa.Array:
        """Return the keys of `rows` [k]; raise ValueError with the path if the offset of a string is out of range."""
        if rows.size and rows.max() >= len(self.keys):
            self.require_keys()
        # Arrow's `take` does not check offsets: with those of a damaged file it would read outside of the memory map
        # and crash the process.
        for chunk in self.keys.chunks:  # there is at most one
            if not pa.types.is_integer(chunk.type) and rows.size:
                offsets = np.frombuffer(chunk.buffers()[1], np.int64)[chunk.offset :]
                data = chunk.buffers()[2]
                starts, ends, size = offsets[rows], offsets[rows + 1], data.size if data is not None else 0
                if starts.min() < 0 or (starts > ends).any() or ends.max() > size:
                    raise ValueError(f"{self.folder / 'keys.arrow'}: is damaged; {_VERIFY}")
        with error_location(self.folder / "keys.arrow", _VERIFY):
            found = contiguous_keys(self.keys.take(pa.array(rows)))
            found.validate(full=True)  # checks that the text is valid UTF-8
        return found

    def _open(self, folder: Path, dtype: str) -> None:
        # np.asarray gives plain arrays over the memory maps: indexing an np.memmap takes microseconds per call.
        self.hashes, self.rows, self.content_hashes = (
            np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in ("hashes", "rows", "marks")
        )
        with pa.memory_map(str(folder / "keys.arrow")) as source:
            self.keys = pa.ipc.open_file(source).read_all()["key"]
        if self.keys.type not in (pa.int64(), pa.large_string()) or self.keys.num_chunks > 1 or self.keys.null_count:
            raise ValueError(f"keys.arrow holds {self.keys.type} in {self.keys.num_chunks} pieces")
        self.keys.validate()
        # Sort by length first: the number of file 10,000 has five digits.
        names = (name for name in self.facts.files if name.startswith("vectors-"))
        self.files = [self._mapped(folder / name, dtype) for name in sorted(names, key=lambda name: (len(name), name))]
        self.rows_per_file = self.files[0].shape[0] if self.files else 1

    def _mapped(self, path: Path, dtype: str) -> NDArray[Any]:
        return np.asarray(np.memmap(path, _STORAGE[dtype], mode="r")).reshape(-1, self.width)

    def find(self, hashes: Hashes, keys: pa.Array) -> Ints:
        """Find the row of each key [k]; -1: not in this segment; facts.rows and above: this segment deletes the key."""
        low = self._insertion_points(hashes)
        found = np.full(hashes.size, -1, np.int64)
        # Equal hashes are adjacent. Round `step` compares the keys that are still missing with the entry `step` after
        # the first equal hash; a second round is needed only if the hashes of different keys collide.
        for step in range(self.hashes.size):
            at = low + step
            same = np.flatnonzero((at < self.hashes.size) & (found < 0))
            same = same[self.hashes[at[same]] == hashes[same]]
            if same.size == 0:
                break
            rows = self.require_rows(self.rows[at[same]])
            if not pa.types.is_integer(keys.type):
                equal = pc.equal(self.take_keys(rows), keys.take(pa.array(same)))
                equal = equal.to_numpy(zero_copy_only=False)
                same, rows = same[equal], rows[equal]
            found[same] = rows
            if pa.types.is_integer(keys.type):
                break  # the hash is the key
        return found

    def _insertion_points(self, hashes: Hashes) -> Ints:
        """Find the insertion point [k] of each hash [k] among the sorted hashes."""
        size = self.hashes.size
        # Consecutive integer ids: the position is the difference from the first id. The difference of a smaller id
        # wraps around to a huge number, which the minimum turns into `size`: out of range, like all unknown ids.
        if size and int(self.hashes[-1]) - int(self.hashes[0]) == size - 1:
            with np.errstate(over="ignore"):
                return np.minimum(hashes - self.hashes[0], np.uint64(size)).astype(np.int64)
        order = np.argsort(hashes)  # in sorted order, successive searches touch the same pages
        points = np.empty(hashes.size, np.int64)
        points[order] = np.searchsorted(self.hashes, hashes[order], side="left")
        return points

    def gather(self, rows: Ints, out: Tensor, places: Ints | None = None) -> None:
        """Copy the vectors of `rows` [k] to the rows `places` [k] of `out` (None: to out, in order).

        out: fp32, or the segment's type.
        """
        same = out.dtype == self.dtype and out.device.type == "cpu"
        target = self._raw(out) if same else None
        if len(self.files) == 1 and places is None and target is not None:
            self._take(0, rows, target)
            return
        order, picked = self._picked(rows)
        at = (np.arange(rows.size) if places is None else places)[order]
        if target is not None:
            target[at] = picked  # numpy copies entire rows; torch's indexed copy of fp16 is slower
        else:
            out[torch.from_numpy(at)] = torch.from_numpy(picked).view(self.dtype).to(out.dtype)

    def _picked(self, rows: Ints) -> tuple[Ints | slice, NDArray[Any]]:
        """Read rows file by file; return (order, vectors), where vectors[i] is the vector of rows[order[i]]."""
        picked = np.empty((rows.size, self.width), self.files[0].dtype if self.files else np.float32)
        if len(self.files) <= 1:
            if rows.size:
                self._take(0, rows, picked)
            return slice(None), picked
        numbers = rows // self.rows_per_file
        order = np.argsort(numbers, kind="stable")
        ends = np.searchsorted(numbers[order], np.arange(len(self.files) + 1))
        for number in np.unique(numbers).tolist():
            part = slice(ends[number], ends[number + 1])
            self._take(number, rows[order[part]] - number * self.rows_per_file, picked[part])
        return order, picked

    def _take(self, number: int, rows: Ints, out: NDArray[Any]) -> None:
        # mode="raise" would copy through a buffer. Rows from the index are in range, so "clip" has no effect on them.
        np.take(self.files[number], rows, axis=0, mode="clip", out=out)

    def _raw(self, values: Tensor) -> NDArray[Any]:
        """View values as the numpy type of the files (bf16, which numpy lacks, as int16)."""
        return (values.view(torch.int16) if self.dtype == torch.bfloat16 else values).numpy()


def contiguous_keys(keys: pa.ChunkedArray | pa.Array) -> pa.Array:
    """Combine keys into one array."""
    array = keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys
    return pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array


def all_finite(vectors: Tensor) -> bool:
    """Return whether all numbers are finite. Tests their bits, because CPUs have no fast arithmetic in fp16."""
    bits, exponent = _BITS[vectors.dtype]
    flat = vectors.detach().cpu().contiguous().view(bits).view(-1).numpy()
    masked = np.empty(min(flat.size, _IN_CACHE), flat.dtype)
    for at in range(0, flat.size, _IN_CACHE):
        block = flat[at : at + _IN_CACHE]
        if np.bitwise_and(block, exponent, out=masked[: block.size]).max() == exponent:
            return False
    return True


def rows_per_file(width: int, dtype: str, file_bytes: int) -> int:
    """Number of rows in a file of vectors, at least one."""
    return max(1, file_bytes // (width * DTYPES[dtype].itemsize))


class SegmentWriter:
    """Writes the files of a segment; vectors are streamed. After `finish`, a manifest must name the segment."""

    def __init__(self, segments: Path, width: int, dtype: str, kind: KeyKind, file_bytes: int = FILE_BYTES) -> None:
        self.name = f"{secrets.token_hex(8)}"
        self.folder = segments / self.name
        self.folder.mkdir(parents=True)
        self.width, self.dtype, self.kind = width, dtype, kind
        self.rows_per_file = rows_per_file(width, dtype, file_bytes)
        self.rows = 0
        self._keys: list[pa.Array] = []
        self._deleted: list[pa.Array] = []
        self._content_hashes: list[Hashes] = []
        self._file: _VectorFile | None = None
        self._files: dict[str, Future[tuple[int, int]]] = {}
        # Checksums and syncs of written vectors run while the next ones are written.
        self._checksums, self._syncs = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def add(self, keys: pa.Array, vectors: Tensor, content_hashes: Hashes) -> None:
        """Append rows: keys [k], vectors [k, D], content hashes [k]. Cancels an earlier `delete` of these keys."""
        values = vectors.detach().to("cpu", DTYPES[self.dtype]).contiguous()
        raw = (values.view(torch.int16) if self.dtype == "bf16" else values).numpy().reshape(-1, self.width)
        at = 0
        while at < len(raw):
            if self._file is None:
                path = self.folder / f"vectors-{len(self._files):04d}.bin"
                self._file = _VectorFile(path, self._checksums, self._syncs)
            space = self.rows_per_file - self.rows % self.rows_per_file
            part = raw[at : at + space]
            self._file.write(part)
            at, self.rows = at + len(part), self.rows + len(part)
            if self.rows % self.rows_per_file == 0:
                self._close_file()
        self._deleted = [part.filter(pc.invert(pc.is_in(part, value_set=keys))) for part in self._deleted]
        self._keys.append(keys)
        self._content_hashes.append(np.asarray(content_hashes, np.uint64))

    def delete(self, keys: pa.Array) -> None:
        """Mark keys as deleted, in earlier segments and among the rows added before."""
        self._deleted.append(keys)

    def finish(self) -> SegmentFacts:
        """Write the index, sync all files and return the facts for the manifest."""
        with path_in_errors(self.folder):
            return self._finish()

    def _finish(self) -> SegmentFacts:
        if self._file is not None:
            self._close_file()
        # Deleted keys come last: their rows are n and above, and they override rows of the same keys written earlier.
        keys = pa.chunked_array([*self._keys, *self._deleted], as_keys([], self.kind).type)
        deleted = sum(len(part) for part in self._deleted)
        with pa.OSFile(str(self.folder / "keys.arrow"), "wb") as sink:
            table = pa.table({"key": keys}).combine_chunks()  # one chunk: lookups index its buffers directly
            with pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
        np.save(self.folder / "marks.npy", np.concatenate([np.empty(0, np.uint64), *self._content_hashes]))
        hashes, rows = sorted_index(keys)
        np.save(self.folder / "hashes.npy", hashes)
        np.save(self.folder / "rows.npy", rows)
        files = {}
        for name in ("keys.arrow", "marks.npy", "hashes.npy", "rows.npy"):
            _sync(self.folder / name)
            files[name] = ((self.folder / name).stat().st_size, crc32_file(self.folder / name))
        files |= {name: written.result() for name, written in self._files.items()}
        # Syncing a folder writes the names in it to the disk: those of the files, and that of the segment's folder.
        sync_folder(self.folder)
        sync_folder(self.folder.parent)
        self._checksums.shutdown()
        self._syncs.shutdown()
        return SegmentFacts(self.name, self.rows, deleted, files)

    def _close_file(self) -> None:
        assert self._file is not None
        self._files[self._file.path.name] = self._file.close()
        self._file = None


class _VectorFile:
    """A file of vectors that is being written; checksums and syncs of the written part run on other threads."""

    def __init__(self, path: Path, checksums: ThreadPoolExecutor, syncs: ThreadPoolExecutor) -> None:
        self.path, self._checksums, self._syncs = path, checksums, syncs
        self._file = path.open("wb", buffering=0)
        self._checksum = self._unsynced = 0
        self._pending: list[Future[None]] = []
        self._synced: list[Future[None]] = []

    def write(self, rows: NDArray[Any]) -> None:
        """Append rows."""
        data = memoryview(rows.data).cast("B")
        self._pending.append(self._checksums.submit(self._add, data))
        at = 0
        with path_in_errors(self.path):
            while at < len(data):  # one call to write(2) writes at most 2 GiB
                at += self._file.write(data[at:])
        self._unsynced += len(data)
        if self._unsynced >= _SYNCED_BYTES:
            self._synced.append(self._syncs.submit(os.fsync, self._file.fileno()))
            self._unsynced = 0
        # Bounds memory: wait for the oldest checksum if too many are pending.
        while len(self._pending) > _AHEAD:
            self._pending.pop(0).result()

    def close(self) -> Future[tuple[int, int]]:
        """Sync and close the file in the background; the result of the future is (bytes, CRC-32)."""
        return self._syncs.submit(self._close)

    def _close(self) -> tuple[int, int]:
        for written in (*self._synced, *self._pending):
            written.result()
        os.fsync(self._file.fileno())
        size = self._file.tell()
        self._file.close()
        return size, self._checksum

    def _add(self, data: memoryview) -> None:
        self._checksum = zlib.crc32(data, self._checksum)


def sorted_index(keys: pa.ChunkedArray) -> tuple[Hashes, Ints]:
    """Return the sorted hashes [m] of the distinct keys, and the row [m] of each: the last row of a repeated key."""
    parts = [hash_keys(chunk) for chunk in keys.chunks]
    hashes = np.concatenate([np.empty(0, np.uint64), *parts])
    order = np.argsort(hashes)
    hashes = hashes[order]
    repeated = np.flatnonzero(hashes[1:] == hashes[:-1])
    if repeated.size == 0:
        return hashes, order.astype(np.int64)
    kept = np.ones(hashes.size, bool)
    # Equal hashes are either of one key that was written twice (the larger row is kept) or of two different keys
    # (both are kept). Equal hashes are rare, so a Python loop is fast enough.
    seen: dict[tuple[int, Any], int] = {}
    for at in np.union1d(repeated, repeated + 1).tolist():
        key = (int(hashes[at]), keys[int(order[at])].as_py())
        earlier = seen.setdefault(key, at)
        if order[earlier] < order[at]:
            seen[key] = at
        kept[at] = seen[key] == at
        kept[earlier] &= seen[key] == earlier
    return hashes[kept], order[kept].astype(np.int64)


def find_segment_damage(folder: Path, facts: SegmentFacts, *, contents: bool = True) -> Iterator[str]:
    """Yield a line for each damaged file of a segment: compares the sizes and, if `contents`, the checksums."""
    for name, (size, checksum) in sorted(facts.files.items()):
        damage = _file_damage(folder / name, size, checksum if contents else None)
        if damage is not None:
            yield damage


def _file_damage(path: Path, size: int, checksum: int | None) -> str | None:
    try:
        found = path.stat().st_size
        if found != size:
            return f"{path} has {found} bytes instead of {size}"
        if checksum is not None and crc32_file(path) != checksum:
            return f"{path}: the contents are not what was written"
    except FileNotFoundError:  # at any moment, because another process may compact the store
        return f"{path} is missing"
    return None


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
