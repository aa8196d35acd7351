"""The embedding store: id -> vector, with atomic incremental commits and consistent snapshots for readers.

    store = EmbeddingStore.create("stores/items", width=576, dtype="fp16", facts=facts)
    with store.writer() as writer:                       # one writer at a time
        writer.upsert(["i1", "i2"], vectors, content_hashes)
        writer.delete(["i9"])
        writer.commit()                                  # makes the changes visible to readers, all at once
    vectors, known = store.snapshot().gather(["i2", "i7"])

A commit adds a segment of new rows (`store/segment.py`); if several segments have a key, the newest is valid. If there
are many segments, some are merged (`store/compaction.py`); `compact` merges all of them, which erases deleted vectors
from the disk. Calculated size of 10^8 vectors of width 2,048 in fp16: 410 GB of vectors in 96 files, 2.4 GB of index
(hash, row and content hash of each key), and the keys. All of it is memory-mapped: a lookup reads a few pages
(docs/store.md).

Legend: n requested ids, D width.
"""

import json
import re
import secrets
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
from hllm_torchrec.common.machine_errors import is_machine_error
from hllm_torchrec.common.urls import url_of
from hllm_torchrec.common.yaml_files import abbreviate
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
_TEMPORARY = re.compile(r"\.(store\.json|manifest\.json|lock\.holder)-[0-9a-f]{8}")
"""Names of temporary files of `replace_file`."""
MAX_WIDTH = 1 << 20
"""Upper bound of the width of a vector, exclusive."""


class StoreReplaced(ValueError):
    """The folder of an open store now contains another store, or no store."""


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
        """URL of the store, if `root` is a read-only copy of it."""
        self.published: RemoteStore | None = None
        """Destination of this job's commits, if the store is at a URL."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the facts."""
        return hash_json(self.facts)

    @property
    def identity_hash(self) -> str:
        """Hash of the facts about the model, the width and the type of the keys: sixteen hexadecimal digits."""
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
            ValueError: `path` is a folder that is not empty, or an argument is not allowed.
        """
        root = Path(path)
        if dtype not in DTYPES or not 1 <= width < MAX_WIDTH or keys not in ("string", "int64"):
            raise ValueError(
                f"{root}: width={width}, dtype={dtype!r}, keys={keys!r}: width must be 1 to {MAX_WIDTH - 1}, dtype "
                f"one of {', '.join(DTYPES)}, keys string or int64"
            )
        _refuse_contents(root)
        root.mkdir(parents=True, exist_ok=True)
        with writer_lock(root):
            _refuse_contents(root)  # again, because another process may have created a store before the lock was held
            (root / "runs").mkdir(exist_ok=True)
            sync_folder(root.resolve().parent)
            # By the random id, readers notice that another store has replaced the store that they opened.
            identity = {"format": FORMAT, "width": width, "dtype": dtype, "keys": keys, "facts": facts or {}}
            text = json.dumps({**identity, "id": secrets.token_hex(8)}, indent=1)
            write_manifest(root, Manifest(0, 0, ()))
            replace_file(root / "store.json", text)  # last: without it the store does not exist
        return cls(root, json.loads(text))

    @classmethod
    def open(cls, path: str | Path) -> "EmbeddingStore":
        """Open the store at `path`; for a URL, open a read-only copy of its current state.

        Raises:
            ValueError: there is no store, or the store is damaged or has another format.
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
        """Check that the store's vectors are of the model with these facts, because models must not be mixed.

        Raises:
            ValueError: the facts differ; the message contains the names of the different facts, and the remedy.
        """
        if hash_json(facts) == self.fingerprint:
            return
        names = sorted(k for k in {*self.facts, *facts} if self.facts.get(k) != facts.get(k))
        raise ValueError(
            f"{self.root}: its vectors were made by another model ({', '.join(names)} differ): vectors of two models "
            "cannot be compared; embed everything into a new store, or use the checkpoint that made this one"
        )

    def snapshot(self) -> "Snapshot":
        """Open the current committed state; later commits do not change the snapshot.

        Raises:
            StoreReplaced: the store was removed or replaced by another store after it was opened.
            ValueError: the store is damaged.
            OSError: the machine could not read a file (permissions, open files, ...), which does not mean that it is
                damaged; the message contains the path.
        """
        for attempt in range(_ATTEMPTS):
            manifest = None
            try:
                manifest = read_manifest(self.root)
                found = Snapshot(self, manifest)
            except (OSError, ValueError) as error:
                if is_machine_error(error):
                    raise
                self._require_same_store()
                # A compaction may have removed segments after the manifest was read. In this case the manifest has
                # changed, and the new one is tried; if it has not changed, the store is damaged.
                if manifest is None or attempt == _ATTEMPTS - 1:
                    raise
                if read_manifest(self.root).version == manifest.version:
                    raise
            else:
                # Test this after the segments are open: they were read with the width and the type of the identity, but
                # the manifest may already have been that of another store.
                self._require_same_store()
                return found
        raise AssertionError("unreachable")

    def _require_same_store(self) -> None:
        """Raise `StoreReplaced` if the folder no longer holds the store that was opened."""
        try:
            same = read_store_json(self.root / "store.json") == self.identity
        except ValueError:
            same = False
        if not same:
            raise StoreReplaced(
                f"{self.root}: this store was removed or built again since it was opened: open it again, and check "
                "that its vectors are of the model that you expect (`hllm store info`)"
            )

    @contextmanager
    def writer(self) -> Iterator["StoreWriter"]:
        """Context manager that yields the only writer; uncommitted rows are discarded when it ends.

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
        """Rewrite all live rows as one segment and remove the old segments: erases deleted vectors from the disk.

        Open snapshots remain valid; the system frees the disk space when they are closed.

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
        """Merge the segments from number `first` on; return the new version. The caller must hold the writer's lock."""
        snapshot = self.snapshot()
        facts = merge_segments(snapshot, first, self.segment_writer())
        merged = (facts,) if facts.rows or facts.deleted else ()
        write_manifest(self.root, Manifest(snapshot.version + 1, len(snapshot), (*snapshot.facts[:first], *merged)))
        # Remove the old segments only now that the manifest does not name them; and the merged segment if it is empty.
        for run in (*snapshot.facts[first:], *(() if merged else (facts,))):
            shutil.rmtree(self.root / "runs" / run.name)
        return snapshot.version + 1

    def segment_writer(self) -> SegmentWriter:
        """Return a writer of a new segment, in any process; `StoreWriter.commit` then adds the segment to the store."""
        return SegmentWriter(self.root / "runs", self.width, self.dtype, self.kind, FILE_BYTES)

    def verify(self) -> list[str]:
        """Return a line for each damaged file; an empty list if there is none."""
        while True:
            manifest = read_manifest(self.root)
            found = [line for run in manifest.runs for line in find_segment_damage(self.root / "runs" / run.name, run)]
            self._require_same_store()
            # Files may be missing because a compaction has removed them: then check the segments of the new manifest.
            if not found or read_manifest(self.root).version == manifest.version:
                return found

    def _remove_leftovers(self) -> None:
        """Remove segments that the manifest does not name, which a crash left behind, and temporary files."""
        named = {run.name for run in read_manifest(self.root).runs}
        for folder in (self.root / "runs").iterdir():
            if folder.name not in named:
                shutil.rmtree(folder)
        for file in self.root.iterdir():
            if _TEMPORARY.fullmatch(file.name):
                file.unlink(missing_ok=True)


