"""Atomic writes of folders and files: readers see the complete content or none."""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder, which is renamed to `target` when the block ends without an exception.

    On an exception the folder is removed and an existing `target` is unchanged. The parent of the yielded folder is
    scratch space that is removed in either case. Without `replace`, a `target` that another process has created in
    the meantime is retained, because both are assumed to have the same content.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    new, old = work / "new", work / "old"
    try:
        new.mkdir()
        yield new
        # A rename cannot replace a folder that is not empty, so the old one is moved away first.
        if replace and target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except OSError:
            # Another process was first: its folder is as good as this one.
            if replace or not target.is_dir():
                raise
    finally:
        # The second rename failed: restore the old folder.
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(work, ignore_errors=True)


def replace_file(path: Path, text: str) -> None:
    """Write a file atomically, also with respect to crashes: write a temporary file, sync it, rename it."""
    beside = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        # The content must be on the disk before the rename; otherwise a crash could leave the name without content.
        write_synced(beside, text)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_synced(path: Path, text: str) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the directory entries of a folder are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_folder(path: Path) -> None:
    """Remove a folder with its contents, if it exists."""
    if path.exists():
        shutil.rmtree(path)
