"""Late events: events before a given second that a later version of a dataset has and an earlier version lacks."""

import numpy as np

from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.jagged_arrays import concat_ranges
from hllm_torchrec.data.manifest import chain_base


def late_events(dataset: Dataset, path: str, version: int, since: int) -> tuple[Ints, Ints]:
    """(users [n], ascending, positions [n] in their sequences) of the events before `since` added after `version`.

    path: path or URL of the dataset. Only users with additional events before `since` are read.

    Raises:
        ValueError: the dataset does not have this version, or no longer has it.
    """
    old = Dataset.open(path, version)
    if chain_base(old.manifest) is None:
        # A dataset of an earlier release without event files: the next version has the same events in event files.
        old = Dataset.open(path, version + 1)
    now, before = (one.merged.before(since).astype(np.int64) for one in (dataset, old))
    users = np.flatnonzero(now > np.pad(before, (0, now.size - before.size)))
    keys, position = _keys(dataset, users, now)
    known, _ = _keys(old, users[users < before.size], before)
    late = ~np.isin(keys, known)
    return np.repeat(users, now[users])[late], position[late]


def _keys(dataset: Dataset, users: Ints, counts: Ints) -> tuple[np.ndarray, Ints]:
    """(records [n], positions [n]) of the first counts[user] events of each of `users` [R]; counts: by user id.

    A record is (user, second, item, number among equal events) and is compared as one value.
    """
    events, totals = dataset.merged.events_of(users)
    lengths = counts[users].astype(np.int64)
    events = events[concat_ranges(np.cumsum(totals) - totals, lengths)]
    columns = np.stack([np.repeat(users, lengths), events.timestamps, events.item_ids])
    order = np.lexsort(columns)
    first = np.flatnonzero((np.diff(columns[:, order], prepend=-1) != 0).any(axis=0))
    number = np.empty(order.size, np.int64)  # index of an event among those of the same user, second and item
    number[order] = np.arange(order.size) - np.repeat(first, np.diff(first, append=order.size))
    records = np.ascontiguousarray(np.concatenate([columns, number[None]]).T).view([("", np.int64)] * 4)
    return records.ravel(), concat_ranges(np.zeros_like(lengths), lengths)
