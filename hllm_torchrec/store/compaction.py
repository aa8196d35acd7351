"""Runs merged into one: all of them (compaction), or the newest while there are many.

A lookup asks every run, so a store that is written every minute must not keep a run for each commit. After a commit
that leaves more than MAX_RUNS of them, the newest are merged: at least so many that half are left, and on from there
every run that has no more rows than the newer ones together. Rows so merged at least double, so a row is rewritten a
number of times that grows with the logarithm of the rows, not with the number of commits.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from hllm_torchrec.store.layout import RunFacts
from hllm_torchrec.store.run import RunWriter, plain
from hllm_torchrec.store.snapshot import Snapshot

MAX_RUNS = 64


def first_to_merge(sizes: Sequence[int]) -> int:
    """Which run is the first of those to merge, len(sizes) if none; sizes: rows of each run, oldest first."""
    if len(sizes) <= MAX_RUNS:
        return len(sizes)
    first = MAX_RUNS // 2
    newer = sum(sizes[first:])
    while first and sizes[first - 1] <= newer:
        first -= 1
        newer += sizes[first]
    return first


def merge_runs(snapshot: Snapshot, first: int, run: RunWriter) -> RunFacts:
    """Write what the runs from `first` on come to: standing rows, and deletions that an older run still needs."""
    for number in range(first, len(snapshot.runs)):
        for keys, vectors, marks in snapshot.rows_of(number):
            run.add(keys, vectors, marks)
    older = snapshot.of_first(first)
    for number in range(first, len(snapshot.runs)) if first else ():
        for keys in snapshot.deletions_of(number):
            needed = np.flatnonzero(older.locate(keys)[0] >= 0)
            if needed.size:
                run.delete(plain(keys.take(pa.array(needed))))
    return run.finish()
