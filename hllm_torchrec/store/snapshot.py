"""A store as one commit left it.

Legend: n ids asked for, D width.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from hllm_torchrec.store.keys import Hashes, Keys, as_keys, hash_keys
from hllm_torchrec.store.layout import Manifest, RunFacts
from hllm_torchrec.store.run import RunReader

if TYPE_CHECKING:
    from hllm_torchrec.store.store import EmbeddingStore

Ints = NDArray[np.int64]


class Snapshot:
    """One committed state, memory-mapped. Lookups may run on several threads."""

    def __init__(self, store: "EmbeddingStore", manifest: Manifest) -> None:
        self.store = store
        self.version = manifest.version
        self.live = manifest.live
        self.runs = [RunReader(store.root / "runs" / run.name, run, store.width, store.dtype) for run in manifest.runs]

    def __len__(self) -> int:
        """Keys with a vector."""
        return self.live

    @property
    def facts(self) -> tuple[RunFacts, ...]:
        """What a manifest says of the runs."""
        return tuple(run.facts for run in self.runs)

    def locate(self, keys: Keys) -> tuple[Ints, Ints]:
        """(run, row) of each key [n]; run -1: unknown."""
        array = as_keys(keys, self.store.kind)
        return self._locate(array, hash_keys(array))

    def gather(self, keys: Keys, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Vectors [n, D] of `keys` [n], zeros where unknown, and whether each is known, bool [n]."""
        runs, rows = self.locate(keys)
        known = runs >= 0
        if len(self.runs) == 1 and known.all():
            out = torch.empty(rows.size, self.store.width, dtype=dtype)
            self.runs[0].gather(rows, out)
            return out, torch.from_numpy(known)
        out = torch.zeros(rows.size, self.store.width, dtype=dtype)
        for number in np.unique(runs[known]).tolist():
            places = np.flatnonzero(runs == number)
            self.runs[number].gather(rows[places], out, places)
        return out, torch.from_numpy(known)

    def marks(self, keys: Keys) -> tuple[Hashes, NDArray[np.bool_]]:
        """Marks [n] of `keys` [n] (0 where unknown), and whether each is known."""
        runs, rows = self.locate(keys)
        found = np.zeros(rows.size, np.uint64)
        for number in np.unique(runs[runs >= 0]).tolist():
            places = np.flatnonzero(runs == number)
            found[places] = self.runs[number].marks[rows[places]]
        return found, runs >= 0

    def rows(self, batch: int = 65_536) -> Iterator[tuple[pa.Array, Tensor, Hashes]]:
        """All live rows, `batch` at a time: keys [k], vectors [k, D] of the store's type, marks [k]."""
        for number in range(len(self.runs)):
            yield from self.rows_of(number, batch)

    def rows_of(self, number: int, batch: int = 65_536) -> Iterator[tuple[pa.Array, Tensor, Hashes]]:
        """The live rows of one run, `batch` at a time: keys [k], vectors [k, D] of the store's type, marks [k]."""
        run = self.runs[number]
        for keys, rows in self._standing(number, 0, run.facts.rows, batch):
            vectors = torch.empty(rows.size, self.store.width, dtype=run.dtype)
            run.gather(rows, vectors)
            yield keys, vectors, run.marks[rows]

    def deletions_of(self, number: int, batch: int = 65_536) -> Iterator[pa.Array]:
        """Keys that a run takes away and no newer run has again."""
        facts = self.runs[number].facts
        return (keys for keys, _ in self._standing(number, facts.rows, facts.rows + facts.deleted, batch))

    def of_first(self, number: int) -> "Snapshot":
        """The oldest `number` runs alone; its `live` says nothing."""
        older = Snapshot(self.store, Manifest(self.version, 0, ()))
        older.runs = self.runs[:number]
        return older

    def change_by(self, run: RunReader) -> int:
        """Keys with a vector that a run to come adds, less those that it takes away."""
        if not self.runs:
            return int((run.rows < run.facts.rows).sum())
        change, batch = 0, 1_048_576
        for at in range(0, run.rows.size, batch):
            rows = run.rows[at : at + batch]
            known = self._locate(run.take_keys(rows), run.hashes[at : at + batch])[0] >= 0
            stored = rows < run.facts.rows
            change += int((stored & ~known).sum()) - int((~stored & known).sum())
        return change

    def _standing(self, number: int, first: int, last: int, batch: int) -> Iterator[tuple[pa.Array, Ints]]:
        """Those rows of a run, `first` to `last`, that none in it or a newer one replaces, and their keys."""
        run = self.runs[number]
        run.require_keys()
        counts = np.zeros(run.facts.rows + run.facts.deleted, bool)
        counts[run.require_rows(run.rows)] = True
        for at in range(first, last, batch):
            rows = at + np.flatnonzero(counts[at : min(at + batch, last)])
            rows, keys = self._not_in(number + 1, rows, run.take_keys(rows))
            if rows.size:
                yield keys, rows

    def _not_in(self, newest: int, rows: Ints, keys: pa.Array) -> tuple[Ints, pa.Array]:
        """Those whose key no run from `newest` on has or deletes."""
        if newest == len(self.runs) or rows.size == 0:
            return rows, keys
        hashes = hash_keys(keys)
        there = np.zeros(rows.size, bool)
        for run in self.runs[newest:]:
            there |= run.find(hashes, keys) >= 0
        return (rows, keys) if not there.any() else (rows[~there], keys.take(pa.array(np.flatnonzero(~there))))

    def _locate(self, keys: pa.Array, hashes: Hashes) -> tuple[Ints, Ints]:
        """Newest run first; a key that a run deletes is unknown, whatever older runs have."""
        runs, rows = np.full(len(keys), -1, np.int64), np.full(len(keys), -1, np.int64)
        left = np.arange(len(keys))
        for number in reversed(range(len(self.runs))):
            run = self.runs[number]
            found = run.find(hashes[left], keys if left.size == len(keys) else keys.take(pa.array(left)))
            stored = (found >= 0) & (found < run.facts.rows)
            runs[left[stored]], rows[left[stored]] = number, found[stored]
            left = left[found < 0]
            if left.size == 0:
                break
        return runs, rows
