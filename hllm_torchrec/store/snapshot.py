"""Read access to the state of a store after one commit.

Legend: n requested ids, D width.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.store.files import Manifest, SegmentFacts
from hllm_torchrec.store.keys import Hashes, Keys, as_keys, hash_keys
from hllm_torchrec.store.segment import SegmentReader

if TYPE_CHECKING:
    from hllm_torchrec.store.store import EmbeddingStore


class Snapshot:
    """One committed state, memory-mapped. Lookups may run on several threads."""

    def __init__(self, store: "EmbeddingStore", manifest: Manifest) -> None:
        self.store = store
        self.version = manifest.version
        self.live = manifest.live
        self.segments = [
            SegmentReader(store.root / "runs" / run.name, run, store.width, store.dtype) for run in manifest.runs
        ]

    def __len__(self) -> int:
        """Number of keys with a vector."""
        return self.live

    @property
    def facts(self) -> tuple[SegmentFacts, ...]:
        """Manifest entries of the segments."""
        return tuple(run.facts for run in self.segments)

    def locate(self, keys: Keys) -> tuple[Ints, Ints]:
        """Return (segment [n], row [n]) of the keys [n]; segment -1: the key is unknown."""
        array = as_keys(keys, self.store.kind)
        return self._locate(array, hash_keys(array))

    def gather(self, keys: Keys, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return the vectors [n, D] of `keys` [n] (zeros if unknown), and a mask [n] of the known keys."""
        runs, rows = self.locate(keys)
        known = runs >= 0
        # Shortcut for the common case after a compaction: it needs neither a scatter nor zeros.
        if len(self.segments) == 1 and known.all():
            out = torch.empty(rows.size, self.store.width, dtype=dtype)
            self.segments[0].gather(rows, out)
            return out, torch.from_numpy(known)
        out = torch.zeros(rows.size, self.store.width, dtype=dtype)
        for number in np.unique(runs[known]).tolist():
            places = np.flatnonzero(runs == number)
            self.segments[number].gather(rows[places], out, places)
        return out, torch.from_numpy(known)

    def content_hashes(self, keys: Keys) -> tuple[Hashes, NDArray[np.bool_]]:
        """Return the content hashes [n] of `keys` [n] (0 if unknown), and a mask [n] of the known keys."""
        runs, rows = self.locate(keys)
        found = np.zeros(rows.size, np.uint64)
        for number in np.unique(runs[runs >= 0]).tolist():
            places = np.flatnonzero(runs == number)
            found[places] = self.segments[number].content_hashes[rows[places]]
        return found, runs >= 0

    def rows(self, batch: int = 65_536) -> Iterator[tuple[pa.Array, Tensor, Hashes]]:
        """Yield all live rows in blocks of k <= `batch`: keys [k], vectors [k, D] of the store's type, hashes [k]."""
        for number in range(len(self.segments)):
            yield from self.rows_of(number, batch)

    def rows_of(self, number: int, batch: int = 65_536) -> Iterator[tuple[pa.Array, Tensor, Hashes]]:
        """Yield the live rows of one segment as `rows` does."""
        run = self.segments[number]
        for keys, rows in self._live_rows(number, 0, run.facts.rows, batch):
            vectors = torch.empty(rows.size, self.store.width, dtype=run.dtype)
            run.gather(rows, vectors)
            yield keys, vectors, run.content_hashes[rows]

    def deletions_of(self, number: int) -> Iterator[pa.Array]:
        """Yield the keys that a segment deletes and that no newer segment has or deletes."""
        facts = self.segments[number].facts
        return (keys for keys, _ in self._live_rows(number, facts.rows, facts.rows + facts.deleted, 65_536))

    def oldest(self, number: int) -> "Snapshot":
        """Return a snapshot of the oldest `number` segments; its `live` is not valid."""
        older = Snapshot(self.store, Manifest(self.version, 0, ()))
        older.segments = self.segments[:number]
        return older

    def change_by(self, segment: SegmentReader) -> int:
        """Return by how much a new segment changes the number of live keys: keys added minus keys deleted."""
        if not self.segments:
            return int((segment.rows < segment.facts.rows).sum())
        change, batch = 0, 1_048_576
        for at in range(0, segment.rows.size, batch):
            rows = segment.rows[at : at + batch]
            known = self._locate(segment.take_keys(rows), segment.hashes[at : at + batch])[0] >= 0
            stored = rows < segment.facts.rows
            change += int((stored & ~known).sum()) - int((~stored & known).sum())
        return change

    def _live_rows(self, number: int, first: int, last: int, batch: int) -> Iterator[tuple[pa.Array, Ints]]:
        """Yield (keys, rows) for rows [first, last) of a segment, without rows that have been replaced.

        A row is replaced by a later row of the same key, in this segment or in a newer one.
        """
        run = self.segments[number]
        run.require_keys()
        # The index has only the last row of each key: rows that are not in it were replaced within the segment.
        is_last = np.zeros(run.facts.rows + run.facts.deleted, bool)
        is_last[run.require_rows(run.rows)] = True
        for at in range(first, last, batch):
            rows = at + np.flatnonzero(is_last[at : min(at + batch, last)])
            rows, keys = self._not_in(number + 1, rows, run.take_keys(rows))
            if rows.size:
                yield keys, rows

    def _not_in(self, newest: int, rows: Ints, keys: pa.Array) -> tuple[Ints, pa.Array]:
        """Return the rows and keys without those whose key occurs in, or is deleted by, a segment from `newest` on."""
        if newest == len(self.segments) or rows.size == 0:
            return rows, keys
        hashes = hash_keys(keys)
        replaced = np.zeros(rows.size, bool)
        for run in self.segments[newest:]:
            replaced |= run.find(hashes, keys) >= 0
        if not replaced.any():
            return rows, keys
        return rows[~replaced], keys.take(pa.array(np.flatnonzero(~replaced)))

    def _locate(self, keys: pa.Array, hashes: Hashes) -> tuple[Ints, Ints]:
        """Find (segment, row) of each key, as `locate`."""
        runs, rows = np.full(len(keys), -1, np.int64), np.full(len(keys), -1, np.int64)
        left = np.arange(len(keys))
        # Newest segment first, because the newest entry of a key is valid. A deletion is an entry too: it ends the
        # search for the key, which stays unknown even if an older segment has it.
        for number in reversed(range(len(self.segments))):
            run = self.segments[number]
            found = run.find(hashes[left], keys if left.size == len(keys) else keys.take(pa.array(left)))
            stored = (found >= 0) & (found < run.facts.rows)
            runs[left[stored]], rows[left[stored]] = number, found[stored]
            left = left[found < 0]
            if left.size == 0:
                break
        return runs, rows
