"""The embedding store: id -> vector, with atomic incremental commits and consistent snapshots for readers.

    store = EmbeddingStore.create("stores/items", width=576, dtype="fp16", facts=facts)
    with store.writer() as writer:                       # one writer at a time
        writer.upsert(["i1", "i2"], vectors, content_hashes)
        writer.delete(["i9"])
        writer.commit()                                  # nothing before this line is visible, all after it
    vectors, known = store.snapshot().gather(["i2", "i7"])

A commit adds a segment of new rows (`store/segment.py`); a key's newest segment counts. Many segments are merged
(`store/compaction.py`); `compact` merges all of them, and so erases deleted vectors from the disk. By arithmetic, 10^8
ids x 2,048 in fp16 are 410 GB of vectors in 96 files and 2.4 GB of index (hash, row and content hash of each key) in
addition to the keys, all memory-mapped: a lookup touches a few pages of it (docs/store.md).

Legend: n requested ids, D width.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hllm_torchrec.common.atomic_files import replace_file, sync_folder
from hllm_torchrec.common.hashing import hash_json
from hllm_torchrec.common.urls import url_of
from hllm_torchrec.store.compaction import first_to_merge, merge_segments
from hllm_torchrec.store.files import (
    FORMAT,
    Manifest,
    SegmentFacts,
    read_manifest,
    read_store_json,
    write_manifest,
    writer_lock,
)
from hllm_torchrec.store.keys import Hashes, KeyKind, Keys, as_keys
from hllm_torchrec.store.remote_store import RemoteStore, local_store
from hllm_torchrec.store.segment import (
    DTYPES,
    FILE_BYTES,
    SegmentReader,
    SegmentWriter,
    all_finite,
    find_segment_damage,
)
from hllm_torchrec.store.snapshot import Snapshot

_ATTEMPTS = 10
MAX_WIDTH = 1 << 20
"""Upper bound of the width of a vector, exclusive."""


class EmbeddingStore:
    """A store in a folder. `create` makes a new one, `open` opens an existing one."""

    def __init__(self, root: Path, identity: Mapping[str, Any]) -> None:
        self.root = root
        self.identity = dict(identity)
        self.width: int = identity["width"]
        self.dtype: str = identity["dtype"]
        self.kind: KeyKind = identity["keys"]
        self.facts: dict[str, Any] = identity["facts"]
        """Origin of the vectors: weights, model configuration, tokenizer."""
        self.copy_of: str | None = None
        """The URL of which `root` is a read-only copy."""
        self.published: RemoteStore | None = None
        """Destination of this job's commits, if the store is at a URL."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the facts."""
        return hash_json(self.facts)

    @property
    def identity_hash(self) -> str:
        """Names the model of the vectors, their width and the type of keys: sixteen hexadecimal digits."""
        return hash_json([self.facts, self.width, self.kind])[:16]

    @classmethod
    def create(
        cls, path: str | Path, width: int, dtype: str = "fp16", keys: KeyKind = "string", facts: Any = None
    ) -> "EmbeddingStore":
        """Create an empty store at `path`.

        Args:
            dtype: "fp32", "fp16" or "bf16".
            facts: origin of the vectors, as JSON; see `require`.

        Raises:
            ValueError: `path` exists and is not an empty folder, or a value is not allowed.
        """
        root = Path(path)
        if dtype not in DTYPES or width < 1 or keys not in ("string", "int64"):
            raise ValueError(
                f"{root}: width={width}, dtype={dtype!r}, keys={keys!r}: the width is at least 1, the type one of "
                f"{', '.join(DTYPES)}, keys are string or int64"
            )
        if root.exists() and any(root.iterdir()):
            raise ValueError(f"{root}: already exists: open it, or choose another folder")
        (root / "runs").mkdir(parents=True, exist_ok=True)
        sync_folder(root.resolve().parent)
        identity = {"format": FORMAT, "width": width, "dtype": dtype, "keys": keys, "facts": facts or {}}
        write_manifest(root, Manifest(0, 0, ()))
        replace_file(root / "store.json", json.dumps(identity, indent=1))  # last: without it the store does not exist
        return cls(root, identity)

    @classmethod
    def open(cls, path: str | Path) -> "EmbeddingStore":
        """Open the store at `path`; for a URL, a read-only copy of its present state.

        Raises:
            ValueError: there is no store, it is damaged, or of another format.
        """
        url = url_of(path)
        if url is not None:
            store = cls.open(local_store(url))
            store.copy_of = url
            return store
        root = Path(path)
        if not (root / "store.json").is_file():
            raise ValueError(f"{root}: no embedding store (no store.json); `hllm embed` makes one")
        identity = read_store_json(root / "store.json")
        if identity.get("format") != FORMAT:
            raise ValueError(
                f"{root}: format {repr(identity.get('format'))[:100]}; this version reads {FORMAT}: make it again"
            )
        width, rule = identity.get("width"), None
        if not isinstance(width, int) or isinstance(width, bool) or not 1 <= width < MAX_WIDTH:
            rule = f"width must be a number from 1 to {MAX_WIDTH - 1}"
        elif str(identity.get("dtype")) not in DTYPES or identity.get("keys") not in ("string", "int64"):
            rule = f"dtype must be one of {', '.join(DTYPES)}, keys string or int64"
        elif not isinstance(identity.get("facts"), dict):
            rule = "facts must be an object"
        if rule:
            raise ValueError(f"{root / 'store.json'}: {rule}: the file is damaged")
        return cls(root, identity)

    def require(self, facts: Any) -> None:
        """Refuse to mix vectors of different models.

        Raises:
            ValueError: the store's facts differ; names which, and the remedy.
        """
        if hash_json(facts) == self.fingerprint:
            return
        names = sorted(k for k in {*self.facts, *facts} if self.facts.get(k) != facts.get(k))
        raise ValueError(
            f"{self.root}: its vectors were made by another model ({', '.join(names)} differ): vectors of two models "
            "cannot be compared; embed everything into a new store, or use the checkpoint that made this one"
        )

    def snapshot(self) -> "Snapshot":
        """Open the present committed state; later commits do not change the snapshot.

        Raises:
            ValueError: the store is damaged.
        """
        for attempt in range(_ATTEMPTS):
            manifest = read_manifest(self.root)
            try:
                return Snapshot(self, manifest)
            except (OSError, ValueError):
                # A compaction may have removed segments between reading the manifest and opening them: then the
                # manifest has changed, and the new one is tried. If it has not changed, the error is real.
                if attempt == _ATTEMPTS - 1 or read_manifest(self.root).version == manifest.version:
                    raise
        raise AssertionError("unreachable")

    @contextmanager
    def writer(self) -> Iterator["StoreWriter"]:
        """Context manager of the only writer; rows that are not committed when it ends are discarded.

        Raises:
            ValueError: another process is writing, or this is a read-only copy.
        """
        self._may_be_written()
        with writer_lock(self.root):
            self._remove_leftovers()
            writer = StoreWriter(self)
            try:
                yield writer
            finally:
                writer.rollback()

    def compact(self) -> None:
        """Rewrite all live rows as one segment and remove the old ones: this erases deleted vectors from the disk.

        Open snapshots remain valid (the system frees the space when they close).

        Raises:
            ValueError: another process is writing, or this is a read-only copy.
        """
        self._may_be_written()
        with writer_lock(self.root):
            self._remove_leftovers()
            self.merge(0)

    def _may_be_written(self) -> None:
        if self.copy_of is not None:
            raise ValueError(
                f"{self.copy_of}: only hllm embed and hllm exposures write to a store at a URL; for anything else "
                "copy it to a folder, and upload it afterwards, manifest.json last"
            )

    def merge(self, first: int) -> int:
        """Merge the segments from `first` on; return the new version. The caller must hold the writer's lock."""
        snapshot = self.snapshot()
        facts = merge_segments(snapshot, first, self.segment_writer())
        merged = (facts,) if facts.rows or facts.deleted else ()
        write_manifest(self.root, Manifest(snapshot.version + 1, len(snapshot), (*snapshot.facts[:first], *merged)))
        # Only after the manifest no longer names them. A merged segment that turned out empty is removed as well.
        for run in (*snapshot.facts[first:], *(() if merged else (facts,))):
            shutil.rmtree(self.root / "runs" / run.name)
        return snapshot.version + 1

    def segment_writer(self) -> SegmentWriter:
        """Make a writer of a segment, in any process; `StoreWriter.commit` then adds the segment to the store."""
        return SegmentWriter(self.root / "runs", self.width, self.dtype, self.kind, FILE_BYTES)

    def verify(self) -> list[str]:
        """Return a line for each damaged file; an empty list if there is none."""
        while True:
            manifest = read_manifest(self.root)
            found = [line for run in manifest.runs for line in find_segment_damage(self.root / "runs" / run.name, run)]
            # Files may be missing because a compaction ran meanwhile: then check the new manifest.
            if not found or read_manifest(self.root).version == manifest.version:
                return found

    def _remove_leftovers(self) -> None:
        """Remove segments that the manifest does not name (left by a crash or a compaction), and temporary files."""
        named = {run.name for run in read_manifest(self.root).runs}
        for folder in (self.root / "runs").iterdir():
            if folder.name not in named:
                shutil.rmtree(folder)
        for file in self.root.glob(".*.json-*"):
            file.unlink(missing_ok=True)


