"""Run directories at URLs: written locally on each host, uploaded with every checkpoint, and downloaded for reading.

    <url>/config.yaml, log.jsonl, tensorboard/ ...   uploaded by each host, before each checkpoint and at the end
    <url>/checkpoints/step-00000100/                 each rank uploads its files; then rank 0 uploads COMPLETE

The hosts of a job do not need a shared file system. The local copies for reading and for writing are separate, so a run
can be evaluated on the host that trains it.
"""

import json
import logging
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hllm_torchrec.checkpoint import layout as files
from hllm_torchrec.common.atomic_files import remove_folder, replace_file, write_synced
from hllm_torchrec.common.errors import Preempted
from hllm_torchrec.common.locks import hold_lock
from hllm_torchrec.common.urls import (
    FileFacts,
    cache_folder,
    fetch_files,
    host_lock,
    list_files,
    print_transfer,
    read_text,
    remove_files,
    upload_files,
    url_name,
    url_of,
)
from hllm_torchrec.distributed import coordination

CHECKPOINTS = "checkpoints"
NOT_FETCHED = (CHECKPOINTS, "predictions", "retrieval", "bad_batches")
"""Folders that are not fetched with a run: checkpoints are fetched one at a time, the others are not needed."""
FETCHED = ".fetched.json"
"""File in a local copy with the size and version that each file had at the URL when it was fetched."""
_LOCK = ".lock"
LOCK_WAIT = 10.0
"""Seconds that a job waits for the lock of a run: a restarted job may begin before its predecessor has ended."""
_ATTEMPTS = 5
_MARKER = re.compile(rf"{CHECKPOINTS}/(step-\d+)/{files.MARKER}")
_logger = logging.getLogger(__name__)


class RunStorage:
    """Output location of a run: a folder of this host, and the URL to which it is published, if any."""

    def __init__(self, folder: Path, url: str | None) -> None:
        self.folder, self.url = folder, url
        self._sent = _states(folder) if url is not None else {}

    @property
    def checkpoints(self) -> str | None:
        """URL of the run's checkpoints, or None."""
        return None if self.url is None else f"{self.url}/{CHECKPOINTS}"

    def publish(self) -> None:
        """Upload each host's new or changed files, except checkpoints. Collective if there is a URL."""
        if self.url is not None:
            coordination.run_on_each_host(self._upload_changed)

    @contextmanager
    def published_on_exit(self) -> Iterator[None]:
        """Context manager that publishes the run at exit, also after a preemption, but not after an error."""
        try:
            yield
        except Preempted:
            self.publish()
            raise
        self.publish()

    def _upload_changed(self) -> None:
        assert self.url is not None
        states = {name: state for name, state in _states(self.folder).items() if self._sent.get(name) != state}
        upload_files(self.folder, states, self.url)
        # Recorded after the upload, so that a failed upload is tried again the next time.
        self._sent |= states


@contextmanager
def run_lock(output: str) -> Iterator[None]:
    """Context manager in which only this job may train into `output`: rank 0 holds a lock. Collective.

    If `output` is a URL, the lock is only valid on the host of rank 0.

    Raises:
        Locked: another job still holds the lock after LOCK_WAIT seconds; the message contains its process.
    """
    url = url_of(output)
    folder = Path(output) if url is None else cache_folder(url)
    what = f"output: {output}: another process trains into it, and two runs would be mixed"

    def acquire() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        held.enter_context(hold_lock(folder / _LOCK, what, wait=LOCK_WAIT))
        held.callback(_remove_if_empty, folder)

    with ExitStack() as held:  # contains the lock on rank 0, and nothing on other ranks
        coordination.run_on_rank_zero(acquire)
        yield


