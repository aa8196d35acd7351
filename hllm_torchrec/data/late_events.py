"""Events that a later version of a dataset has before a second and an earlier one has not: they came late."""

import numpy as np

from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.jagged_arrays import concat_ranges
from hllm_torchrec.data.manifest import chain_base


def late_events(dataset: Dataset, path: str, version: int, since: int) -> tuple[Ints, Ints]:
    """Users [n], ascending, and places [n] in their sequences, of events before `since` that came after `version`.

    path: of the dataset, or its URL. Only users who have gained events before that second are read.

    Raises:
        ValueError: the dataset has no such version (any more).
    """
    old = Dataset.open(path, version)
    if chain_base(old.manifest) is None:  # of an earlier release: its first append wrote the same events once more
        old = Dataset.open(path, version + 1)
    now, before = (one.merged.before(since).astype(np.int64) for one in (dataset, old))
    users = np.flatnonzero(now > np.pad(before, (0, now.size - before.size)))
    keys, place = _keys(dataset, users, now)
    known, _ = _keys(old, users[users < before.size], before)
    late = ~np.isin(keys, known)
    return np.repeat(users, now[users])[late], place[late]


def _keys(dataset: Dataset, users: Ints, counts: Ints) -> tuple[np.ndarray, Ints]:
    """The first `counts` [U] events of `users` [R] as records that compare as wholes [n], and their places [n]."""
    events, totals = dataset.merged.events_of(users)
    lengths = counts[users].astype(np.int64)
    events = events[concat_ranges(np.cumsum(totals) - totals, lengths)]
    columns = np.stack([np.repeat(users, lengths), events.timestamps, events.item_ids])
    order = np.lexsort(columns)
    first = np.flatnonzero((np.diff(columns[:, order], prepend=-1) != 0).any(axis=0))
    number = np.empty(order.size, np.int64)  # of an event among those of the same user, second and item
    number[order] = np.arange(order.size) - np.repeat(first, np.diff(first, append=order.size))
    records = np.ascontiguousarray(np.concatenate([columns, number[None]]).T).view([("", np.int64)] * 4)
    return records.ravel(), concat_ranges(np.zeros_like(lengths), lengths)
