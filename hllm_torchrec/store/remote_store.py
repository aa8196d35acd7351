"""Embedding stores at URLs: downloaded to the host for reading, and uploaded with each commit.

    <url>/store.json, manifest.json, runs/   as in a folder (`store/files.py`)
    <url>/commits/00000007.json              manifest of the seventh commit, with `commit`, `identity` and `author`

The segments of a commit are new folders, so a local copy is updated by fetching the missing segments and then replacing
its manifest. Reading and writing jobs have separate copies. A commit takes effect when its file under commits/ is
created, which the file system grants to one job only: if two jobs start from the same state, the second commit is
refused. manifest.json is uploaded afterwards. If a job dies in between, readers find the commit by its number, and the
next job continues from it.
"""

import json
import re
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hllm_torchrec.common.atomic_files import remove_folder, replace_file
from hllm_torchrec.common.urls import (
    create_file,
    fetch_files,
    host_lock,
    list_files,
    print_transfer,
    read_text,
    remove_files,
    upload_files,
    url_name,
)
from hllm_torchrec.distributed import coordination
from hllm_torchrec.store.files import Manifest, SegmentFacts, parse_manifest, writer_lock
from hllm_torchrec.store.segment import find_segment_damage

IDENTITY, MANIFEST, COMMITS = "store.json", "manifest.json", "commits"
KEPT_COMMITS = 100
"""Number of newest files under commits/ that are retained. Readers follow the commits from that of manifest.json on, so
this number must exceed the number of commits by which manifest.json lags behind if a job is slow to upload it."""
_ATTEMPTS = 5


class _State(NamedTuple):
    """The committed state at a URL: texts of store.json and manifest.json.

    commit: number of the last commit at the URL; 0 if an earlier version of this library wrote it.
    """

    identity: str
    manifest: str
    commit: int


class RemoteStore:
    """Destination URL of a store that this job writes; `root` is this host's copy."""

    def __init__(self, url: str, root: Path) -> None:
        self.url, self.root = url, root
        self._seen = _text(root / MANIFEST)

    def upload_segments(self, written: Sequence[SegmentFacts]) -> None:
        """Upload the new segment of every rank; rank 0 then fetches those of other hosts. Collective.

        written: facts of the segments, by rank.

        Raises:
            ValueError, OSError: the URL cannot be written to, or a fetched segment is damaged.
        """
        coordination.run_on_all_ranks(lambda: self._upload_segment(written[coordination.rank()]))

        def bring() -> None:
            for run in written:
                _fetch_segment(self.url, run, self.root)

        coordination.run_on_rank_zero(bring)

    def publish(self) -> None:
        """Publish the committed state of `root` at the URL. Call on rank 0.

        Raises:
            ValueError: another job has committed at the URL since this job read the store.
            OSError: the URL cannot be written to.
        """
        taken = f"{self.url}: another job has written to this store meanwhile: run this one again"
        # List the segments before reading the state. A listed segment that the new manifest does not name then belongs
        # to an earlier commit, or to a job that started from an earlier state and can no longer commit: it is removed.
        existing, commits = list_files(f"{self.url}/runs"), _commit_numbers(self.url)
        state = _read_state(self.url, max(commits, default=0))
        if (None if state is None else state.manifest) != self._seen:
            raise ValueError(taken)
        identity, text = _text(self.root / IDENTITY), _text(self.root / MANIFEST)
        assert identity is not None and text is not None
        manifest = parse_manifest(text, self.url)
        for run in manifest.runs:
            if not all(f"{run.name}/{name}" in existing for name in run.files):
                self._upload_segment(run)
        number = max([*commits, 0 if state is None else state.commit]) + 1
        if not self._commit(number, {**json.loads(text), "commit": number, "identity": json.loads(identity)}):
            raise ValueError(taken)
        # The commit is now valid, even if this job dies: readers and the next job start from manifest.json, and find
        # newer commits by their numbers.
        self._seen = _with_commit(text, number)
        replace_file(self.root / MANIFEST, self._seen)
        upload_files(self.root, [MANIFEST], self.url)
        if read_text(f"{self.url}/{IDENTITY}") is None:
            upload_files(self.root, [IDENTITY], self.url)
        named = {run.name for run in manifest.runs}
        remove_files(f"{self.url}/runs", [name for name in existing if name.split("/")[0] not in named])
        old = [_commit_name(other) for other in commits if other <= number - KEPT_COMMITS]
        remove_files(f"{self.url}/{COMMITS}", old)

    def _commit(self, number: int, contents: dict[str, Any]) -> bool:
        """Create the file of a commit; False if another job has made this commit."""
        # The random author makes the contents unique: `create_file` may verify them by reading the file.
        text = json.dumps({**contents, "author": secrets.token_hex(8)})
        if not create_file(_commit_url(self.url, number), text):
            return False
        if max(_commit_numbers(self.url)) == number:
            return True
        # Other jobs have made newer commits, and have removed the other file with this number as an old one.
        remove_files(f"{self.url}/{COMMITS}", [_commit_name(number)])
        return False

    def _upload_segment(self, segment: SegmentFacts) -> None:
        sizes = {name: size for name, (size, _) in segment.files.items()}
        print_transfer("uploading", f"{self.url}/runs/{segment.name}", sizes)
        upload_files(self.root / "runs" / segment.name, sizes, f"{self.url}/runs/{segment.name}")


