"""Selects a checkpoint and reads it while the run may still write, prune or replace checkpoints.

A checkpoint disappears in one step (it is renamed before it is deleted), and the text of its marker (step, metric,
hashes of the files) identifies its version. A reader that finds the same marker text before and after reading has read
a single version; otherwise it selects again.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from hllm_torchrec.checkpoint import layout as files
from hllm_torchrec.checkpoint.remote_runs import CHECKPOINTS, fetch_checkpoint, local_run
from hllm_torchrec.common.urls import url_of
from hllm_torchrec.distributed import coordination

T = TypeVar("T")
_ATTEMPTS = 20
_logger = logging.getLogger(__name__)


class CheckpointGone(ValueError):
    """A checkpoint was removed or replaced while it was read. Raised on all ranks."""


def latest_checkpoint(directory: Path) -> Path | None:
    """Return the newest complete checkpoint, or None. Collective: every rank gets the same result.

    The files are verified by their hashes; each rank hashes a share of them. A damaged checkpoint is skipped with a
    warning.

    Raises:
        OSError: the machine could not read a file (permissions, too many open files, ...), which does not mean that the
            checkpoint is damaged; the message contains the path.
        CheckpointGone: checkpoints were removed or replaced again and again while they were read.
    """
    return _first_complete(Path(directory), lambda: files.checkpoints_by_step(Path(directory))[::-1])


def best_checkpoint(directory: Path) -> Path | None:
    """Return the complete checkpoint with the best metric (the earliest one of a tie), or None. Collective.

    `better` in the marker of the newest checkpoint states whether larger or smaller is better. Files are verified, and
    damaged checkpoints skipped, as in `latest_checkpoint`.

    Raises:
        OSError, CheckpointGone: as `latest_checkpoint`.
    """
    return _first_complete(Path(directory), lambda: files.checkpoints_by_metric(Path(directory)))


def run_checkpoint(run: str | Path, which: str) -> Path | None:
    """Return the "best" or "latest" complete checkpoint of a run, or None if there is none. Collective.

    If the run is at a URL, the result is this host's copy of the checkpoint.

    Raises:
        ValueError: the URL has a checkpoint but no config.yaml, or the fetched copy is damaged.
        OSError: the URL cannot be reached, or as `latest_checkpoint`.
        CheckpointGone: the checkpoint was removed or replaced in every attempt.
    """
    url = url_of(run)
    if url is None:
        folder = Path(run) / CHECKPOINTS
        return latest_checkpoint(folder) if which == "latest" else best_checkpoint(folder)

    def fetched() -> Path | None:
        # Select by the markers at the URL, not among the local copies: other processes of this host add and delete
        # copies, so the best local copy may not be the best checkpoint of the run.
        name = coordination.run_on_rank_zero(lambda: fetch_checkpoint(url, which))
        if name is None:
            return None
        copies = coordination.run_on_all_ranks(lambda: str(local_run(url, name) / CHECKPOINTS / name))
        return verify_checkpoint(Path(copies[coordination.rank()]))

    for _ in range(_ATTEMPTS - 1):
        try:
            return fetched()
        except CheckpointGone:
            continue
    return fetched()


def verify_checkpoint(path: Path) -> Path:
    """Verify the hashes of all files of a checkpoint, and return its path. Collective.

    Raises:
        ValueError: the checkpoint is damaged, or `path` is not a checkpoint; the message contains the file.
        CheckpointGone: the checkpoint was removed or replaced while it was read.
        OSError: as `latest_checkpoint`.
    """
    damage, gone_or_replaced = _damage(path)
    if gone_or_replaced:
        raise CheckpointGone(_gone(path))
    if damage:
        raise ValueError(f"{path} {damage}; load the checkpoint before it")
    return path


def read_checkpoint(find: Callable[[], Path], read: Callable[[Path], T]) -> T:
    """Return `read(find())`; if the checkpoint is removed or replaced meanwhile, call both again. Collective.

    Raises:
        CheckpointGone: the checkpoint was removed or replaced in every attempt.
    """
    for _ in range(_ATTEMPTS - 1):
        try:
            path = find()
            with unchanged(path):
                return read(path)
        except CheckpointGone as gone:
            if coordination.rank() == 0:
                _logger.warning("%s: choosing again", gone)
    path = find()
    with unchanged(path):
        return read(path)


@contextmanager
def unchanged(path: Path) -> Iterator[None]:
    """Context manager for reading a checkpoint: at its end, checks that the checkpoint has not changed. Collective.

    Raises:
        CheckpointGone: the checkpoint was removed or replaced meanwhile. It replaces an exception of the body, which
            becomes its cause.
    """
    before = _marker(path)
    try:
        yield
    except Exception as error:
        _require_same(path, before, error)
        raise
    _require_same(path, before)


def _require_same(path: Path, before: str | None, cause: Exception | None = None) -> None:
    if not all(coordination.run_on_all_ranks(lambda: _marker(path) == before and path.exists())):
        raise CheckpointGone(_gone(path)) from cause


def _gone(path: Path) -> str:
    return (
        f"{path} was removed or replaced while it was read (a run keeps only the evaluation.keep_last newest "
        "checkpoints and the best): choose an existing checkpoint"
    )


def _marker(path: Path) -> str | None:
    try:
        return (path / files.MARKER).read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None


def _first_complete(directory: Path, listed: Callable[[], list[Path]]) -> Path | None:
    """Return the first of the listed checkpoints that is not damaged; warn about those before it."""
    warned = set[Path]()
    for _ in range(_ATTEMPTS):
        paths = coordination.run_on_rank_zero(listed)
        for path in paths:
            damage, gone_or_replaced = _damage(path)
            if damage is None:
                return path
            if gone_or_replaced:
                break  # list again, because the run may have saved a newer checkpoint
            if coordination.rank() == 0 and path not in warned:
                _logger.warning("%s %s; it is skipped", path, damage)
            warned.add(path)
        else:
            return None
    raise CheckpointGone(f"{directory}: its checkpoints are removed faster than they are read: keep more of them")


def _damage(path: Path) -> tuple[str | None, bool]:
    """Return (damage of a checkpoint's files or None, whether the checkpoint was removed or replaced meanwhile).

    Collective: each rank hashes a share of the files.
    """
    share = coordination.rank(), coordination.world_size()
    before = _marker(path)
    damage = next(filter(None, coordination.run_on_all_ranks(lambda: files.find_damage(path, share=share))), None)
    if damage is None:
        return None, False
    return damage, any(coordination.run_on_all_ranks(lambda: _marker(path) != before or not path.exists()))
