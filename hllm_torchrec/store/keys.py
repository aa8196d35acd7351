"""Conversion of keys to sortable 64-bit numbers: int64 keys unchanged, strings by a hash.

Lookups compare the strings of equal hashes. The hashes of an array's strings are computed together, eight bytes per
step. The hash function is part of the file format: tests compare it with golden values.
"""

import re
from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from torch import Tensor

from hllm_torchrec.common.hashing import mix_bits
from hllm_torchrec.common.yaml_files import abbreviate

KeyKind = Literal["string", "int64"]
Keys: TypeAlias = pa.Array | NDArray[np.int64] | Tensor | Sequence[str] | Sequence[int]
Hashes = NDArray[np.uint64]

NO_KEY = -(2**63)
"""Key of a forgotten id (its raw id is null) in a store of int64 keys; in a store of strings it is "". No vector of a
store has this key."""
_DECIMAL = "0|-?[1-9][0-9]{0,18}"
"""Pattern of an int64, which has at most 19 digits. It excludes "007" and "+7", which would get the same key as "7"."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_BYTE_MASKS = np.array([2 ** (8 * count) - 1 for count in range(9)], np.uint64)
"""Masks of the first 0 to 8 bytes of a little-endian word."""


def as_keys(keys: Keys, kind: KeyKind) -> pa.Array:
    """Convert keys to an Arrow array of int64 or large strings; an integer tensor may be on any device.

    Raises:
        ValueError: the keys have another type, or one of them is null.
    """
    wanted = pa.int64() if kind == "int64" else pa.large_string()
    if isinstance(keys, Tensor):
        keys = keys.detach().cpu().numpy()
    try:
        array = keys if isinstance(keys, pa.Array) else pa.array(keys)
        if len(array) and pa.types.is_integer(array.type) != (kind == "int64"):
            raise ValueError(f"keys are {array.type}")
        array = array.cast(wanted)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, ValueError, OverflowError) as error:
        raise ValueError(f"keys: {error}: this store's keys are of type {kind}") from None
    if array.null_count:
        raise ValueError(f"keys: {array.null_count} of {len(array)} are null: every vector needs a key")
    return array


def raw_keys(raw_ids: pa.Array | pa.ChunkedArray, kind: KeyKind) -> pa.Array:
    """Convert the raw ids of a dataset, which are texts, to keys of a store.

    Null, the raw id of a forgotten item or user, becomes NO_KEY or "".

    Raises:
        ValueError: `kind` is int64, and an id is not the usual decimal form of an int64 ("7", not "007").
    """
    texts = raw_ids.cast(pa.large_string())
    texts = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
    if kind == "string":
        return pc.fill_null(texts, "")
    plain = pc.match_substring_regex(texts, f"^({_DECIMAL})$")
    wrong = np.flatnonzero(~pc.fill_null(plain, True).to_numpy(zero_copy_only=False))
    try:
        if not wrong.size:
            return pc.fill_null(texts.cast(pa.int64()), NO_KEY)
    except pa.ArrowInvalid:  # beyond int64
        numbers = [int(text or 0) for text in texts.to_pylist()]
        wrong = np.flatnonzero([not NO_KEY < number < 2**63 for number in numbers])
    raise ValueError(
        f"keys int64: raw id {abbreviate(texts[int(wrong[0])].as_py())} is not an int64 in its usual decimal form "
        "(7, not 007): use keys of type string"
    )


def plain_numbers(raw_ids: Sequence[str]) -> list[int]:
    """Return, as numbers, those raw ids that are int64 keys in their usual decimal form."""
    numbers = [int(raw) for raw in raw_ids if re.fullmatch(_DECIMAL, raw)]
    return [number for number in numbers if NO_KEY < number < 2**63]


def is_key(keys: pa.Array) -> NDArray[np.bool_]:
    """Return a mask [n] of the keys made by `raw_keys`: False for forgotten ids."""
    other = pc.not_equal(keys, pa.scalar(NO_KEY if pa.types.is_integer(keys.type) else "", keys.type))
    found: NDArray[np.bool_] = other.to_numpy(zero_copy_only=False)
    return found


def hash_keys(keys: pa.Array) -> Hashes:
    """Hash an array of keys made by `as_keys`: uint64 [n]. The hash of an int64 is its bits."""
    if pa.types.is_integer(keys.type):
        return keys.to_numpy(zero_copy_only=False).view(np.uint64)
    offsets = np.frombuffer(keys.buffers()[1], np.int64)[keys.offset : keys.offset + len(keys) + 1]
    data = keys.buffers()[2]
    return hash_bytes(np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8), offsets)


def hash_bytes(flat: NDArray[np.uint8], offsets: NDArray[np.int64]) -> Hashes:
    """Hash the byte strings flat[offsets[i] : offsets[i + 1]]: uint64 [n]; the last word of each is zero-padded."""
    lengths = np.diff(offsets)
    # The length is mixed in, so that strings that differ only in zero padding have different hashes.
    hashes, at = lengths.astype(np.uint64), 0
    rows = np.flatnonzero(lengths)
    # Round i handles word i of all strings that are long enough; products wrap around on purpose.
    while rows.size:
        word = _words(flat, offsets[rows] + at, np.minimum(lengths[rows] - at, 8))
        with np.errstate(over="ignore"):
            hashes[rows] = mix_bits(hashes[rows] ^ (word * _MULTIPLIER))
        at += 8
        rows = rows[lengths[rows] > at]
    return mix_bits(hashes)


def hash_numbers(*columns: NDArray[np.int64]) -> Hashes:
    """Hash rows of numbers, given as columns [n]: uint64 [n]."""
    rows = np.ascontiguousarray(np.stack(columns, axis=1).astype(np.int64))
    return hash_bytes(rows.view(np.uint8).ravel(), 8 * len(columns) * np.arange(len(rows) + 1))


def _words(data: NDArray[np.uint8], starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> Hashes:
    """Read `lengths` [k] (1 to 8) bytes at each of `starts` [k] as little-endian, zero-padded uint64 [k]."""
    if data.size < 8:
        data = np.concatenate([data, np.zeros(8, np.uint8)])
    # View of the bytes as overlapping words, one starting at every byte: unaligned words can be read with one gather.
    words: Hashes = np.ndarray(data.size - 7, "<u8", data, strides=(1,))
    # The last complete word starts at `last`. A later start reads that word and shifts out the bytes before the start.
    last = data.size - 8
    late = np.maximum(starts - last, 0)
    return (words[starts - late] >> (8 * late).astype(np.uint64)) & _BYTE_MASKS[lengths]
