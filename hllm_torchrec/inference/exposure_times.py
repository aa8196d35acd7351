"""User vectors at a given second, for a log with users and times but without positions in a dataset's sequences.

    vectors = AsOfLookup("stores/exposures/nearline", Dataset.open("data/shop"))
    dense = append_vectors(dense, vectors(raw_user_ids, seconds))

The vector of a request is that of the user's latest exposure at or before its second. The vector of an exposure uses
only events of earlier seconds (nearline) or earlier days (daily), so it uses no event at or after the request. If the
log is the dataset's source, a request is itself an exposure and gets the vector of this exposure.

Legend: n requests, X exposures of the dataset, D width of a vector.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.split import SPLITS
from hllm_torchrec.inference.exposure_store import ExposureLookup
from hllm_torchrec.inference.raw_ids import RawIds

_SECONDS = 1 << 34
"""Range of the exposures' seconds (544 years); user and second are packed into one 64-bit integer."""


class AsOfLookup:
    """Reads the vectors of a store of exposures by raw user id and second; needs 40 bytes of memory per exposure.

    Args:
        path: store of `hllm exposures`.
        dataset: the dataset from which the store was made, or a later version of it.

    Raises:
        ValueError: see `ExposureLookup`; or the seconds of the exposures are more than 544 years apart.
    """

    def __init__(self, path: str | Path, dataset: Dataset) -> None:
        self._lookup = ExposureLookup(path)
        self.width = self._lookup.width
        self._users = RawIds(dataset.users["raw_user_id"])
        user_ids, positions, item_ids, seconds = _exposures(dataset)
        self._first = int(seconds.min()) if seconds.size else 0
        if seconds.size and int(seconds.max()) - self._first >= _SECONDS:
            raise ValueError(f"{dataset.root}: its exposures are more than {_SECONDS:,} seconds apart")
        order = np.lexsort((positions, user_ids))  # a user's seconds ascend with the positions
        self._columns = [column[order] for column in (user_ids, positions, item_ids, seconds)]
        self._moments = self._columns[0] * _SECONDS + self._columns[3] - self._first

    def __call__(self, raw_user_ids: Sequence[str], seconds: Ints) -> Tensor:
        """Requests [n] -> float32 [n, D + 1]: vectors (zeros if missing); the last column is 1 if missing, else 0.

        A vector is missing for an unknown user, for a request before the user's first exposure, and if the latest
        exposure has no vector in the store.

        Raises:
            ValueError: the store was made from other sequences (see `ExposureLookup`).
        """
        users, times = self._users.find(raw_user_ids), np.asarray(seconds, np.int64) - self._first
        wanted = users * _SECONDS + np.clip(times, 0, _SECONDS - 1)
        rows = np.searchsorted(self._moments, wanted, side="right") - 1
        known = (rows >= 0) & (users >= 0) & (times >= 0)
        known[known] = self._columns[0][rows[known]] == users[known]
        found = torch.zeros(users.size, self.width + 1)
        found[:, -1] = 1
        found[torch.from_numpy(known)] = self._lookup(*(column[rows[known]] for column in self._columns))
        return found


def _exposures(dataset: Dataset) -> tuple[Ints, Ints, Ints, Ints]:
    """(user ids, positions in the users' sequences, item ids, seconds) of all exposures, each int64 [X]."""
    found: list[tuple[Ints, ...]] = [(np.empty(0, np.int64),) * 4]
    for part in SPLITS:
        for group in dataset.row_groups(part):
            rows = dataset.sequences([group])
            row = np.repeat(np.arange(rows.user_ids.size), rows.lengths)
            positions = np.arange(row.size) - rows.offsets[row]
            kept = (positions >= rows.target_start[row]) & ~np.isnan(rows.labels)
            found.append((rows.user_ids[row][kept], positions[kept], rows.item_ids[kept], rows.timestamps[kept]))
    users, positions, items, seconds = (np.concatenate(columns) for columns in zip(*found, strict=True))
    return users, positions, items, seconds
