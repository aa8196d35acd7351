"""Embedding stores at URLs: copied to be read, run by run, and published commit by commit.

A commit's runs are new folders, so a copy is brought up to date by fetching those that it lacks, and the manifest then
names them. Reading and writing jobs have copies of their own. One job at a time may write to a URL: a second one is
noticed when it commits, not before, as object stores have no locks.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from hllm_torchrec import ranks
from hllm_torchrec.data.atomic import remove_folder, replace_file
from hllm_torchrec.remote.files import fetch, host_lock, listing, name_of, read_text, remove, tell, upload
from hllm_torchrec.store.layout import Manifest, RunFacts, parse_manifest, writer_lock
from hllm_torchrec.store.run import find_damage

IDENTITY, MANIFEST = "store.json", "manifest.json"
_ATTEMPTS = 5


class PublishedStore:
    """The URL of a store that this job writes, from its copy at `root`."""

    def __init__(self, url: str, root: Path) -> None:
        self.url, self.root = url, root
        self._seen = _text(root / MANIFEST)

    def gather(self, written: Sequence[RunFacts]) -> None:
        """Upload every rank's new run; rank 0's host fetches those that it lacks. Collective.

        written: the facts of the ranks' runs, by rank.

        Raises:
            ValueError, OSError: the URL cannot be written to, or a run arrived damaged.
        """
        ranks.together(lambda: self._send(written[ranks.rank()]))

        def bring() -> None:
            for run in written:
                _bring_run(self.url, run, self.root)

        ranks.on_rank_zero(bring)

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
        there = listing(f"{self.url}/runs")
        for run in manifest.runs:
            if not all(f"{run.name}/{name}" in there for name in run.files):
                self._send(run)
        upload(self.root, [MANIFEST], self.url)
        if self._seen is None:
            upload(self.root, [IDENTITY], self.url)  # last: with it, the store is there
        self._seen = now
        kept = {run.name for run in manifest.runs}
        remove(f"{self.url}/runs", [name for name in listing(f"{self.url}/runs") if name.split("/")[0] not in kept])

    def _send(self, run: RunFacts) -> None:
        sizes = {name: size for name, (size, _) in run.files.items()}
        tell("uploading", f"{self.url}/runs/{run.name}", sizes)
        upload(self.root / "runs" / run.name, sizes, f"{self.url}/runs/{run.name}")


def store_copy(url: str) -> Path:
    """This host's copy of the store at `url`, as last committed there, to read. Not collective.

    Raises:
        ValueError: there is none, or it is damaged.
        OSError: it cannot be reached.
    """
    with host_lock(url) as folder:
        root = folder / "read" / name_of(url)
        if not _bring(url, root):
            raise ValueError(f"{url}: no embedding store (no {IDENTITY}); `hllm embed` makes one")
    return root


def store_to_write(url: str) -> Path:
    """This host's copy of the store at `url` to write to; it has no files where there is no store. Not collective.

    Raises:
        ValueError: another process of this host is writing to it, or it is damaged.
        OSError: it cannot be reached.
    """
    with host_lock(url) as folder:
        root = folder / "written" / name_of(url)
        root.mkdir(parents=True, exist_ok=True)
        with writer_lock(root):
            there = _bring(url, root)
        if not there:
            remove_folder(root)
    return root


def _bring(url: str, root: Path) -> bool:
    """Bring a copy to the state at the URL; whether there is a store."""
    for attempt in range(_ATTEMPTS):
        identity, text = read_text(f"{url}/{IDENTITY}"), read_text(f"{url}/{MANIFEST}")
        if identity is None or text is None:
            return False
        manifest = parse_manifest(text, url)
        (root / "runs").mkdir(parents=True, exist_ok=True)
        try:
            for run in manifest.runs:
                _bring_run(url, run, root)
        except (OSError, ValueError):
            # A commit may have merged and removed the runs of the manifest that was read.
            if attempt == _ATTEMPTS - 1 or read_text(f"{url}/{MANIFEST}") == text:
                raise
            continue
        _take_over(root, identity, text, manifest)
        return True
    raise AssertionError("unreachable")


def _bring_run(url: str, run: RunFacts, root: Path) -> None:
    """Fetch a run that the copy lacks, and check it."""
    target = root / "runs" / run.name
    if not any(find_damage(target, run, contents=False)):
        return
    beside = root / "runs" / f"{run.name}.tmp"
    remove_folder(beside)
    tell("fetching", f"{url}/runs/{run.name}", {name: size for name, (size, _) in run.files.items()})
    fetch(f"{url}/runs/{run.name}", run.files, beside)
    damage = next(find_damage(beside, run), None)
    if damage is not None:
        remove_folder(beside)
        raise ValueError(f"{url}/runs/{run.name}: damaged: {damage}")
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