def _remove_if_empty(folder: Path) -> None:
    """Remove a run's folder that contains only the lock, because the job failed before it wrote a file."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if names == {_LOCK, f"{_LOCK}.holder"}:
        shutil.rmtree(folder, ignore_errors=True)


def open_run_storage(output: str) -> RunStorage:
    """Open the output location of a run. Collective.

    If it is a URL, each host fetches the files of the run and its newest complete checkpoint.

    Raises:
        ValueError, OSError: the URL cannot be reached.
    """
    url = url_of(output)
    if url is None:
        return RunStorage(Path(output), None)

    def bring() -> Path:
        with host_lock(url) as folder:
            local = folder / "written" / url_name(url)
            listed = list_files(url)
            if not listed:
                remove_folder(local)  # there is no run at the URL (any more): an old local copy must not be resumed
            _bring_files(url, listed, local)
            _bring_checkpoint(url, listed, local, "latest")
            return local

    coordination.run_on_each_host(bring)
    with host_lock(url) as folder:
        return RunStorage(folder / "written" / url_name(url), url)


def local_run(run: str | Path, which: str | None = None) -> Path:
    """Return a local run directory for reading: `run` itself, or this host's copy of a URL. Not collective.

    Args:
        which: checkpoint to fetch in addition: "best", "latest", or a name such as step-00000100.

    Raises:
        ValueError: there is no run at the URL.
        OSError: the URL cannot be reached.
    """
    url = url_of(run)
    if url is None:
        return Path(run)
    with host_lock(url) as folder:
        local, listed = folder / "read" / url_name(url), list_files(url)
        if "config.yaml" not in listed:
            raise ValueError(f"{url} is not a run directory: it has no config.yaml; train into it first")
        _bring_files(url, listed, local)
        if which is not None:
            _bring_checkpoint(url, listed, local, which)
    return local


def fetch_checkpoint(url: str, which: str) -> str | None:
    """Fetch the "best" or "latest" complete checkpoint of the run at `url`. Not collective.

    Returns:
        The name of the checkpoint, or None if there is none.

    Raises:
        OSError: the URL cannot be reached.
    """
    with host_lock(url) as folder:
        local, listed = folder / "read" / url_name(url), list_files(url)
        return _bring_checkpoint(url, listed, local, which)


def local_checkpoint(checkpoint: str | Path) -> Path:
    """Return a local checkpoint: `checkpoint` itself, or this host's copy of a URL. Not collective.

    Raises:
        ValueError: the URL does not end in checkpoints/step-<number>, or there is no run at the URL above it.
        OSError: the URL cannot be reached.
    """
    url = url_of(checkpoint)
    if url is None:
        return Path(checkpoint)
    found = re.fullmatch(rf"(.+)/{CHECKPOINTS}/(step-\d+)", url)
    if found is None:
        raise ValueError(f"{url}: not the URL of a checkpoint: one ends in {CHECKPOINTS}/step-00000100")
    return local_run(found[1], found[2]) / CHECKPOINTS / found[2]


def publish_checkpoint(
    folder: Path,
    url: str,
    marker: Mapping[str, Any],
    written: list[dict[str, tuple[int, str]]],
    keep_last: int,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Upload every rank's files of a checkpoint, then its marker; delete checkpoints beyond the limit. Collective.

    Args:
        folder: local folder with the files of this rank.
        url: URL of the checkpoint; an existing checkpoint is replaced.
        marker: as in `layout.commit`.
        written: for each rank, name -> (bytes, SHA-256) of its files.
        keep_last: number of newest checkpoints to keep, in addition to the best.

    Raises:
        ValueError: a file at the URL does not have the right size.
        OSError: the URL cannot be written to.
    """
    # First remove the marker of an existing checkpoint, so that readers do not use it while its files are replaced.
    coordination.run_on_rank_zero(lambda: _clear(url), group)
    coordination.run_on_all_ranks(lambda: upload_files(folder, written[coordination.rank()], url), group)

    def finish() -> None:
        uploaded = list_files(url)
        for name, (size, _) in (entry for of_rank in written for entry in of_rank.items()):
            arrived = uploaded[name].size if name in uploaded else 0
            if arrived != size:
                raise ValueError(f"{url}/{name}: {arrived} bytes arrived of {size}; the checkpoint is not used")
        # Object stores have no atomic rename. A checkpoint exists once its marker does, so the marker is uploaded last.
        write_synced(folder / files.MARKER, files.marker_text(marker, written))
        upload_files(folder, [files.MARKER], url)
        _prune(url.rpartition("/")[0], keep_last)

    coordination.run_on_rank_zero(finish, group)


def _clear(url: str) -> None:
    """Delete a checkpoint. The marker is deleted first, so that a partly deleted checkpoint is not used."""
    remove_files(url, [files.MARKER])
    remove_files(url, list_files(url))


def _prune(url: str, keep_last: int) -> None:
    """Delete all checkpoints at `url` except the `keep_last` newest and the best; also leftovers of failed uploads."""
    listed = list_files(url)
    markers = _markers(url.rpartition("/")[0], {f"{CHECKPOINTS}/{name}": facts for name, facts in listed.items()})
    kept = {*list(markers)[-keep_last:], *files.sort_by_metric(markers)[:1]}
    for name in sorted({name.split("/")[0] for name in listed} - kept):
        _clear(f"{url}/{name}")


def _states(folder: Path) -> dict[str, tuple[int, int]]:
    """Return name -> (bytes, modification time in ns) of a run's files, without checkpoints, hidden and .tmp files."""
    found = {}
    for file in folder.rglob("*"):
        parts = file.relative_to(folder).parts
        if file.is_file() and parts[0] != CHECKPOINTS and not any(p[0] == "." or p.endswith(".tmp") for p in parts):
            found["/".join(parts)] = (file.stat().st_size, file.stat().st_mtime_ns)
    return found


