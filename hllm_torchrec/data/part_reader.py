"""Reader of a part of merged sequences, group by group; merges several consecutive groups in one read-ahead."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from hllm_torchrec.data.events import Sequences
from hllm_torchrec.data.merged_sequences import MergedSequences

_EVENTS_AHEAD = 300_000
"""Maximum number of events of a block that is read ahead."""


@dataclass(frozen=True)
class _Block:
    """The columns `names` of the users with the indices `first` to `end` - 1 of a part."""

    names: tuple[str, ...]
    first: int
    end: int
    rows: Sequences


class PartReader:
    """Reads users of a part by their indices in `users`, the ascending ids of all users of the part.

    Each merge has a fixed cost per file, about that of a thousand events. So if a call continues where the last block
    ended, it reads up to four times as many users as that block has; other calls read only the requested users.
    """

    def __init__(self, merged: MergedSequences, part: str, since: int | None) -> None:
        self.users = merged.users(part, since)
        self._merged, self._part = merged, part
        self._block: _Block | None = None

    def read(self, first: int, rows: int, names: Collection[str]) -> Sequences:
        """The sequences of users `first` to `first` + `rows` - 1; columns not in `names` have their unknown value."""
        wanted, end = tuple(names), first + rows
        block = self._block  # read once and replaced as one object, because threads share a reader
        if block is None or block.names != wanted or not block.first <= first <= end <= block.end:
            if block is not None and block.names == wanted and block.end == first:
                end = max(end, self._end_ahead(first, 4 * (block.end - block.first)))
            found = self._merged.read(self.users[first:end], self._part, wanted)
            self._block = block = _Block(wanted, first, end, found)
        return block.rows.between(first - block.first, first - block.first + rows)

    def _end_ahead(self, first: int, most: int) -> int:
        """End index of the longest range from user `first` with at most `most` users and `_EVENTS_AHEAD` events."""
        ends = np.cumsum(self._merged.totals(self.users[first : first + most]))
        return first + int(np.searchsorted(ends, _EVENTS_AHEAD, side="right"))
