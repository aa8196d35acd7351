"""Keys as 64-bit numbers that sort: int64 ids as they are, strings by a hash, told apart by the strings themselves.

The hash is computed by columns of eight bytes over all strings at once; it is part of the file format, and golden
values in the tests keep it.
"""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

KeyKind = Literal["string", "int64"]
Keys: TypeAlias = pa.Array | NDArray[np.int64] | Sequence[str] | Sequence[int]
Hashes = NDArray[np.uint64]

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MIXERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # splitmix64's
_LONG = 512
"""Strings are hashed this many bytes at a time, so that one long string does not widen the others' matrix."""


def as_keys(keys: Keys, kind: KeyKind) -> pa.Array:
    """An Arrow array of int64 or large strings.

    Raises:
        ValueError: another type, or a null.
    """
    wanted = pa.int64() if kind == "int64" else pa.large_string()
    try:
        array = keys if isinstance(keys, pa.Array) else pa.array(keys)
        if len(array) and pa.types.is_integer(array.type) != (kind == "int64"):
            raise ValueError(f"keys are {array.type}")
        array = array.cast(wanted)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, ValueError) as error:
        raise ValueError(f"keys: {error}: this store's keys are of type {kind}") from None
    if array.null_count:
        raise ValueError(f"keys: {array.null_count} of {len(array)} are null: every vector needs a key")
    return array


def hash_keys(keys: pa.Array) -> Hashes:
    """uint64 [n] of an array made by `as_keys`."""
    if pa.types.is_integer(keys.type):
        return keys.to_numpy(zero_copy_only=False).view(np.uint64)
    offsets = np.frombuffer(keys.buffers()[1], np.int64)[keys.offset : keys.offset + len(keys) + 1]
    data = keys.buffers()[2]
    return hash_bytes(np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8), offsets)


def hash_bytes(flat: NDArray[np.uint8], offsets: NDArray[np.int64]) -> Hashes:
    """uint64 [n] of the byte strings flat[offsets[i] : offsets[i + 1]]."""
    lengths = np.diff(offsets)
    hashes = lengths.astype(np.uint64)
    for begin in range(0, int(lengths.max(initial=0)), _LONG):
        rows = np.flatnonzero(lengths > begin)
        hashes[rows] = _fold(hashes[rows], flat, offsets[rows] + begin, np.minimum(lengths[rows] - begin, _LONG))
    return _mix(hashes)


def _fold(hashes: Hashes, flat: NDArray[np.uint8], starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> Hashes:
    """Take up to _LONG bytes of each string into its hash, eight at a time, the last word padded with zeros."""
    with np.errstate(over="ignore"):
        for at in range(0, int(lengths.max()), 8):
            word = np.zeros(starts.size, np.uint64)
            for byte in range(8):
                inside = lengths > at + byte
                value = flat[np.where(inside, starts + at + byte, 0)].astype(np.uint64)
                word |= np.where(inside, value, np.uint64(0)) << np.uint64(8 * byte)
            folded = _mix(hashes ^ (word * _MULTIPLIER))
            hashes = np.where(lengths > at, folded, hashes)
    return hashes


def _mix(x: Hashes) -> Hashes:
    """splitmix64's finaliser: every bit of x reaches every bit of the result."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * _MIXERS[0]
        x = (x ^ (x >> np.uint64(27))) * _MIXERS[1]
        return x ^ (x >> np.uint64(31))