class StoreWriter:
    """Collects the rows of the next commit; made by `EmbeddingStore.writer`."""

    def __init__(self, store: EmbeddingStore) -> None:
        self.store = store
        self._segment: SegmentWriter | None = None

    def upsert(self, keys: Keys, vectors: Tensor, content_hashes: Hashes | None = None) -> None:
        """Set the vectors [n, D] of `keys` [n]. content_hashes [n]: hash of each vector's input, to detect changes.

        Raises:
            ValueError: wrong shapes, a value that is not finite in the store's type, or keys of another type.
        """
        array = as_keys(keys, self.store.kind)
        if vectors.shape != (len(array), self.store.width):
            raise ValueError(f"vectors: shape {tuple(vectors.shape)}: must be [{len(array)}, {self.store.width}]")
        stored = vectors.to(DTYPES[self.store.dtype])
        if not all_finite(stored):
            row = int((~torch.isfinite(stored)).any(dim=1).nonzero()[0])
            raise ValueError(
                f"vectors: row {row} (key {array[row].as_py()!r}) is not finite in {self.store.dtype}: look at the "
                "model, or use a store of fp32"
            )
        self._writing().add(
            array, stored, np.zeros(len(array), np.uint64) if content_hashes is None else content_hashes
        )

    def delete(self, keys: Keys) -> None:
        """Delete vectors; unknown keys are ignored. The bytes stay on the disk until `compact`."""
        self._writing().delete(as_keys(keys, self.store.kind))

    def commit(self, segments: Sequence[SegmentFacts] = ()) -> int:
        """Make everything since the last commit visible atomically; return the new version.

        If there are many segments, the newest are then merged (`store/compaction.py`).

        segments: finished segments that other processes have written into the store's folder (see `SegmentWriter`).
        """
        runs = list(segments)
        if self._segment is not None:
            runs.append(self._segment.finish())
            self._segment = None
        state = self.store.snapshot()
        if not runs:
            return state.version
        for run in runs:
            reader = SegmentReader(self.store.root / "runs" / run.name, run, self.store.width, self.store.dtype)
            # In order: each segment's change of `live` is counted against all segments before it.
            state.live += state.change_by(reader)
            state.segments.append(reader)
        write_manifest(self.store.root, Manifest(state.version + 1, len(state), state.facts))
        first = first_to_merge([run.rows + run.deleted for run in state.facts])
        return state.version + 1 if first == len(state.segments) else self.store.merge(first)

    def rollback(self) -> None:
        """Discard everything since the last commit."""
        if self._segment is not None:
            shutil.rmtree(self._segment.folder)
            self._segment = None

    def _writing(self) -> SegmentWriter:
        if self._segment is None:
            self._segment = self.store.segment_writer()
        return self._segment


__all__ = ["EmbeddingStore", "SegmentFacts", "Snapshot", "StoreWriter"]
