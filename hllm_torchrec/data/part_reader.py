"""Reading a part of merged sequences group by group: groups that follow each other are merged together."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from hllm_torchrec.data.events import Sequences
from hllm_torchrec.data.merged_sequences import MergedSequences

_EVENTS_AHEAD = 300_000
"""Most events of users that are read before they are asked for."""


@dataclass(frozen=True)
class _Block:
    """The named columns of users number `first` to `end` - 1 of a part."""

    names: tuple[str, ...]
    first: int
    end: int
    rows: Sequences


class PartReader:
    """Reads users of a part by their numbers in `users`, the ascending ids of all of them.

    A merge costs as much for each file as for a thousand events, so whoever reads on is read ahead for, twice as far
    every time; whoever jumps reads no more than he asks for.
    """

    def __init__(self, merged: MergedSequences, part: str, since: int | None) -> None:
        self.users = merged.users(part, since)
        self._merged, self._part = merged, part
        self._block: _Block | None = None

    def read(self, first: int, rows: int, names: Collection[str]) -> Sequences:
        """The sequences of users number `first` to `first` + `rows` - 1; columns that are not named are unknown."""
        wanted, end = tuple(names), first + rows
        block = self._block  # taken and replaced as a whole: threads share a reader
        if block is None or block.names != wanted or not block.first <= first <= end <= block.end:
            if block is not None and block.names == wanted and block.end == first:
                end = max(end, self._end_ahead(first, 2 * (block.end - block.first)))
            found = self._merged.read(self.users[first:end], self._part, wanted)
            self._block = block = _Block(wanted, first, end, found)
        return block.rows.between(first - block.first, first - block.first + rows)

    def _end_ahead(self, first: int, most: int) -> int:
        """End of at most `most` users from number `first` on with at most `_EVENTS_AHEAD` events."""
        ends = np.cumsum(self._merged.totals(self.users[first : first + most]))
        return first + int(np.searchsorted(ends, _EVENTS_AHEAD, side="right"))
