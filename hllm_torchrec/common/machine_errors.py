"""Errors of the machine (disk, permissions, open files, memory), which say nothing about what a file contains."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_ERRNOS = {
    *_FULL_DISK,
    *(errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.ENOMEM, errno.EROFS),
    *(errno.EFBIG, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ENXIO, errno.ENODEV, errno.ENOTCONN, errno.ETIMEDOUT),
}
_NO_SPACE = re.compile(rf"{os.strerror(errno.ENOSPC)}|^\d+ requested and \d+ written$")
"""Pattern of the messages of a full disk: the system's text, which many libraries quote, and numpy's text."""


def is_machine_error(error: BaseException) -> bool:
    """Return whether an error comes from the machine: the file may be intact, and reading it again may succeed.

    Callers must not treat such an error as damage: they must not skip the file or advise the user to build it again.
    """
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _ERRNOS)


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error of any library means that the disk (or the quota) is full."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL_DISK
    return _NO_SPACE.search(str(error)) is not None


@contextmanager
def path_in_errors(path: str | Path) -> Iterator[None]:
    """Context manager that adds `path` to errors of the machine that do not name a file.

    Raises:
        OSError: errno, its text and the path. A MemoryError, and an error of any type that reports a full disk, become
            an OSError too.
    """
    try:
        yield
    except Exception as error:
        number = errno.ENOSPC if is_disk_full(error) else getattr(error, "errno", None)
        if isinstance(error, MemoryError):
            number = errno.ENOMEM
        if number not in _ERRNOS or getattr(error, "filename", None) is not None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error
