"""Atomic writes of folders and files: readers see the complete content or none, also after a kill or a power loss."""

import ctypes
import fcntl
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hllm_torchrec.common.machine_errors import path_in_errors

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_LOCK = "lock"
_TOKEN = 8
"""Length of the random part of the names that `tempfile` makes."""
_OLD_AGE = 24 * 3600.0
"""Age in seconds after which a scratch folder without a lock counts as abandoned. Scratch folders have no lock on file
systems without locks, or if an earlier version created them."""


@contextmanager
def atomic_folder(target: Path, *, replace: bool = False, marker: str | None = None) -> Iterator[Path]:
    """Yield an empty temporary folder, which becomes `target` when the block ends without an exception.

    On an exception the folder is removed and an existing `target` is unchanged. The parent of the yielded folder is
    scratch space that is removed in either case; after a kill, the next call for the same target removes it. With
    `replace`, `target` exists at every moment if the file system can exchange two folders. On other file systems the
    replacement takes two renames, and `recover_folder` repairs the state after a kill between them. Without `replace`,
    an existing `target` is retained: another process has created it, and both are assumed to have the same content.

    Args:
        marker: name of a file that every complete `target` has; a `target` without it is replaced in any case.

    Raises:
        OSError: `target` is a file (with `replace` it is replaced), the disk is full, ...; the message names a path.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(target)
    with path_in_errors(target), _scratch(target) as work:
        new = work / "new"
        yield new
        # The contents must be on the disk before their name; otherwise a power loss could leave the name without them.
        sync_tree(new)
        unfinished = marker is not None and target.is_dir() and not (target / marker).exists()
        if (replace or unfinished) and target.exists():
            _replace_folder(new, target, work / "old")
        else:
            try:
                new.rename(target)
            except OSError:
                # Another process has created `target` in the meantime; its content is assumed to be the same.
                if replace or not target.is_dir():
                    raise
        sync_folder(target.parent)


def recover_folder(target: Path) -> None:
    """Restore a `target` whose replacement was killed, and remove the scratch of killed calls of `atomic_folder`.

    Call it before testing whether `target` exists. The scratch folder of a live process is not touched.
    """
    if not target.parent.is_dir():
        return
    name = re.compile(rf"\.{re.escape(target.name)}-(new-)?[a-z0-9_]{{{_TOKEN}}}")
    for work in sorted(path for path in target.parent.iterdir() if name.fullmatch(path.name)):
        if _is_abandoned(work):
            if (work / "old").is_dir() and not target.exists():
                (work / "old").rename(target)
                sync_folder(target.parent)
            _remove_scratch(work)


def exchange_folders(one: Path, other: Path) -> bool:
    """Exchange two folders of one file system atomically.

    Returns:
        False if the exchange failed, for example because the system or the file system does not support it.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return call is not None and call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def replace_file(path: Path, text: str) -> None:
    """Write a file atomically, also with respect to crashes: a temporary file is written, synced and renamed."""
    beside = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    _remove_old_temporaries(path)
    try:
        # The content must be on the disk before the rename; otherwise a crash could leave the name without content.
        with path_in_errors(path):
            _write_synced(beside, text)
            beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_synced(path: Path, text: str) -> None:
    """Write a file and wait until it is on the disk."""
    with path_in_errors(path):
        _write_synced(path, text)


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the directory entries of a folder are on the disk."""
    _sync(path)


def sync_tree(folder: Path) -> None:
    """Wait until a folder and everything in it are on the disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            if not os.path.islink(path := os.path.join(parent, name)):
                _sync(path)
        _sync(parent)


def remove_folder(path: Path) -> None:
    """Remove a folder with its contents, if it exists."""
    if path.exists():
        shutil.rmtree(path)


@contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `target`, with a folder `new` and a lock of this process; removed at the end."""
    # The folder gets its final name, which `recover_folder` looks for, only after it is locked. Otherwise another
    # process could take it for abandoned.
    unlocked = Path(tempfile.mkdtemp(prefix=f".{target.name}-new-", dir=target.parent))
    work = unlocked.with_name(f".{target.name}-{unlocked.name[-_TOKEN:]}")
    handle = os.open(unlocked / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not _lock(handle):  # a file system without locks: the folder's age then tells whether it is abandoned
            (unlocked / _LOCK).unlink()
        (unlocked / "new").mkdir()
        unlocked.rename(work)
        yield work
    finally:
        try:
            _leave(work, unlocked, target)
        except KeyboardInterrupt:
            _leave(work, unlocked, target)
            raise
        finally:
            os.close(handle)


def _leave(work: Path, unlocked: Path, target: Path) -> None:
    """Remove the scratch folder, under either of its names."""
    # The second rename of a replacement failed, or the process was interrupted before it: restore the old folder.
    if (work / "old").exists() and not target.exists():
        (work / "old").rename(target)
    for folder in (work, unlocked):
        _remove_scratch(folder)


def _lock(handle: int) -> bool:
    """Lock an open file without waiting; the system releases it when the process ends."""
    # Not with filelock: its locks are bound to a path, but this folder is renamed while the lock is held.
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_abandoned(work: Path) -> bool:
    """Return whether the process that created this scratch folder has ended."""
    try:
        if work.name[:-_TOKEN].endswith("-new-"):  # not locked yet
            return time.time() - work.stat().st_mtime > _OLD_AGE
        handle = os.open(work / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        if not any(work.iterdir()):  # a kill interrupted its removal
            return True
        return (work / "new").is_dir() and time.time() - work.stat().st_mtime > _OLD_AGE
    except OSError:
        return False  # another user's folder, or not a folder
    try:
        return _lock(handle)
    finally:
        os.close(handle)


def _remove_scratch(work: Path) -> None:
    """Remove a scratch folder. The lock goes last: without it the folder would not be recognized as abandoned."""
    for name in os.listdir(work) if work.is_dir() else ():
        if name != _LOCK:
            shutil.rmtree(work / name, ignore_errors=True)
    shutil.rmtree(work, ignore_errors=True)


def _replace_folder(new: Path, target: Path, old: Path) -> None:
    """Rename the folder `target` to `old`, and `new` to `target`, with one exchange if the system supports it."""
    if target.is_dir() and not target.is_symlink() and exchange_folders(new, target):
        new.rename(old)
        return
    # A rename cannot replace a non-empty folder, so `target` is moved away first.
    target.rename(old)
    new.rename(target)


def _sync(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_old_temporaries(path: Path) -> None:
    """Remove the temporary files of killed calls of `replace_file`: those older than `_OLD_AGE`."""
    name = re.compile(rf"\.{re.escape(path.name)}-[0-9a-f]{{8}}")
    for beside in path.parent.iterdir() if path.parent.is_dir() else ():
        if name.fullmatch(beside.name) and time.time() - beside.lstat().st_mtime > _OLD_AGE:
            beside.unlink(missing_ok=True)
