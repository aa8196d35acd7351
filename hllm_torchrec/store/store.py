"""The embedding store: id -> vector, with atomic incremental commits and readers that never see half of one.

    store = EmbeddingStore.create("stores/items", width=576, dtype="fp16", facts=facts)
    with store.writer() as writer:                       # one writer at a time
        writer.upsert(["i1", "i2"], vectors, marks)
        writer.delete(["i9"])
        writer.commit()                                  # nothing before this line is visible, all after it
    vectors, known = store.snapshot().gather(["i2", "i7"])

A commit is a run of new rows (see `run`); a key's newest run counts. `compact` joins all runs into one and so removes
deleted vectors for good. By arithmetic, 10^8 ids x 2,048 in fp16 are 410 GB of vectors in 382 files and 2.4 GB of
index (hash, row and mark of each key), all memory-mapped: a lookup touches a few pages of it.

Legend: n ids asked for, D width.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from hllm_torchrec.store.keys import Hashes, KeyKind, Keys, as_keys, hash_keys
from hllm_torchrec.store.layout import (
    FORMAT,
    Manifest,
    RunFacts,
    read_json,
    read_manifest,
    replace_file,
    write_manifest,
    writer_lock,
)
from hllm_torchrec.store.run import DTYPES, FILE_BYTES, RunReader, RunWriter, find_damage

Ints = NDArray[np.int64]
_ATTEMPTS = 10


class EmbeddingStore:
    """A store's folder. Make one with `create`, reach one with `open`."""

    def __init__(self, root: Path, identity: Mapping[str, Any]) -> None:
        self.root = root
        self.identity = dict(identity)
        self.width: int = identity["width"]
        self.dtype: str = identity["dtype"]
        self.kind: KeyKind = identity["keys"]
        self.facts: dict[str, Any] = identity["facts"]
        """What made the vectors: weights, model configuration, tokeniser."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the facts."""
        return fingerprint(self.facts)

    @classmethod
    def create(
        cls, path: str | Path, width: int, dtype: str = "fp16", keys: KeyKind = "string", facts: Any = None
    ) -> "EmbeddingStore":
        """An empty store at `path`.

        Args:
            dtype: "fp32", "fp16" or "bf16".
            facts: what makes the vectors, as JSON: see `require`.

        Raises:
            ValueError: there is something at `path`, or a value is not allowed.
        """
        root = Path(path)
        if dtype not in DTYPES or width < 1 or keys not in ("string", "int64"):
            raise ValueError(
                f"{root}: width={width}, dtype={dtype!r}, keys={keys!r}: the width is at least 1, the type one of "
                f"{', '.join(DTYPES)}, keys are string or int64"
            )
        if root.exists() and any(root.iterdir()):
            raise ValueError(f"{root}: is there already: open it, or choose another folder")
        (root / "runs").mkdir(parents=True, exist_ok=True)
        identity = {"format": FORMAT, "width": width, "dtype": dtype, "keys": keys, "facts": facts or {}}
        write_manifest(root, Manifest(0, 0, ()))
        replace_file(root / "store.json", json.dumps(identity, indent=1))  # last: with it, the store is there
        return cls(root, identity)

    @classmethod
    def open(cls, path: str | Path) -> "EmbeddingStore":
        """The store at `path`.

        Raises:
            ValueError: there is none, it is damaged, or of another format.
        """
        root = Path(path)
        if not (root / "store.json").is_file():
            raise ValueError(f"{root}: no embedding store (no store.json); `hllm embed` makes one")
        identity = read_json(root / "store.json")
        if identity.get("format") != FORMAT:
            raise ValueError(f"{root}: format {identity.get('format')!r}; this version reads {FORMAT}")
        if identity.get("dtype") not in DTYPES or not isinstance(identity.get("width"), int) or "facts" not in identity:
            raise ValueError(f"{root / 'store.json'}: width, dtype or facts are missing: the file is damaged")
        return cls(root, identity)

    def require(self, facts: Any) -> None:
        """Refuse to mix vectors of different models.

        Raises:
            ValueError: the store's facts are others; says which and the remedy.
        """
        if fingerprint(facts) == self.fingerprint:
            return
        names = sorted(k for k in {*self.facts, *facts} if self.facts.get(k) != facts.get(k))
        raise ValueError(
            f"{self.root}: its vectors were made by another model ({', '.join(names)} differ): vectors of two models "
            "cannot be compared; embed everything into a new store, or use the checkpoint that made this one"
        )

    def snapshot(self) -> "Snapshot":
        """The committed state as it is now; later commits do not change it.

        Raises:
            ValueError: the store is damaged.
        """
        for attempt in range(_ATTEMPTS):
            manifest = read_manifest(self.root)
            try:
                return Snapshot(self, manifest)
            except (OSError, ValueError):
                # A compaction may have removed the runs of the manifest that was read.
                if attempt == _ATTEMPTS - 1 or read_manifest(self.root).version == manifest.version:
                    raise
        raise AssertionError("unreachable")

    @contextmanager
    def writer(self) -> Iterator["StoreWriter"]:
        """The only writer; what it has not committed when the block ends is dropped.

        Raises:
            ValueError: another process is writing.
        """
        with writer_lock(self.root):
            self._remove_leftovers()
            writer = StoreWriter(self)
            try:
                yield writer
            finally:
                writer.drop()

    def compact(self) -> None:
        """Rewrite all live rows as one run and remove the old ones: deleted vectors are gone from the disk.

        Snapshots that are open keep what they see (the system frees the space when they close).

        Raises:
            ValueError: another process is writing.
        """
        with writer_lock(self.root):
            self._remove_leftovers()
            snapshot = self.snapshot()
            run = self.run_writer()
            for keys, vectors, marks in snapshot.rows():
                run.add(keys, vectors, marks)
            facts = run.finish()
            write_manifest(self.root, Manifest(snapshot.version + 1, facts.rows, (facts,) if facts.rows else ()))
            self._remove_leftovers()

    def run_writer(self) -> RunWriter:
        """A run of this store that another process than the writer's may write; `StoreWriter.commit` takes it in."""
        return RunWriter(self.root / "runs", self.width, self.dtype, self.kind, FILE_BYTES)

    def verify(self) -> list[str]:
        """Files that are not as they were written, one line each; none: all is well."""
        while True:
            manifest = read_manifest(self.root)
            found = [line for run in manifest.runs for line in find_damage(self.root / "runs" / run.name, run)]
            if not found or read_manifest(self.root).version == manifest.version:  # else: a compaction went by
                return found

    def _remove_leftovers(self) -> None:
        """Runs that no manifest names, left by a crash or a compaction, and half-written small files."""
        named = {run.name for run in read_manifest(self.root).runs}
        for folder in (self.root / "runs").iterdir():
            if folder.name not in named:
                shutil.rmtree(folder)
        for file in self.root.glob(".*.json-*"):
            file.unlink(missing_ok=True)


