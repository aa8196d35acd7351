"""Run directories at URLs: written on each host and published with every checkpoint; copied to be read.

    <url>/config.yaml, log.jsonl, tensorboard/ ...   before each checkpoint and at the end, by each host its own
    <url>/checkpoints/step-00000100/                 each rank's files by that rank, COMPLETE last, by rank 0

The hosts of a job need no common disk for this. A run's copies for reading and its folder for writing are apart, so a
run may be evaluated on the host that trains it.
"""

import json
import logging
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hllm_torchrec.checkpoint import layout as files
from hllm_torchrec.common.atomic_files import remove_folder, write_synced
from hllm_torchrec.common.errors import Preempted
from hllm_torchrec.common.urls import (
    FileFacts,
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
"""Folders that no job needs a copy of to read a run or to go on with it; checkpoints are fetched one at a time."""
FETCHED = ".fetched.json"
"""In a copy: what the URL had of each file when it was fetched."""
_MARKER = re.compile(rf"{CHECKPOINTS}/(step-\d+)/{files.MARKER}")
_logger = logging.getLogger(__name__)


class RunStorage:
    """Where a run is written: a folder of this host, and the URL to which it is published, if it has one."""

    def __init__(self, folder: Path, url: str | None) -> None:
        self.folder, self.url = folder, url
        self._sent = _states(folder) if url is not None else {}

    @property
    def checkpoints(self) -> str | None:
        """The URL of the run's checkpoints, if it has one."""
        return None if self.url is None else f"{self.url}/{CHECKPOINTS}"

    def publish(self) -> None:
        """Upload each host's files that are new or have changed, checkpoints aside. Collective where there is a URL."""
        if self.url is not None:
            coordination.run_on_each_host(self._upload_changed)

    @contextmanager
    def published_on_exit(self) -> Iterator[None]:
        """A context at whose end the run is published, unless it ends with an error."""
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
        self._sent |= states


def open_run_storage(output: str) -> RunStorage:
    """Where the run `output` is written, with what a URL has of it already: its files and newest whole checkpoint.

    Collective.

    Raises:
        ValueError, OSError: the URL cannot be reached.
    """
    url = url_of(output)
    if url is None:
        return RunStorage(Path(output), None)

    def bring() -> Path:
        with host_lock(url) as folder:
            local = folder / "written" / url_name(url)
            there = list_files(url)
            if not there:
                remove_folder(local)  # the run was removed there, so it is none here
            _bring_files(url, there, local)
            _bring_checkpoint(url, there, local, "latest")
            return local

    coordination.run_on_each_host(bring)
    with host_lock(url) as folder:
        return RunStorage(folder / "written" / url_name(url), url)


def local_run(run: str | Path, which: str | None = None) -> Path:
    """A run directory to read: itself, or for a URL this host's copy. Not collective.

    Args:
        which: a checkpoint that is wanted too: "best", "latest", or its name, as step-00000100.

    Raises:
        ValueError: there is no run at the URL.
        OSError: it cannot be reached.
    """
    url = url_of(run)
    if url is None:
        return Path(run)
    with host_lock(url) as folder:
        local, there = folder / "read" / url_name(url), list_files(url)
        if "config.yaml" not in there:
            raise ValueError(f"{url} is not a run directory: it has no config.yaml; train into it first")
        _bring_files(url, there, local)
        if which is not None:
            _bring_checkpoint(url, there, local, which)
    return local


def local_checkpoint(checkpoint: str | Path) -> Path:
    """A checkpoint that somebody has named: itself, or for a URL this host's copy. Not collective.

    Raises:
        ValueError: a URL that does not end as checkpoints/step-00000100, or that has no run.
        OSError: it cannot be reached.
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
    """Upload what every rank has written of a checkpoint, then its marker; delete those no longer kept. Collective.

    Args:
        folder: the folder of this host with this rank's files.
        url: the checkpoint's own; one that is there is replaced.
        marker: as in `layout.commit`.
        written: for each rank, name -> (bytes, SHA-256) of its files.
        keep_last: how many of the newest to keep, besides the best.

    Raises:
        ValueError: a file did not arrive.
        OSError: the URL cannot be written to.
    """
    coordination.run_on_rank_zero(lambda: _clear(url), group)
    coordination.run_on_all_ranks(lambda: upload_files(folder, written[coordination.rank()], url), group)

    def finish() -> None:
        there = list_files(url)
        for name, (size, _) in (entry for of_rank in written for entry in of_rank.items()):
            arrived = there[name].size if name in there else 0
            if arrived != size:
                raise ValueError(f"{url}/{name}: {arrived} bytes arrived of {size}; the checkpoint is not used")
        write_synced(folder / files.MARKER, files.marker_text(marker, written))
        upload_files(folder, [files.MARKER], url)
        _prune(url.rpartition("/")[0], keep_last)

    coordination.run_on_rank_zero(finish, group)


def _clear(url: str) -> None:
    """Remove a checkpoint; its marker first, so that half of one is never taken for one."""
    remove_files(url, [files.MARKER])
    remove_files(url, list_files(url))


def _prune(url: str, keep_last: int) -> None:
    """Of the checkpoints at `url`, keep the last few and the best; what an upload that was cut short left goes, too."""
    there = list_files(url)
    markers = _markers(url.rpartition("/")[0], {f"{CHECKPOINTS}/{name}": facts for name, facts in there.items()})
    kept = {*list(markers)[-keep_last:], *files.sort_by_metric(markers)[:1]}
    for name in sorted({name.split("/")[0] for name in there} - kept):
        _clear(f"{url}/{name}")


def _states(folder: Path) -> dict[str, tuple[int, int]]:
    """Name -> (bytes, time of the last change) of a run's files, checkpoints and hidden ones aside."""
    found = {}
    for file in folder.rglob("*"):
        parts = file.relative_to(folder).parts
        if file.is_file() and parts[0] != CHECKPOINTS and not any(p[0] == "." or p.endswith(".tmp") for p in parts):
            found["/".join(parts)] = (file.stat().st_size, file.stat().st_mtime_ns)
    return found


def _bring_files(url: str, there: Mapping[str, FileFacts], local: Path) -> None:
    """Fetch a run's files that have changed at the URL since; those that have gone there go here."""
    record = local / FETCHED
    before: dict[str, Any] = json.loads(record.read_text()) if record.is_file() else {}
    now = {name: list(facts) for name, facts in there.items() if name.split("/")[0] not in NOT_FETCHED}
    for name in before.keys() - now.keys():
        (local / name).unlink(missing_ok=True)
    fetch_files(url, [name for name in now if before.get(name) != now[name] or not (local / name).is_file()], local)
    record.write_text(json.dumps(now))


def _markers(url: str, there: Mapping[str, FileFacts]) -> dict[str, dict[str, Any]]:
    """Name -> marker of the checkpoints at a run's URL that have a readable one, in the order of their steps."""
    names = [found[1] for name in there if (found := _MARKER.fullmatch(name))]
    texts = {name: read_text(f"{url}/{CHECKPOINTS}/{name}/{files.MARKER}") for name in names}
    markers = {}
    for name, text in texts.items():
        try:
            markers[name] = json.loads(text or "")
        except ValueError:
            _logger.warning("%s/%s/%s has no readable %s; it is passed over", url, CHECKPOINTS, name, files.MARKER)
    return dict(sorted(markers.items(), key=lambda entry: int(entry[0][5:])))


def _bring_checkpoint(url: str, there: Mapping[str, FileFacts], local: Path, which: str) -> None:
    """Fetch the best whole checkpoint, the latest one or one by name; forget copies of those that are not there now.

    One that is damaged there is here without its marker, for the caller to pass over, and the next one comes too.
    """
    markers = _markers(url, there)
    for copy in files.checkpoints_by_step(local / CHECKPOINTS):
        if files.find_damage(copy, check_hashes=False) or files.read_marker(copy) != markers.get(copy.name):
            shutil.rmtree(copy)
    order = files.sort_by_metric(markers) if which == "best" else list(markers)[::-1]
    for name in order if which in ("best", "latest") else {which} & markers.keys():
        copy = local / CHECKPOINTS / name
        if not copy.exists():
            _fetch_checkpoint(f"{url}/{CHECKPOINTS}/{name}", markers[name], copy)
        if files.find_damage(copy, check_hashes=False) is None:
            return


def _fetch_checkpoint(url: str, marker: Mapping[str, Any], copy: Path) -> None:
    """Fetch one, and check what has come; of a damaged one no marker is kept, so it is fetched anew the next time."""
    names = [files.MARKER, *(Path(name).name for name in marker["files"])]
    print_transfer("fetching", url, {name: size for name, (size, _) in marker["files"].items()})
    beside = copy.with_name(f"{copy.name}.tmp-{secrets.token_hex(4)}")
    try:
        fetch_files(url, names, beside)
        damage = files.find_damage(beside)
        if damage is not None:
            _logger.warning("%s %s", url, damage)
            (beside / files.MARKER).unlink()
        beside.rename(copy)
    finally:
        remove_folder(beside)
