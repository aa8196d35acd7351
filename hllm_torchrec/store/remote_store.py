"""Embedding stores at URLs: copied to the host for reading, and published with each commit.

The segments of a commit are new folders, so a copy is updated by fetching the missing ones and then replacing its
manifest. Reading and writing jobs have separate copies. Only one job at a time may write to a URL; a second one is
detected when it commits, not before, as object stores have no locks.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from hllm_torchrec.common.atomic_files import remove_folder, replace_file
from hllm_torchrec.common.urls import (
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

IDENTITY, MANIFEST = "store.json", "manifest.json"
_ATTEMPTS = 5


class RemoteStore:
    """Destination URL of a store that this job writes; `root` is the host's copy."""

    def __init__(self, url: str, root: Path) -> None:
        self.url, self.root = url, root
        self._seen = _text(root / MANIFEST)

    def upload_segments(self, written: Sequence[SegmentFacts]) -> None:
        """Upload every rank's new segment; rank 0's host fetches those of other hosts. Collective.

        written: the facts of the segments, by rank.

        Raises:
            ValueError, OSError: the URL cannot be written to, or a segment arrived damaged.
        """
        coordination.run_on_all_ranks(lambda: self._upload_segment(written[coordination.rank()]))

        def bring() -> None:
            for run in written:
                _fetch_segment(self.url, run, self.root)

        coordination.run_on_rank_zero(bring)

    def publish(self) -> None:
        """Publish the committed state of `root` at the URL. Call on rank 0.

        Raises:
            ValueError: another job has committed there since this one began.
            OSError: the URL cannot be written to.
        """
        # Optimistic locking: compare the manifest with the one that this job started from. The check and the upload are
        # not atomic, so two commits within moments can still collide.
        if read_text(f"{self.url}/{MANIFEST}") != self._seen:
            raise ValueError(f"{self.url}: another job has written to this store meanwhile: run this one again")
        now = _text(self.root / MANIFEST)
        assert now is not None
        manifest = parse_manifest(now, self.url)
        there = list_files(f"{self.url}/runs")
        for run in manifest.runs:
            if not all(f"{run.name}/{name}" in there for name in run.files):
                self._upload_segment(run)
        # After all segments: readers must find every segment that a manifest names.
        upload_files(self.root, [MANIFEST], self.url)
        if self._seen is None:
            upload_files(self.root, [IDENTITY], self.url)  # last: without it the store does not exist
        self._seen = now
        kept = {run.name for run in manifest.runs}
        remove_files(
            f"{self.url}/runs", [name for name in list_files(f"{self.url}/runs") if name.split("/")[0] not in kept]
        )

    def _upload_segment(self, segment: SegmentFacts) -> None:
        sizes = {name: size for name, (size, _) in segment.files.items()}
        print_transfer("uploading", f"{self.url}/runs/{segment.name}", sizes)
        upload_files(self.root / "runs" / segment.name, sizes, f"{self.url}/runs/{segment.name}")


def local_store(url: str) -> Path:
    """Update and return this host's read-only copy of the store at `url`. Not collective.

    Raises:
        ValueError: there is no store, or it is damaged.
        OSError: the URL cannot be reached.
    """
    with host_lock(url) as folder:
        root = folder / "read" / url_name(url)
        if not _update_copy(url, root):
            raise ValueError(f"{url}: no embedding store (no {IDENTITY}); `hllm embed` makes one")
    return root


def writable_store(url: str) -> Path:
    """Update and return this host's writable copy of the store at `url`; no folder if there is none. Not collective.

    Raises:
        ValueError: another process of this host is writing to it, or it is damaged.
        OSError: the URL cannot be reached.
    """
    with host_lock(url) as folder:
        root = folder / "written" / url_name(url)
        root.mkdir(parents=True, exist_ok=True)
        with writer_lock(root):
            there = _update_copy(url, root)
        if not there:
            remove_folder(root)
    return root


def _update_copy(url: str, root: Path) -> bool:
    """Update a copy to the state at the URL; return whether there is a store."""
    for attempt in range(_ATTEMPTS):
        identity, text = read_text(f"{url}/{IDENTITY}"), read_text(f"{url}/{MANIFEST}")
        if identity is None or text is None:
            return False
        manifest = parse_manifest(text, url)
        (root / "runs").mkdir(parents=True, exist_ok=True)
        try:
            for run in manifest.runs:
                _fetch_segment(url, run, root)
        except (OSError, ValueError):
            # A commit may have merged and removed the segments of the manifest that was read: then try the new one.
            if attempt == _ATTEMPTS - 1 or read_text(f"{url}/{MANIFEST}") == text:
                raise
            continue
        _take_over(root, identity, text, manifest)
        return True
    raise AssertionError("unreachable")


def _fetch_segment(url: str, segment: SegmentFacts, root: Path) -> None:
    """Fetch a segment that the copy does not have, and verify it."""
    target = root / "runs" / segment.name
    if not any(find_segment_damage(target, segment, contents=False)):
        return
    # Fetched beside and renamed, so that a folder with the segment's name is complete.
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


def _take_over(root: Path, identity: str, text: str, manifest: Manifest) -> None:
    """Make `manifest`, whose segments are all in the copy, the copy's state, and remove other segments."""
    if (_text(root / MANIFEST), _text(root / IDENTITY)) != (text, identity):
        replace_file(root / MANIFEST, text)
        replace_file(root / IDENTITY, identity)
    for folder in (root / "runs").iterdir():
        if folder.name not in {run.name for run in manifest.runs}:
            shutil.rmtree(folder)


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
