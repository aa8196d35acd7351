"""Files of a store and their atomic replacement: after a crash at any point, a reader sees the old or the new state.

    store.json          constant: format, width, dtype, type of the keys, facts about the model
    manifest.json       the committed state: version and segments; replaced atomically by every commit
    lock                held by the only writer
    runs/<name>/        a segment (`store/segment.py`); a segment that the manifest does not name is not committed yet,
                        or is left over from a crash

The files of a segment are written and synced first; then the new manifest replaces the old one in a single rename. So
every segment that the manifest names is complete, and readers ignore all other segments.
"""

import json
import re
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hllm_torchrec.common.atomic_files import replace_file
from hllm_torchrec.common.locks import hold_lock
from hllm_torchrec.common.machine_errors import is_machine_error, path_in_errors

FORMAT = 1


@dataclass(frozen=True)
class SegmentFacts:
    """Entry of the manifest for one segment.

    name: name of the segment's folder; rows: number of vectors; deleted: number of deleted keys; files: name ->
    (bytes, CRC-32).
    """

    name: str
    rows: int
    deleted: int
    files: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Manifest:
    """The committed state of a store.

    version: number of commits and merges so far; live: number of keys with a vector; runs: segments, oldest first.
    """

    version: int
    live: int
    runs: tuple[SegmentFacts, ...]


def read_store_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        ValueError: the file is missing or does not contain a JSON object.
        OSError: the machine could not read the file (permissions, open files, ...), which does not mean that it is
            damaged; the message contains the path.
    """
    try:
        with path_in_errors(path):
            found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if is_machine_error(error):
            raise
        raise ValueError(f"{path}: not readable as JSON ({error}): not an embedding store, or a damaged one") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds no JSON object: not an embedding store, or a damaged one")
    return found


def read_manifest(root: Path) -> Manifest:
    """Read the committed state of the store at `root`.

    Raises:
        ValueError: there is no manifest, it is malformed, or a segment is a symbolic link.
    """
    found = _manifest(read_store_json(root / "manifest.json"), root / "manifest.json")
    # A store may come from an untrusted source: through links, a reader could open or a writer delete files outside of
    # the store.
    for run in found.runs:
        for path in (root / "runs", root / "runs" / run.name, *(root / "runs" / run.name / name for name in run.files)):
            if path.is_symlink():
                raise ValueError(f"{path}: is a link, which may lead out of the store: put the files themselves there")
    return found


def parse_manifest(text: str, location: str) -> Manifest:
    """Parse the text of a manifest; location: path or URL of the store, for messages.

    Raises:
        ValueError: the text is malformed.
    """
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{location}/manifest.json: {error}: the file is damaged") from None
    return _manifest(raw, f"{location}/manifest.json")


def _manifest(raw: Any, location: str | Path) -> Manifest:
    """Check and convert a manifest's JSON object; location: path or URL of the file, for messages."""
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
        raise ValueError(f"{location}: {reason}: the file is damaged") from None
    for run in found.runs:
        for name in (run.name, *run.files):  # no path may lead out of the store
            if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name) or len(name) > 100:
                raise ValueError(f"{location}: {repr(name)[:100]} is not a plain name: the file is damaged")
        if min(run.rows, run.deleted) < 0 or max(run.rows, run.deleted) >= 2**62:
            raise ValueError(
                f"{location}: run {run.name} has {run.rows} rows and {run.deleted} deletions: the file is damaged"
            )
    return found


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Make `manifest` the committed state atomically: readers see either the old manifest or the new one."""
    replace_file(root / "manifest.json", json.dumps(asdict(manifest), indent=1))


def writer_lock(root: Path) -> AbstractContextManager[None]:
    """Context manager that holds the lock of the store's only writer; the system releases it when a process dies.

    Raises:
        Locked: another process is writing to the store; the message names it.
    """
    return hold_lock(root / "lock", f"{root}: another process is writing to this store")
