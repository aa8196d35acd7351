"""Embedding stores at URLs: copied to be read, run by run, and published commit by commit.

A commit's runs are new folders, so a copy is brought up to date by fetching those that it lacks, and the manifest then
names them. Reading and writing jobs have copies of their own. One job at a time may write to a URL: a second one is
noticed when it commits, not before, as object stores have no locks.
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
    """The URL of a store that this job writes, from its copy at `root`."""

    def __init__(self, url: str, root: Path) -> None:
        self.url, self.root = url, root
        self._seen = _text(root / MANIFEST)

    def upload_segments(self, written: Sequence[SegmentFacts]) -> None:
        """Upload every rank's new run; rank 0's host fetches those that it lacks. Collective.

        written: the facts of the ranks' runs, by rank.

        Raises:
            ValueError, OSError: the URL cannot be written to, or a run arrived damaged.
        """
        coordination.run_on_all_ranks(lambda: self._upload_segment(written[coordination.rank()]))

        def bring() -> None:
            for run in written:
                _fetch_segment(self.url, run, self.root)

        coordination.run_on_rank_zero(bring)

    def publish(self) -> None:
        """Make what is committed at `root` the store's state at the URL. On rank 0.

        Raises:
            ValueError: another job has committed there since this one began.
            OSError: the URL cannot be written to.
        """
        if read_text(f"{self.url}/{MANIFEST}") != self._seen:
            raise ValueError(f"{self.url}: another job has written to this store meanwhile: run this one again")
        now = _text(self.root / MANIFEST)
        assert now is not None
        manifest = parse_manifest(now, self.url)
        there = list_files(f"{self.url}/runs")
        for run in manifest.runs:
            if not all(f"{run.name}/{name}" in there for name in run.files):
                self._upload_segment(run)
        upload_files(self.root, [MANIFEST], self.url)
        if self._seen is None:
            upload_files(self.root, [IDENTITY], self.url)  # last: with it, the store is there
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
    """This host's copy of the store at `url`, as last committed there, to read. Not collective.

    Raises:
        ValueError: there is none, or it is damaged.
        OSError: it cannot be reached.
    """
    with host_lock(url) as folder:
        root = folder / "read" / url_name(url)
        if not _update_copy(url, root):
            raise ValueError(f"{url}: no embedding store (no {IDENTITY}); `hllm embed` makes one")
    return root


def writable_store(url: str) -> Path:
    """This host's copy of the store at `url` to write to; it has no files where there is no store. Not collective.

    Raises:
        ValueError: another process of this host is writing to it, or it is damaged.
        OSError: it cannot be reached.
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
    """Bring a copy to the state at the URL; whether there is a store."""
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
            # A commit may have merged and removed the runs of the manifest that was read.
            if attempt == _ATTEMPTS - 1 or read_text(f"{url}/{MANIFEST}") == text:
                raise
            continue
        _take_over(root, identity, text, manifest)
        return True
    raise AssertionError("unreachable")


def _fetch_segment(url: str, segment: SegmentFacts, root: Path) -> None:
    """Fetch a run that the copy lacks, and check it."""
    target = root / "runs" / segment.name
    if not any(find_segment_damage(target, segment, contents=False)):
        return
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
    """Let the copy be the state of `manifest`, whose runs are here, and remove other runs."""
    if (_text(root / MANIFEST), _text(root / IDENTITY)) != (text, identity):
        replace_file(root / MANIFEST, text)
        replace_file(root / IDENTITY, identity)
    for folder in (root / "runs").iterdir():
        if folder.name not in {run.name for run in manifest.runs}:
            shutil.rmtree(folder)


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
