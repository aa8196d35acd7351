"""`IdMap`: maps raw ids to numbers without Python objects; takes about 40 bytes plus the text for each id.

An open-addressing hash table in numpy arrays: slots hold numbers, the texts are in one buffer, and ids with equal
hashes are compared byte by byte. All operations are vectorized. 10^8 ids of 10 bytes take 5 GB (8 GB at the peak, while
arrays grow); a dict of str takes 12 GB.

Legend: n ids of a call; k of them whose slot has not been found yet.
"""

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.data.event_partitions import hash_strings
from hllm_torchrec.data.jagged_arrays import concat_ranges

_FREE = -1
_FEWEST_SLOTS = 1024


class IdMap:
    """Map from ids to numbers; ids are numbered from 0 in the order in which they are added."""

    def __init__(self) -> None:
        self._slots = np.full(_FEWEST_SLOTS, _FREE, np.int32)
        self._hashes = np.zeros(0, np.uint64)
        self._ends = np.zeros(1, np.int64)
        self._bytes = np.zeros(0, np.uint8)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def find(self, raw_ids: pa.Array | pa.ChunkedArray) -> Ints:
        """The numbers (int64 [n]) of ids, -1 for those that are not in the map; no id may be null or empty."""
        distinct, index = _distinct(raw_ids)
        return self._find(distinct, hash_strings(distinct))[index]

    def add(self, raw_ids: pa.Array | pa.ChunkedArray) -> Ints:
        """The numbers (int64 [n]) of ids; those that are not in the map get the next numbers."""
        distinct, index = _distinct(raw_ids)  # in the order of their first appearance
        hashes = hash_strings(distinct)
        numbers = self._find(distinct, hashes)
        new = np.flatnonzero(numbers < 0)
        if new.size:
            numbers[new] = self._append(distinct.take(pa.array(new)), hashes[new])
        return numbers[index]

    def ids(self, first: int = 0, last: int | None = None) -> pa.Array:
        """The ids (large_string array) of the numbers first..last - 1; last None: to the end."""
        last = self._count if last is None else last
        ends = self._ends[first : last + 1] - self._ends[first]
        data = self._bytes[self._ends[first] : self._ends[last]]
        return pa.LargeStringArray.from_buffers(last - first, pa.py_buffer(ends.copy()), pa.py_buffer(data.copy()))

    def _find(self, distinct: pa.StringArray, hashes: NDArray[np.uint64]) -> Ints:
        """Numbers of distinct ids, -1 for unknown ones."""
        found = np.full(len(distinct), -1, np.int64)
        mask = np.uint64(self._slots.size - 1)
        searching, slot = np.arange(len(distinct)), hashes & mask
        while searching.size:
            number = self._slots[slot].astype(np.int64)
            taken = number != _FREE
            searching, slot, number = searching[taken], slot[taken], number[taken]
            same = self._hashes[number] == hashes[searching]
            same[same] = self._equal(number[same], distinct, searching[same])
            found[searching[same]] = number[same]
            searching, slot = searching[~same], (slot[~same] + np.uint64(1)) & mask
        return found

    def _equal(self, numbers: Ints, ids: pa.StringArray, rows: Ints) -> NDArray[np.bool_]:
        """Mask [k] of the ids at `rows` that equal the ids of `numbers`."""
        starts, lengths, data = _bytes_of(ids)
        own, other = self._ends[numbers + 1] - self._ends[numbers], lengths[rows]
        equal = own == other
        size, a, b = own[equal], self._ends[numbers[equal]], starts[rows[equal]]
        if size.size:
            same = self._bytes[concat_ranges(a, size)] == data[concat_ranges(b, size)]
            equal[equal] = np.logical_and.reduceat(same, np.cumsum(size) - size)
        return equal

    def _append(self, ids: pa.StringArray, hashes: NDArray[np.uint64]) -> Ints:
        """Add distinct ids that are not in the map; returns their numbers."""
        first, count = self._count, self._count + len(ids)
        starts, lengths, data = _bytes_of(ids)
        end = int(self._ends[first] + lengths.sum())
        self._hashes = grown(self._hashes, count)
        self._ends = grown(self._ends, count + 1)
        self._bytes = grown(self._bytes, end)
        self._hashes[first:count] = hashes
        self._ends[first + 1 : count + 1] = self._ends[first] + np.cumsum(lengths)
        self._bytes[self._ends[first] : end] = data[concat_ranges(starts, lengths)]
        self._count = count
        numbers = np.arange(first, count)
        if 3 * count > 2 * self._slots.size:
            size = self._slots.size
            while size < 2 * count:
                size *= 2
            self._slots = np.full(size, _FREE, np.int32)
            self._place(np.arange(count))
        else:
            self._place(numbers)
        return numbers

    def _place(self, numbers: Ints) -> None:
        """Store each number in the first free slot at or after the slot of its hash."""
        mask = np.uint64(self._slots.size - 1)
        slot = self._hashes[numbers] & mask
        while numbers.size:
            free = self._slots[slot] == _FREE
            # If several numbers are assigned to one free slot, the last one gets it; the others try the next slot.
            self._slots[slot[free]] = numbers[free]
            moved = self._slots[slot] != numbers
            numbers, slot = numbers[moved], (slot[moved] + np.uint64(1)) & mask


def _distinct(raw_ids: pa.Array | pa.ChunkedArray) -> tuple[pa.StringArray, Ints]:
    """The distinct ids in the order of their first appearance, and the index [n] of each id in them."""
    whole = raw_ids.combine_chunks() if isinstance(raw_ids, pa.ChunkedArray) else raw_ids
    encoded = whole.cast(pa.string()).dictionary_encode()
    return encoded.dictionary, encoded.indices.to_numpy().astype(np.int64)


def _bytes_of(ids: pa.StringArray) -> tuple[Ints, Ints, NDArray[np.uint8]]:
    """Start and length of each id in the bytes of an array."""
    offsets = np.frombuffer(ids.buffers()[1], np.int32)[ids.offset : ids.offset + len(ids) + 1].astype(np.int64)
    data = ids.buffers()[2]
    return offsets[:-1], np.diff(offsets), np.frombuffer(data, np.uint8) if data else np.zeros(0, np.uint8)


def grown(array: np.ndarray, size: int) -> np.ndarray:
    """The array if it has at least `size` entries, else a longer copy padded with zeros."""
    if size <= array.size:
        return array
    # Growth by a factor of 1.5, so that each entry is copied only a few times in total.
    longer = np.zeros(max(size, array.size + array.size // 2), array.dtype)
    longer[: array.size] = array
    return longer