def _bring_files(url: str, listed: Mapping[str, FileFacts], local: Path) -> None:
    """Update a local copy: fetch files that have changed at the URL, and delete those that no longer exist there.

    listed: files at the URL.
    """
    record = local / FETCHED
    before = _fetched(record)
    now = {name: list(facts) for name, facts in listed.items() if name.split("/")[0] not in NOT_FETCHED}
    for name in before.keys() - now.keys():
        (local / name).unlink(missing_ok=True)
    fetch_files(url, [name for name in now if before.get(name) != now[name] or not (local / name).is_file()], local)
    replace_file(record, json.dumps(now))


def _fetched(record: Path) -> dict[str, Any]:
    """Return the contents of FETCHED; empty if they cannot be read, so that all files are fetched again."""
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _markers(url: str, listed: Mapping[str, FileFacts]) -> dict[str, dict[str, Any]]:
    """Return name -> marker for the checkpoints with a readable marker, in the order of their steps.

    url: URL of the run; listed: files at the URL.

    Raises:
        FileNotFoundError: a checkpoint was deleted after `listed` was made, which may then lack newer checkpoints.
    """
    names = _marker_names(listed)
    texts = {name: read_text(f"{url}/{CHECKPOINTS}/{name}/{files.MARKER}") for name in names}
    markers = {}
    for name, text in texts.items():
        if text is None:
            raise FileNotFoundError(f"{url}/{CHECKPOINTS}/{name}: was deleted while it was read: start again")
        try:
            markers[name] = json.loads(text)
        except ValueError:
            _logger.warning("%s/%s/%s has no readable %s; it is skipped", url, CHECKPOINTS, name, files.MARKER)
    return dict(sorted(markers.items(), key=lambda entry: int(entry[0][5:])))


def _marker_names(listed: Mapping[str, FileFacts]) -> list[str]:
    """Return the names of the checkpoints that have a marker."""
    return [found[1] for name in listed if (found := _MARKER.fullmatch(name))]


def _bring_checkpoint(url: str, listed: Mapping[str, FileFacts], local: Path, which: str) -> str | None:
    """Fetch the best or latest complete checkpoint, or the one with the name `which`.

    Local copies that no longer match the URL are deleted; another process that reads such a copy notices this and
    selects a checkpoint again. The copy of a checkpoint that is damaged at the URL gets no marker, so that readers skip
    it; the next best or next latest one is then fetched in addition.

    Returns:
        The name of the checkpoint, or None if there is none.
    """
    for stale in (local / CHECKPOINTS).glob("step-*.tmp-*"):  # left by a killed process: this process holds the lock
        shutil.rmtree(stale)
    for attempt in range(_ATTEMPTS):
        try:
            markers, before = _markers(url, listed), listed
            # A listing made during a deletion may mix the states before and after it; two equal listings do not.
            listed = list_files(url)
            if sorted(_marker_names(listed)) != sorted(_marker_names(before)):
                raise FileNotFoundError(f"{url}: its checkpoints change while they are read: start again")
            for copy in files.checkpoints_by_step(local / CHECKPOINTS):
                if files.examine(copy, check_hashes=False) != (markers.get(copy.name), None):
                    files.remove_checkpoint(copy)
            order = files.sort_by_metric(markers) if which == "best" else list(markers)[::-1]
            return _fetch_first(url, markers, local, order if which in ("best", "latest") else {which} & markers.keys())
        except FileNotFoundError:
            # The run has deleted a checkpoint at the URL meanwhile, and may have published newer ones.
            if attempt == _ATTEMPTS - 1:
                raise
            listed = list_files(url)
    raise AssertionError("unreachable")


def _fetch_first(url: str, markers: Mapping[str, dict[str, Any]], local: Path, order: Iterable[str]) -> str | None:
    """Fetch checkpoints in this order until one is complete; return its name, or None if none is."""
    for name in order:
        copy = local / CHECKPOINTS / name
        if not copy.exists():
            _fetch_checkpoint(f"{url}/{CHECKPOINTS}/{name}", markers[name], copy)
        if files.find_damage(copy, check_hashes=False) is None:
            return name
    return None


def _fetch_checkpoint(url: str, marker: Mapping[str, Any], copy: Path) -> None:
    """Fetch and verify a checkpoint. The copy of a damaged one gets no marker: readers skip it, and the next call of
    `_bring_checkpoint` fetches it again.

    Raises:
        FileNotFoundError: the checkpoint was deleted or replaced at the URL while it was fetched.
    """
    names = [files.MARKER, *(Path(name).name for name in marker["files"])]
    print_transfer("fetching", url, {name: size for name, (size, _) in marker["files"].items()})
    beside = copy.with_name(f"{copy.name}.tmp-{secrets.token_hex(4)}")
    try:
        fetch_files(url, names, beside)
        damage = files.find_damage(beside)
        if damage is not None:
            if read_text(f"{url}/{files.MARKER}") != (beside / files.MARKER).read_text(encoding="utf-8"):
                raise FileNotFoundError(f"{url}: was deleted or written again while it was fetched: start again")
            _logger.warning("%s %s", url, damage)
            (beside / files.MARKER).unlink()
        beside.rename(copy)
    finally:
        remove_folder(beside)