def _refuse_contents(root: Path) -> None:
    """Raise ValueError if a folder contains anything except the files of an interrupted `EmbeddingStore.create`."""
    for path in root.iterdir() if root.exists() else ():
        made = path.name in ("manifest.json", "lock", "lock.holder") or _TEMPORARY.fullmatch(path.name)
        if not made and not (path.name == "runs" and path.is_dir() and not any(path.iterdir())):
            raise ValueError(f"{root}: already exists: open it, or choose another folder")


class StoreWriter:
    """Collects the rows of the next commit; created by `EmbeddingStore.writer`."""

    def __init__(self, store: EmbeddingStore) -> None:
        self.store = store
        self._segment: SegmentWriter | None = None

    def upsert(self, keys: Keys, vectors: Tensor, content_hashes: Hashes | None = None) -> None:
        """Set the vectors [n, D] of `keys` [n]. content_hashes [n]: hash of each vector's input, to detect changes.

        Raises:
            ValueError: a shape is wrong, a value is not finite in the store's type, or the keys have another type.
        """
        array = as_keys(keys, self.store.kind)
        if vectors.shape != (len(array), self.store.width):
            raise ValueError(f"vectors: shape {tuple(vectors.shape)}: must be [{len(array)}, {self.store.width}]")
        stored = vectors.to(DTYPES[self.store.dtype])
        if not all_finite(stored):
            row = int((~torch.isfinite(stored)).any(dim=1).nonzero()[0])
            raise ValueError(
                f"vectors: row {row} (key {abbreviate(array[row].as_py())}) is not finite in {self.store.dtype}: "
                "look at the model, or use a store of fp32"
            )
        self._writing().add(
            array, stored, np.zeros(len(array), np.uint64) if content_hashes is None else content_hashes
        )

    def delete(self, keys: Keys) -> None:
        """Delete the vectors of keys; unknown keys are ignored. The vectors stay on the disk until `compact`."""
        self._writing().delete(as_keys(keys, self.store.kind))

    def commit(self, segments: Sequence[SegmentFacts] = ()) -> int:
        """Make all changes since the last commit visible atomically; return the new version.

        If there are many segments, the newest segments are then merged (`store/compaction.py`).

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
            # In order, because the change of `live` by a segment depends on all segments before it.
            state.live += state.change_by(reader)
            state.segments.append(reader)
        write_manifest(self.store.root, Manifest(state.version + 1, len(state), state.facts))
        first = first_to_merge([run.rows + run.deleted for run in state.facts])
        return state.version + 1 if first == len(state.segments) else self.store.merge(first)

    def rollback(self) -> None:
        """Discard all changes since the last commit."""
        if self._segment is not None:
            shutil.rmtree(self._segment.folder)
            self._segment = None

    def _writing(self) -> SegmentWriter:
        if self._segment is None:
            self._segment = self.store.segment_writer()
        return self._segment


__all__ = ["EmbeddingStore", "SegmentFacts", "Snapshot", "StoreWriter"]
