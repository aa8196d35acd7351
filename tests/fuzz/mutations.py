"""What a fuzz target does to good files, and what it demands of the reader.

The property of every target: a mutated file is read, or refused with a ValueError or OSError (ConfigError is one)
whose message names a file that was touched and says what to do. Nothing else is raised, nothing takes more than
SECONDS, and no more than MEMORY is asked of the system beyond what the process had.
"""

import contextlib
import copy
import json
import math
import os
import resource
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

SECONDS, WAIT = 20, 600
"""Of computing, and in all: other processes may take most of the machine's time."""
MEMORY = 4 << 30
FEW = settings() if os.environ.get("HYPOTHESIS_PROFILE") == "long" else settings(max_examples=25)
"""In the ordinary tests; `HYPOTHESIS_PROFILE=long` and scripts/reliability/fuzz.py draw more."""
FEWER = settings(FEW, max_examples=8) if FEW.max_examples == 25 else FEW
"""Where an input takes a tenth of a second."""

REMEDIES = (
    "--help", "add it", "again", "allowed", "check", "choose", "convert", "correct", "damaged", "did you mean", "give",
    "it has", "known:", "leave", "list the", "load the checkpoint", "look", "make one", "mend", "must", "needs",
    "no such file", "not valid YAML", "remove", "rename", "required", "restore", "verify", "write", "unknown key",
)  # fmt: skip
"""A refusal holds one of these, in some case."""


@dataclass(frozen=True)
class Target:
    """A reader to fuzz.

    name: for scripts/reliability/fuzz.py; inputs: what mutations are drawn from; check: applies one to good files and
    reads them.
    """

    name: str
    inputs: st.SearchStrategy[Any]
    check: Callable[[Any], None]


class Hang(BaseException):
    """The reader took too long."""


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Bounds on time and address space within the block."""

    def expired(*_: object) -> None:
        raise Hang(f"more than {SECONDS} seconds of computing, or {WAIT} in all")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = [signal.signal(number, expired) for number in (signal.SIGALRM, signal.SIGPROF)]
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    signal.setitimer(signal.ITIMER_REAL, WAIT)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        for number, handler in zip((signal.SIGALRM, signal.SIGPROF), before, strict=True):
            signal.signal(number, handler)


def check_reader(read: Callable[[], Any], names: Sequence[str]) -> bool:
    """Hold `read` to the property; whether it accepted what it read. names: one must be in the message."""
    with limits():
        try:
            read()
            return True
        except (ValueError, OSError) as error:
            text = str(error)
            assert any(name in text for name in names), f"names none of {names}: {type(error).__name__}: {text}"
            assert any(word in text.lower() for word in map(str.lower, REMEDIES)), f"no remedy: {text}"
            assert len(text) < 20_000, "the message holds the file"
            return False


# Bytes


def byte_changes() -> st.SearchStrategy[list[tuple[str, float, int]]]:
    """Changes of a file's bytes, see `change_bytes`."""
    place = st.floats(0, 1, exclude_max=True)
    kind = st.sampled_from(["flip", "flip", "set", "cut", "insert", "zero", "repeat"])
    return st.lists(st.tuples(kind, place, st.integers(1, 255)), min_size=1, max_size=4)


def change_bytes(data: bytes, changes: Sequence[tuple[str, float, int]]) -> bytes:
    """`data` after changes (what, where as a share of the length, how)."""
    for kind, place, value in changes:
        at = int(place * len(data))
        match kind:
            case "flip":
                data = data[:at] + bytes([data[at] ^ value]) + data[at + 1 :] if data else data
            case "set":
                data = data[:at] + bytes([255 if value > 127 else value]) + data[at + 1 :]
            case "cut":
                data = data[:at]
            case "insert":
                data = data[:at] + bytes([value]) * (value % 9 + 1) + data[at:]
            case "zero":
                data = data[:at] + bytes(len(data[at : at + value])) + data[at + value :]
            case "repeat":
                data = data[:at] + data[at : at + value] * 2 + data[at + value :]
    return data


# JSON and YAML

TEXTS = st.sampled_from(
    [
        "",
        "x",
        "../x",
        "/etc/passwd",
        "a/../../x",
        "..",
        "\x00",
        "\u202eabc",
        "👩‍👩‍👧",
        "\ud800",
        "C:\\x",
        "NaN",
        "1" * 400,
    ]
)
NUMBERS = st.sampled_from(
    [0, -1, 1, 2**31, 2**63, -(2**63), 2**64, 10**400, 0.5, -0.0, math.nan, math.inf, -math.inf, 1e308]
)
NESTED = json.loads("[" * 200 + "]" * 200)


def values() -> st.SearchStrategy[Any]:
    """JSON values of wrong types and absurd sizes."""
    plain = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
    some = st.recursive(
        plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    )
    return st.one_of(plain, some, st.just(NESTED), st.just(["x"] * 5000))


def edits() -> st.SearchStrategy[list[tuple[list[int], str, Any]]]:
    """Edits of nested mappings and lists, see `edit`."""
    path = st.lists(st.integers(0, 30), min_size=0, max_size=4)
    return st.lists(st.tuples(path, st.sampled_from(["set", "set", "delete", "rename"]), values()), max_size=3)


def edit(document: Any, changes: Sequence[tuple[list[int], str, Any]]) -> Any:
    """A document after edits: a place (which child at each depth), what, and a value."""
    document = json.loads(json.dumps(document))
    for path, kind, value in changes:
        holder, key = None, None
        child = document
        for step in path:
            if not isinstance(child, dict | list) or not child:
                break
            holder = child
            key = list(child)[step % len(child)] if isinstance(child, dict) else step % len(child)
            child = child[key]
        if holder is None:
            document = copy.deepcopy(value) if not path else document
        elif kind == "delete":
            del holder[key]
        elif kind == "rename" and isinstance(holder, dict):
            holder[str(value)[:50]] = holder.pop(key)
        else:
            holder[key] = copy.deepcopy(value)
    return document


def as_json(document: Any) -> bytes:
    """JSON bytes; lone surrogates become escapes, NaN and infinity the words that Python reads."""
    return json.dumps(document).encode()
