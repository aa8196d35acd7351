"""Folders and files that appear whole or not at all."""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Gives an empty folder beside `target`, which takes its place when the block ends without an exception.

    With an exception nothing is left of it, and what was at `target` stays. The folder's parent is scratch
    space that goes in either case. Without `replace`, a `target` that another process has put there in the
    meantime wins, since both are taken to hold the same.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    new, old = work / "new", work / "old"
    try:
        new.mkdir()
        yield new
        if replace and target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except OSError:
            if replace or not target.is_dir():
                raise
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(work, ignore_errors=True)


def replace_file(path: Path, text: str) -> None:
    """Write a file that readers find whole or not at all, also after a crash: synced beside, then renamed."""
    beside = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
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
    """Wait until the names in a folder are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_folder(path: Path) -> None:
    """Remove a folder and what is in it, if it is there."""
    if path.exists():
        shutil.rmtree(path)
