"""`ItemStatistics`: number and sum of the values of an item's events before a given second, over all users.

Legend: T events with a value, of all users and parts; N items; X queries, each an item and a second.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hllm_torchrec.common.arrays import AnyFloats, Doubles, Ints
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.item_factors import event_values
from hllm_torchrec.data.split import SPLITS

_SECOND_BITS = 34
"""Bits of a second in a key: all seconds that a dataset may hold are below 2^33."""


@dataclass(frozen=True)
class ItemStatistics:
    """Running totals of every item; holds 16 bytes per event in memory.

    keys: int64 [T], item and second of each event packed into one integer, ascending; totals: float64 [T + 1],
    totals[k] is the sum of the first k values in this order.
    """

    keys: Ints
    totals: Doubles

    @classmethod
    def of_dataset(cls, dataset: Dataset) -> "ItemStatistics":
        """The statistics of all events of all parts; `before` uses only events of earlier seconds."""
        keys: list[Ints] = [np.empty(0, np.int64)]
        values: list[AnyFloats] = [np.empty(0)]
        for part in SPLITS:
            for group in dataset.row_groups(part):
                rows = dataset.sequences([group])
                value = event_values(rows.labels, rows.actions, dataset.action_values)
                # A row also has the history before its part; those events are counted with the part they belong to.
                counted = rows.own_events[~np.isnan(value[rows.own_events])]
                keys.append(_key(rows.item_ids[counted], rows.timestamps[counted]))
                values.append(value[counted])
        every, value = np.concatenate(keys), np.concatenate(values)
        order = np.argsort(every, kind="stable")
        return cls(every[order], np.concatenate([[0.0], np.cumsum(value[order])]))

    @property
    def items(self) -> int:
        """Largest id of an item with an event, plus 1; 0 without events."""
        return self._bounds[0].size - 1

    @cached_property
    def _bounds(self) -> tuple[Ints, Ints]:
        """(index of the first event [M + 1], key of the last event [M + 1], -1: none) of each item.

        M: items up to the last one with an event; entry M stands for all items after it, which have no events.
        """
        items = np.arange(int(self.keys[-1] >> _SECOND_BITS) + 2 if self.keys.size else 1)
        starts = np.searchsorted(self.keys, _key(items, np.zeros_like(items)))
        ends = np.append(starts[1:], starts[-1])
        latest = np.full(items.size, -1)
        latest[ends > starts] = self.keys[ends[ends > starts] - 1]
        return starts, latest

    @cached_property
    def newest(self) -> int:
        """Latest second of an event; -1 without events."""
        return int((self.keys & ((1 << _SECOND_BITS) - 1)).max(initial=-1))

    @cached_property
    def _whole(self) -> tuple[Ints, AnyFloats]:
        """(count [M + 1], sum of values [M + 1]) of all events of each item; see `_bounds`."""
        starts, _ = self._bounds
        ends = np.append(starts[1:], starts[-1])
        return ends - starts, self.totals[ends] - self.totals[starts]

    def before(self, items: Ints, seconds: Ints) -> tuple[Ints, AnyFloats]:
        """(count [X], sum of values [X]) of the events of each of `items` [X] strictly before each of `seconds` [X]."""
        starts, latest = self._bounds
        item = np.minimum(items, starts.size - 1)
        if seconds.size and seconds.min() > self.newest:  # as almost always in serving
            counts, sums = self._whole
            return counts[item], sums[item]
        key = _key(items, np.maximum(seconds, 0))
        first, end = starts[item], starts[np.minimum(item + 1, starts.size - 1)]
        # Many exposures are later than all events of their items; only the others need a search.
        searched = np.flatnonzero(latest[item] >= key)
        if searched.size:
            end[searched] = np.searchsorted(self.keys, key[searched])
        return end - first, self.totals[end] - self.totals[first]


def _key(items: Ints, seconds: Ints) -> Ints:
    return (items << _SECOND_BITS) + seconds
