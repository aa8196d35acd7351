"""Hashes of files, texts, JSON values and rows of integers; the same in every process, unlike Python's `hash`."""

import hashlib
import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

_BLOCK = 1 << 20
_UInts = NDArray[np.uint64]


def hash_files(paths: Sequence[Path], description: str) -> dict[Path, str]:
    """SHA-256 of each file, hexadecimal; shows a progress bar after five seconds."""
    hashes = {}
    total = sum(path.stat().st_size for path in paths)
    with tqdm(total=total, unit="B", unit_scale=True, desc=description, delay=5) as bar:
        for path in paths:
            digest = hashlib.sha256()
            with path.open("rb") as stream:
                while block := stream.read(_BLOCK):
                    digest.update(block)
                    bar.update(len(block))
            hashes[path] = digest.hexdigest()
    return hashes


def hash_file(path: Path) -> str:
    """SHA-256 of the bytes of one file, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def crc32_file(path: Path) -> int:
    """CRC-32 of the bytes of one file."""
    checksum = 0
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum


def hash_texts(texts: Iterable[str]) -> str:
    """SHA-256 of texts in order, hexadecimal; each is length-prefixed, so that ("ab", "c") differs from ("a", "bc")."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode()
        digest.update(f"{len(data)}:".encode() + data)
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """SHA-256 of a JSON value, hexadecimal; independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_columns(*columns: np.ndarray) -> _UInts:
    """64-bit hash of each row of int64 columns [n]: uint64 [n] (splitmix64)."""
    state = np.zeros(len(columns[0]), dtype=np.uint64)
    for column in columns:
        # The added constant is splitmix64's increment (2^64 / golden ratio): an all-zero row does not hash to zero.
        state = mix_bits((state ^ column.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15))
    return state


def mix_bits(state: _UInts) -> _UInts:
    """splitmix64's finalizer on uint64 [n]: every input bit affects every output bit."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
