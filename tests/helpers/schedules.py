"""Schedules: the interfering action of another process just before the k-th file access of a reader, for every k.

A race between two processes is a question of moments. Here the moments are enumerated: the reader runs once for each
of its file accesses, and the action happens before that access. A reader that holds in every schedule has no race with
that action; a stress test would find some of them, sometimes.
"""

import builtins
import io
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from tests.helpers.distributed import forks

T = TypeVar("T")
_KILLED = 9

_ACCESSES: tuple[tuple[Any, str], ...] = (
    *((os, name) for name in ("stat", "lstat", "open", "scandir", "listdir", "rename", "replace", "unlink", "mkdir")),
    *((os, name) for name in ("rmdir", "readlink", "link")),
    (builtins, "open"),
    (io, "open"),
    (pa, "memory_map"),
    (pa, "OSFile"),
    (pq, "ParquetFile"),
    (pacsv, "open_csv"),
)
"""Functions through which this library and numpy, torch and fsspec reach files; Arrow's own are in C++."""


def schedules(
    read: Callable[[], T],
    act: Callable[[], object],
    under: Path,
    fresh: Callable[[], object] = lambda: None,
    stride: int = 1,
) -> Iterator[tuple[int, T | Exception]]:
    """Yield (k, result or error of `read`), with `act` done before its k-th access below `under`, for every k.

    fresh: sets up the files again, before each schedule; stride: only every so many k, for long readers.
    """
    k = 1
    while True:
        fresh()
        with acting_before(k, act, under) as acted:
            try:
                result: T | Exception = read()
            except Exception as error:
                result = error
        if not acted:
            return
        yield k, result
        k += stride


@contextmanager
def acting_before(k: int, act: Callable[[], object], under: Path) -> Iterator[list[int]]:
    """Context manager in which `act` is called before the k-th file access below `under`.

    The list that it yields is empty as long as that has not happened.
    """
    acted: list[int] = []
    count, busy, root = 0, False, str(under.resolve())

    def before(path: Any) -> None:
        nonlocal count, busy
        if busy or acted or not _is_below(path, root):
            return
        count += 1
        if count == k:
            acted.append(k)
            busy = True  # the accesses of the action itself do not count
            try:
                act()
            finally:
                busy = False

    with ExitStack() as stack:
        for owner, name in _ACCESSES:
            stack.enter_context(patch.object(owner, name, _announced(getattr(owner, name), before)))
        yield acted


def _announced(original: Any, before: Callable[[Any], None]) -> Any:
    """Return the function, or a subclass of the class, that first calls `before` with its path."""
    if isinstance(original, type) and original.__init__ is not object.__init__:

        class Announced(original):  # type: ignore[misc, valid-type]
            def __init__(self, path: Any, *args: Any, **options: Any) -> None:
                before(path)
                super().__init__(path, *args, **options)

        return Announced

    def call(path: Any = ".", *args: Any, **options: Any) -> Any:
        before(path)
        return original(path, *args, **options)

    return call


def _is_below(path: Any, root: str) -> bool:
    if not isinstance(path, str | bytes | os.PathLike):
        return False
    text = os.path.abspath(os.fsdecode(path))
    return text == root or text.startswith(root + os.sep)


def killed_before_access(k: int, under: Path, function: Callable[..., object], *args: Any) -> bool:
    """Whether a process that calls `function(*args)` was killed before its k-th file access below `under`.

    function: of the top level of a module. The process is not a fork of this one: a fork of a process with threads
    waits for ever for a lock that one of them had.
    """
    process = forks().Process(target=_call_until_access, args=(k, under, function, args))
    process.start()
    process.join(120)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode in (0, _KILLED), process.exitcode
    return process.exitcode == _KILLED


def _call_until_access(k: int, under: Path, function: Callable[..., object], args: tuple[Any, ...]) -> None:
    with acting_before(k, lambda: os._exit(_KILLED), under):
        function(*args)