def local_store(url: str) -> Path:
    """Update and return this host's read-only copy of the store at `url`. Not collective.

    Raises:
        ValueError: there is no store at the URL, or it is damaged.
        OSError: the URL cannot be reached.
    """
    with host_lock(url) as folder:
        root = folder / "read" / url_name(url)
        if not _update_copy(url, root):
            raise ValueError(f"{url}: no embedding store (no {IDENTITY}); `hllm embed` makes one")
    return root


def writable_store(url: str) -> Path:
    """Update and return this host's writable copy of the store at `url`. Not collective.

    If there is no store at the URL, the returned folder does not exist.

    Raises:
        ValueError: another process of this host is writing to the copy, or the store is damaged.
        OSError: the URL cannot be reached.
    """
    with host_lock(url) as folder:
        root = folder / "written" / url_name(url)
        root.mkdir(parents=True, exist_ok=True)
        with writer_lock(root):
            exists = _update_copy(url, root)
        if not exists:
            remove_folder(root)
    return root


def _update_copy(url: str, root: Path) -> bool:
    """Update a copy to the state at the URL; return whether there is a store at the URL."""
    for attempt in range(_ATTEMPTS):
        state = _read_state(url)
        if state is None:
            return False
        manifest = parse_manifest(state.manifest, url)
        (root / "runs").mkdir(parents=True, exist_ok=True)
        try:
            for run in manifest.runs:
                _fetch_segment(url, run, root)
        except (OSError, ValueError):
            # A new commit may have merged and removed these segments: then try again with the new state.
            if attempt == _ATTEMPTS - 1 or _read_state(url) == state:
                raise
            continue
        _take_over(root, state, manifest)
        return True
    raise AssertionError("unreachable")


def _read_state(url: str, known: int = 0) -> _State | None:
    """Read the committed state at a URL; None if there is no store. known: number of a commit that exists there."""
    identity, text = read_text(f"{url}/{IDENTITY}"), read_text(f"{url}/{MANIFEST}")
    states = [] if text is None else [text]
    number = 0 if text is None else _commit_number(text, url)
    if known > number and (newer := read_text(_commit_url(url, known))) is not None:
        states, number = [*states, newer], known
    # A job may have died between its commit and the upload of manifest.json.
    while (newer := read_text(_commit_url(url, number + 1))) is not None:
        states, number = [*states, newer], number + 1
    if not states:
        return None
    # An earlier version of this library writes manifest.json without a file under commits/: so the newest state is the
    # one with the largest version.
    newest = max(reversed(states), key=lambda state: parse_manifest(state, url).version)
    if identity is None:
        if "identity" not in json.loads(newest):
            return None
        identity = json.dumps(json.loads(newest)["identity"], indent=1)
    return _State(identity, _with_commit(newest, number), number)


def _commit_numbers(url: str) -> list[int]:
    return [int(name[:-5]) for name in list_files(f"{url}/{COMMITS}") if re.fullmatch(r"\d{8,}\.json", name)]


def _commit_name(number: int) -> str:
    return f"{number:08d}.json"


def _commit_url(url: str, number: int) -> str:
    return f"{url}/{COMMITS}/{_commit_name(number)}"


def _commit_number(text: str, url: str) -> int:
    """Return the commit number in the text of a manifest; 0 if an earlier version of this library wrote it."""
    parse_manifest(text, url)  # raises if it is malformed
    number = json.loads(text).get("commit", 0)
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ValueError(f"{url}/{MANIFEST}: commit is {str(number)[:100]!r}: the file is damaged")
    return number


def _with_commit(text: str, number: int) -> str:
    """Return the text of a manifest with its commit number, without the additional fields of a file under commits/."""
    found = json.loads(text)
    return json.dumps({name: found[name] for name in ("version", "live", "runs")} | {"commit": number}, indent=1)


def _fetch_segment(url: str, segment: SegmentFacts, root: Path) -> None:
    """Fetch a segment that the copy does not have, and verify it."""
    target = root / "runs" / segment.name
    if not any(find_segment_damage(target, segment, contents=False)):
        return
    # Fetch into a temporary folder and rename it, so that a folder with the segment's name is always complete.
    beside = root / "runs" / f"{segment.name}.tmp"
    remove_folder(beside)
    print_transfer("fetching", f"{url}/runs/{segment.name}", {name: size for name, (size, _) in segment.files.items()})
    fetch_files(f"{url}/runs/{segment.name}", segment.files, beside)
    damage = next(find_segment_damage(beside, segment), None)
    if damage is not None:
        remove_folder(beside)
        raise ValueError(f"{url}/runs/{segment.name}: damaged: {damage}")
    remove_folder(target)
    beside.rename(target)


def _take_over(root: Path, state: _State, manifest: Manifest) -> None:
    """Make `state`, whose segments have all been fetched, the state of the copy, and remove other segments."""
    if _text(root / IDENTITY) != state.identity:
        # The store was built again. The old identity is removed before the manifest changes and the new one is written
        # after it, so that no reader combines the identity of one store with the vectors of the other.
        (root / IDENTITY).unlink(missing_ok=True)
    if _text(root / MANIFEST) != state.manifest:
        replace_file(root / MANIFEST, state.manifest)
    if not (root / IDENTITY).exists():
        replace_file(root / IDENTITY, state.identity)
    for folder in (root / "runs").iterdir():
        if folder.name not in {run.name for run in manifest.runs}:
            shutil.rmtree(folder)


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
