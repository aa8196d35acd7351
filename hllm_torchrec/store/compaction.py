"""Merging of segments: all of them (compaction), or the newest when there are many.

A lookup searches every segment, so a store that is written every minute must not keep one segment per commit. A commit
that leaves more than MAX_SEGMENTS segments merges the newest ones, about half of all. The oldest segment that is merged
is not larger than all newer segments together, and the segment before it is larger (`first_to_merge`). So except for
the first time that a row is merged, its segment at least doubles in size, and a row is rewritten O(log rows) times,
regardless of the number of commits and of their sizes.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from hllm_torchrec.store.files import SegmentFacts
from hllm_torchrec.store.segment import SegmentWriter, contiguous_keys
from hllm_torchrec.store.snapshot import Snapshot

MAX_SEGMENTS = 64


def first_to_merge(sizes: Sequence[int]) -> int:
    """Return the number of the first segment to merge, or len(sizes) if none is to be merged.

    sizes: rows (vectors and deletions) of each segment, oldest first.
    """
    if len(sizes) <= MAX_SEGMENTS:
        return len(sizes)
    half = MAX_SEGMENTS // 2
    newer = [sum(sizes[number + 1 :]) for number in range(len(sizes))]
    # Segments of the newer half that are not merged are larger than all newer ones together. So their sizes fall at
    # least like powers of two: there are only a few, and the next merge is not due soon.
    first = next((number for number in range(half, len(sizes)) if sizes[number] <= newer[number]), half)
    while first and sizes[first - 1] <= newer[first - 1]:
        first -= 1
    return first


def merge_segments(snapshot: Snapshot, first: int, writer: SegmentWriter) -> SegmentFacts:
    """Merge the segments from `first` on: write their live rows, and their deletions of keys of older segments."""
    for number in range(first, len(snapshot.segments)):
        for keys, vectors, marks in snapshot.rows_of(number):
            writer.add(keys, vectors, marks)
    # A deletion is still needed if an older segment, which is not merged, has the key; otherwise it can be dropped.
    older = snapshot.oldest(first)
    for number in range(first, len(snapshot.segments)) if first else ():
        for keys in snapshot.deletions_of(number):
            needed = np.flatnonzero(older.locate(keys)[0] >= 0)
            if needed.size:
                writer.delete(contiguous_keys(keys.take(pa.array(needed))))
    return writer.finish()
