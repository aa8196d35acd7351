"""Reading of files that other programs made with libraries that raise almost anything for a damaged one."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hllm_torchrec.common.errors import ArgumentError, ConfigError, Preempted

_POINTER = b"version https://git-lfs"
_LONGEST_POINTER = 1024


@contextmanager
def reading_foreign(location: object, remedy: str) -> Iterator[None]:
    """Context manager that turns a library's exception into one line: `location`, the reason and the remedy.

    Errors of the machine (OSError with an errno other than "no such file", MemoryError) are raised unchanged, and so
    are our own errors.
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
    """The first line of an error's message, at most 200 characters, with the type where the message may be terse."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = "" if type(error) in (ValueError, OSError) else f"{type(error).__name__}: "
    return f"{kind}{lines[0][:200].rstrip('.;: ')}" if lines else type(error).__name__


def refuse_pointers(files: Iterable[Path]) -> None:
    """Raise ValueError for a file that is only git-lfs's pointer to the real one."""
    for path in files:
        if path.is_file() and path.stat().st_size <= _LONGEST_POINTER and path.read_bytes().startswith(_POINTER):
            raise ValueError(
                f"{path}: a pointer of git-lfs, not the file itself; run `git lfs pull` where it came from, or fetch "
                "it again"
            )
