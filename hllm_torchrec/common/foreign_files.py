"""Readable errors for files of other programs: libraries raise almost any type of error for a damaged file."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hllm_torchrec.common.errors import ArgumentError, ConfigError, Preempted

_POINTER = b"version https://git-lfs"
_LONGEST_POINTER = 1024


@contextmanager
def reading_foreign(location: object, remedy: str) -> Iterator[None]:
    """Context manager that turns a library's exception into a ValueError of one line: location, reason, remedy.

    Errors of the machine (MemoryError, and OSError with an errno other than "no such file") are raised unchanged. So
    are ArgumentError, ConfigError, Preempted, and each plain ValueError whose message starts with `location`.
    """
    try:
        yield
    except (ArgumentError, ConfigError, Preempted, MemoryError):
        raise
    except OSError as error:
        if error.errno is not None and not isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{location}: {first_line(error)}; {remedy}") from error
    except Exception as error:
        if type(error) is ValueError and str(error).startswith(str(location)):
            raise
        raise ValueError(f"{location}: {first_line(error)}; {remedy}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 200 characters.

    The name of the error's type precedes it, except for ValueError and OSError, whose messages are clear without it.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = "" if type(error) in (ValueError, OSError) else f"{type(error).__name__}: "
    return f"{kind}{lines[0][:200].rstrip('.;: ')}" if lines else type(error).__name__


def refuse_pointers(files: Iterable[Path]) -> None:
    """Raise ValueError for a file that is only a git-lfs pointer to the actual file."""
    for path in files:
        if path.is_file() and path.stat().st_size <= _LONGEST_POINTER and path.read_bytes().startswith(_POINTER):
            raise ValueError(
                f"{path}: a pointer of git-lfs, not the file itself; run `git lfs pull` where it came from, or fetch "
                "it again"
            )
