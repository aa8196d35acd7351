"""Errors of the machine (disk, permissions, open files, memory), which say nothing about what a file contains."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_ERRNOS = {
    *_FULL_DISK,
    *(errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.ENOMEM, errno.EROFS),
    *(errno.EFBIG, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ENXIO, errno.ENODEV, errno.ENOTCONN, errno.ETIMEDOUT),
}
_NO_SPACE = os.strerror(errno.ENOSPC)


def is_machine_error(error: BaseException) -> bool:
    """Return whether an error comes from the machine: the file may be whole, and reading it again may succeed.

    Such an error must not be taken for damage: the file is not passed over, and nobody is told to build it again.
    """
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _ERRNOS)


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error means that the disk (or the quota) is full, whatever library raises it."""
    return _NO_SPACE in str(error) if not isinstance(error, OSError) else error.errno in _FULL_DISK


@contextmanager
def path_in_errors(path: str | Path) -> Iterator[None]:
    """Context manager that gives `path` to errors of the machine that name no file.

    Raises:
        OSError: with errno, its text and the path; also for a MemoryError, and for a full disk in another library's
            type of error.
    """
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else errno.ENOSPC if is_disk_full(error) else None
        if isinstance(error, MemoryError):
            number = errno.ENOMEM
        if number not in _ERRNOS or getattr(error, "filename", None) is not None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error
