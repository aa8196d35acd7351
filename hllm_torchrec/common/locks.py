"""Locks between processes. Messages name the process that holds a lock; when a process dies, the system releases its
locks."""

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from hllm_torchrec.common.atomic_files import replace_file
from hllm_torchrec.common.terminal import say

WAIT = "HLLM_LOCK_WAIT"
"""Environment variable: maximum number of seconds that a process waits for a lock of another process."""
_DEFAULT_WAIT = 3600.0
_FIRST_NOTICE, _NOTICES = 3.0, 60.0
"""Seconds after which a wait is announced, and seconds between further announcements."""


class Locked(ValueError):
    """Another process holds the lock; the message names that process."""


@contextmanager
def hold_lock(file: Path, what: str, *, wait: float = 0.0) -> Iterator[None]:
    """Context manager that holds the lock `file`, whose folder must exist.

    The holding process is described in a file beside the lock, which other processes read for their messages.

    Args:
        what: subject of the message, such as "runs/a: another process is training into this folder".
        wait: seconds to wait for the lock.

    Raises:
        Locked: another process still holds the lock after `wait` seconds; the message contains `what`, the process,
            its host, and the time at which it took the lock.
    """
    lock, begun, notice = FileLock(file), time.monotonic(), _FIRST_NOTICE
    while True:
        left = begun + wait - time.monotonic()
        try:
            held = lock.acquire(timeout=max(0.0, min(left, notice)), poll_interval=0.05)
            break
        except Timeout:
            if left <= notice:
                hint = f"; this process waited for {wait:.0f} seconds ({WAIT})" if wait else ""
                raise Locked(f"{what} ({_holder(file)}): wait for it, or stop it{hint}") from None
            say(f"waiting: {what} ({_holder(file)})", sys.stderr)
            notice = _NOTICES
    with held:
        _describe_self(file)
        try:
            yield
        finally:
            _description(file).unlink(missing_ok=True)


def lock_wait() -> float:
    """Return the seconds that a process waits for a lock of another process: HLLM_LOCK_WAIT, by default an hour.

    Raises:
        ValueError: the variable is not a number of seconds.
    """
    text = os.environ.get(WAIT, str(_DEFAULT_WAIT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e9:
        raise ValueError(f"{WAIT}: {text!r} is not a number of seconds")
    return seconds


def _description(file: Path) -> Path:
    return file.with_name(f"{file.name}.holder")


def _describe_self(file: Path) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    holder = {"process": os.getpid(), "host": socket.gethostname(), "since": now}
    with suppress(OSError):  # a full disk must not prevent locking: only messages then lack the holder's name
        replace_file(_description(file), json.dumps(holder))


def _holder(file: Path) -> str:
    """Return "process 12 on host-a since 2026-01-01T00:00:00+00:00", or the lock's path if the holder is not known."""
    try:
        found = json.loads(_description(file).read_text(encoding="utf-8"))
        return f"process {int(found['process'])} on {str(found['host'])[:100]} since {str(found['since'])[:40]}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"its lock is {file}"
