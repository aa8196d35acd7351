"""The files of a store, and how they are replaced so that a crash at any point shows the old state or the new one.

    store.json          what never changes: format, width, dtype, kind of keys, facts about the model
    manifest.json       the committed state: version and runs; replaced as a whole by every commit
    lock                held by the one writer
    runs/<name>/        one commit's rows (see `run`); not in the manifest: left over from a crash, or not yet committed

A run's files are written and synced first, then the manifest takes its new name in one step. So a reader finds
every run of the manifest complete, and a run that no manifest names was never there.
"""

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hllm_torchrec.common.atomic_files import replace_file

FORMAT = 1


@dataclass(frozen=True)
class SegmentFacts:
    """What a manifest says of a run.

    name: its folder; rows: vectors in it; deleted: keys that it takes away; files: name -> (bytes, CRC-32).
    """

    name: str
    rows: int
    deleted: int
    files: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Manifest:
    """The committed state. version: commits so far; live: keys with a vector; runs: oldest first."""

    version: int
    live: int
    runs: tuple[SegmentFacts, ...]


def read_store_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: the file is missing or is none; says so.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error}): not an embedding store, or a damaged one") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds no JSON object: not an embedding store, or a damaged one")
    return found


def read_manifest(root: Path) -> Manifest:
    """The committed state of the store at `root`.

    Raises:
        ValueError: no manifest, or one that does not say what it should.
    """
    found = _manifest(read_store_json(root / "manifest.json"), root / "manifest.json")
    for run in found.runs:
        for path in (root / "runs", root / "runs" / run.name, *(root / "runs" / run.name / name for name in run.files)):
            if path.is_symlink():
                raise ValueError(f"{path}: is a link, which may lead out of the store: put the files themselves there")
    return found


def parse_manifest(text: str, place: str) -> Manifest:
    """The committed state by a manifest's text, which is that of the store at `place`.

    Raises:
        ValueError: it does not say what it should.
    """
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}/manifest.json: {error}: the file is damaged") from None
    return _manifest(raw, f"{place}/manifest.json")


def _manifest(raw: Any, place: str | Path) -> Manifest:
    """A manifest from its JSON object; place: what errors call it."""
    try:
        runs = tuple(
            SegmentFacts(
                r["name"], int(r["rows"]), int(r["deleted"]), {k: (int(n), int(c)) for k, (n, c) in r["files"].items()}
            )
            for r in raw["runs"]
        )
        found = Manifest(int(raw["version"]), int(raw["live"]), runs)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise ValueError(f"{place}: {reason}: the file is damaged") from None
    for run in found.runs:
        for name in (run.name, *run.files):  # no path may lead out of the store
            if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name) or len(name) > 100:
                raise ValueError(f"{place}: {repr(name)[:100]} is no plain name: the file is damaged")
        if min(run.rows, run.deleted) < 0 or max(run.rows, run.deleted) >= 2**62:
            raise ValueError(f"{place}: run {run.name} has {run.rows} rows: the file is damaged")
    return found


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Make `manifest` the committed state; whoever reads sees the old one or this one."""
    replace_file(root / "manifest.json", json.dumps(asdict(manifest), indent=1))


@contextmanager
def writer_lock(root: Path) -> Iterator[None]:
    """Be the store's only writer; the system lets go of the lock when a process dies.

    Raises:
        ValueError: another process is writing.
    """
    handle = os.open(root / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{root}: another process is writing to this store: wait for it, or stop it") from None
        yield
    finally:
        os.close(handle)