class Snapshot:
    """One committed state, memory-mapped. Lookups may run on several threads."""

    def __init__(self, store: EmbeddingStore, manifest: Manifest) -> None:
        self.store = store
        self.version = manifest.version
        self.live = manifest.live
        self.runs = [RunReader(store.root / "runs" / run.name, run, store.width, store.dtype) for run in manifest.runs]

    def __len__(self) -> int:
        """Keys with a vector."""
        return self.live

    def locate(self, keys: Keys) -> tuple[Ints, Ints]:
        """(run, row) of each key [n]; run -1: unknown."""
        return self._locate(as_keys(keys, self.store.kind))

    def gather(self, keys: Keys, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Vectors [n, D] of `keys` [n], zeros where unknown, and whether each is known, bool [n]."""
        runs, rows = self.locate(keys)
        known = torch.from_numpy(runs >= 0)
        if len(self.runs) == 1 and bool(known.all()):
            out = torch.empty(rows.size, self.store.width, dtype=dtype)
            self.runs[0].gather(rows, out)
            return out, known
        out = torch.zeros(rows.size, self.store.width, dtype=dtype)
        for number, run in enumerate(self.runs):
            places = np.flatnonzero(runs == number)
            run.gather(rows[places], out, torch.from_numpy(places))
        return out, known

    def marks(self, keys: Keys) -> tuple[Hashes, NDArray[np.bool_]]:
        """Marks [n] of `keys` [n] (0 where unknown), and whether each is known."""
        runs, rows = self.locate(keys)
        found = np.zeros(rows.size, np.uint64)
        for number, run in enumerate(self.runs):
            places = np.flatnonzero(runs == number)
            found[places] = run.marks[rows[places]]
        return found, runs >= 0

    def rows(self, batch: int = 65_536) -> Iterator[tuple[pa.Array, Tensor, Hashes]]:
        """All live rows, `batch` at a time: keys [k], vectors [k, D] of the store's type, marks [k]."""
        for number, run in enumerate(self.runs):
            for at in range(0, run.facts.rows, batch):
                keys = _plain(run.keys.slice(at, min(batch, run.facts.rows - at)))
                places, found = self._locate(keys)
                here = np.arange(at, at + len(keys))
                live = np.flatnonzero((places == number) & (found == here))
                if live.size == 0:
                    continue
                vectors = torch.empty(live.size, self.store.width, dtype=run.dtype)
                run.gather(here[live], vectors)
                yield keys.take(pa.array(live)), vectors, np.asarray(run.marks[here[live]])

    def _locate(self, keys: pa.Array) -> tuple[Ints, Ints]:
        """Newest run first; a key that a run deletes is unknown, whatever older runs have."""
        runs, rows = np.full(len(keys), -1, np.int64), np.full(len(keys), -1, np.int64)
        left, hashes = np.arange(len(keys)), hash_keys(keys)
        for number in reversed(range(len(self.runs))):
            run = self.runs[number]
            asked = keys if left.size == len(keys) else keys.take(pa.array(left))
            found = run.find(hashes[left], asked)
            stored = (found >= 0) & (found < run.facts.rows)
            runs[left[stored]], rows[left[stored]] = number, found[stored]
            left = left[found < 0]
            if left.size == 0:
                break
        return runs, rows


class StoreWriter:
    """Collects the rows of the next commit; made by `EmbeddingStore.writer`."""

    def __init__(self, store: EmbeddingStore) -> None:
        self.store = store
        self._run: RunWriter | None = None

    def upsert(self, keys: Keys, vectors: Tensor, marks: Hashes | None = None) -> None:
        """Set vectors [n, D] of `keys` [n]. marks [n]: what each was made from, to find what has changed.

        Raises:
            ValueError: shapes do not fit, a value is not finite (in the store's type), or keys are of another type.
        """
        array = as_keys(keys, self.store.kind)
        if vectors.shape != (len(array), self.store.width):
            raise ValueError(f"vectors: shape {tuple(vectors.shape)}: must be [{len(array)}, {self.store.width}]")
        stored = vectors.to(DTYPES[self.store.dtype])
        if not bool(torch.isfinite(stored).all()):
            row = int((~torch.isfinite(stored)).any(dim=1).nonzero()[0])
            raise ValueError(
                f"vectors: row {row} (key {array[row].as_py()!r}) is not finite in {self.store.dtype}: look at the "
                "model, or use a store of fp32"
            )
        self._writing().add(array, stored, np.zeros(len(array), np.uint64) if marks is None else marks)

    def delete(self, keys: Keys) -> None:
        """Take vectors away; keys without one are ignored. `compact` then removes the bytes."""
        self._writing().delete(as_keys(keys, self.store.kind))

    def commit(self, others: Sequence[RunFacts] = ()) -> int:
        """Make everything since the last commit visible at once; returns the new version.

        others: finished runs that other processes have written into the store's folder (see `RunWriter`).
        """
        runs = list(others)
        if self._run is not None:
            runs.append(self._run.finish())
            self._run = None
        state = self.store.snapshot()
        if not runs:
            return state.version
        for run in runs:
            after = Manifest(state.version, 0, (*(r.facts for r in state.runs), run))
            following = Snapshot(self.store, after)
            following.live = len(state) + _change(state, following)
            state = following
        write_manifest(self.store.root, Manifest(state.version + 1, len(state), tuple(r.facts for r in state.runs)))
        return state.version + 1

    def drop(self) -> None:
        """Forget what has not been committed."""
        if self._run is not None:
            shutil.rmtree(self._run.folder)
            self._run = None

    def _writing(self) -> RunWriter:
        if self._run is None:
            self._run = self.store.run_writer()
        return self._run


def _change(before: Snapshot, after: Snapshot, batch: int = 1_048_576) -> int:
    """Keys with a vector that the last run adds, less those that it takes away."""
    run, change = after.runs[-1], 0
    for at in range(0, run.rows.size, batch):
        rows = np.asarray(run.rows[at : at + batch])
        known = before.locate(_plain(run.keys.take(pa.array(rows))))[0] >= 0
        stored = rows < run.facts.rows
        change += int((stored & ~known).sum()) - int((~stored & known).sum())
    return change


def fingerprint(facts: Any) -> str:
    """SHA-256 of facts as canonical JSON."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _plain(keys: pa.ChunkedArray | pa.Array) -> pa.Array:
    """One array of keys with offsets from 0."""
    array = keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys
    return pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array


__all__ = ["EmbeddingStore", "RunFacts", "Snapshot", "StoreWriter", "fingerprint"]
