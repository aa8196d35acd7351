"""Runs merged into one: all of them (compaction), or the newest while there are many.

A lookup asks every run, so a store that is written every minute must not keep a run for each commit. After a commit
that leaves more than MAX_SEGMENTS of them, the newest are merged: at least so many that half are left, and on from
there
every run that has no more rows than the newer ones together. Rows so merged at least double, so a row is rewritten a
number of times that grows with the logarithm of the rows, not with the number of commits.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from hllm_torchrec.store.files import SegmentFacts
from hllm_torchrec.store.segment import SegmentWriter, contiguous_keys
from hllm_torchrec.store.snapshot import Snapshot

MAX_SEGMENTS = 64


def first_to_merge(sizes: Sequence[int]) -> int:
    """Which run is the first of those to merge, len(sizes) if none; sizes: rows of each run, oldest first."""
    if len(sizes) <= MAX_SEGMENTS:
        return len(sizes)
    first = MAX_SEGMENTS // 2
    newer = sum(sizes[first:])
    while first and sizes[first - 1] <= newer:
        first -= 1
        newer += sizes[first]
    return first


def merge_segments(snapshot: Snapshot, first: int, writer: SegmentWriter) -> SegmentFacts:
    """Write what the runs from `first` on come to: standing rows, and deletions that an older run still needs."""
    for number in range(first, len(snapshot.segments)):
        for keys, vectors, marks in snapshot.rows_of(number):
            writer.add(keys, vectors, marks)
    older = snapshot.oldest(first)
    for number in range(first, len(snapshot.segments)) if first else ():
        for keys in snapshot.deletions_of(number):
            needed = np.flatnonzero(older.locate(keys)[0] >= 0)
            if needed.size:
                writer.delete(contiguous_keys(keys.take(pa.array(needed))))
    return writer.finish()
