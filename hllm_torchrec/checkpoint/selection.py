"""Choice of a checkpoint, and reading it while the run that writes it goes on: it may prune or replace any of them.

A checkpoint disappears in one step (it is renamed before it is deleted), and each has its own marker. So a reader that
finds the same marker before and after has read one version; otherwise it chooses again.
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
    """Return the newest complete checkpoint, or None. Collective: every rank gets the same answer.

    All files are hashed, divided among the ranks. A damaged checkpoint is skipped with a warning.

    Raises:
        OSError: a file could not be read for a reason that is no damage; names it.
    """
    return _first_complete(Path(directory), lambda: files.checkpoints_by_step(Path(directory))[::-1])


def best_checkpoint(directory: Path) -> Path | None:
    """Return the complete checkpoint of the best metric (the earliest of equals), or None. Collective.

    `better` in the newest checkpoint's marker says whether larger or smaller is better. All files are hashed; a damaged
    checkpoint is skipped with a warning.

    Raises:
        OSError: as `latest_checkpoint`.
    """
    return _first_complete(Path(directory), lambda: files.checkpoints_by_metric(Path(directory)))


def run_checkpoint(run: str | Path, which: str) -> Path | None:
    """Return the "best" or "latest" complete checkpoint of a run; of a URL, this host's copy. None without. Collective.

    Raises:
        ValueError, OSError: there is no run at the URL, or it cannot be reached.
    """
    url = url_of(run)
    if url is None:
        folder = Path(run) / CHECKPOINTS
        return latest_checkpoint(folder) if which == "latest" else best_checkpoint(folder)

    def fetched() -> Path | None:
        # Chosen at the URL: other processes of the host change the copies, so the best of them may not be the run's.
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
        ValueError: it is damaged or not a checkpoint; names the file.
        OSError: as `latest_checkpoint`.
    """
    damage, moved = _damage(path)
    if moved:
        raise CheckpointGone(_gone(path))
    if damage:
        raise ValueError(f"{path} {damage}; load the checkpoint before it")
    return path


def read_checkpoint(find: Callable[[], Path], read: Callable[[Path], T]) -> T:
    """Return `read(find())`, chosen and read again if the checkpoint is removed or replaced meanwhile. Collective.

    Raises:
        CheckpointGone: it happened again and again.
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
    """Context manager for reading a checkpoint: when it ends, the checkpoint is still the one that it was. Collective.

    Raises:
        CheckpointGone: it was removed or replaced meanwhile, instead of the error that this may have caused.
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
        f"{path} is gone, or was replaced while it was read, as a run keeps evaluation.keep_last checkpoints: choose "
        "one that is there"
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
            damage, moved = _damage(path)
            if damage is None:
                return path
            if moved:
                break  # pruned since it was listed, perhaps for a newer one, or replaced: list again
            if coordination.rank() == 0 and path not in warned:
                _logger.warning("%s %s; it is passed over", path, damage)
            warned.add(path)
        else:
            return None
    raise CheckpointGone(f"{directory}: its checkpoints are removed faster than they are read: keep more of them")


def _damage(path: Path) -> tuple[str | None, bool]:
    """Return the damage of a checkpoint's files, or None, and whether it was removed or replaced meanwhile.

    Collective: each rank hashes a share of the files.
    """
    share = coordination.rank(), coordination.world_size()
    before = _marker(path)
    damage = next(filter(None, coordination.run_on_all_ranks(lambda: files.find_damage(path, share=share))), None)
    if damage is None:
        return None, False
    return damage, any(coordination.run_on_all_ranks(lambda: _marker(path) != before or not path.exists()))
