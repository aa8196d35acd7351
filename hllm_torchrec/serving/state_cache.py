"""Least-recently-used cache of user states, bounded by bytes."""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass
class CacheCounts:
    """Counts since the start. A hit is a look-up that found a state, also if new events then had to be added to it."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0


class StateCache(Generic[T]):
    """Cache of values with their sizes: the least recently used ones are evicted if the total exceeds `max_bytes`.

    It is not synchronized: only one thread may use it.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.nbytes, self.counts = max_bytes, 0, CacheCounts()
        self._values: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable) -> T | None:
        """Return the value of a key, which becomes the most recently used, or None (counted as a miss)."""
        found = self._values.get(key)
        if found is None:
            self.counts.misses += 1
            return None
        self._values.move_to_end(key)
        self.counts.hits += 1
        return found[0]

    def put(self, key: Hashable, value: T, nbytes: int) -> None:
        """Store a value of `nbytes` bytes; a value larger than `max_bytes` is not stored."""
        self.remove(key)
        if nbytes > self.max_bytes:
            return
        self._values[key] = value, nbytes
        self.nbytes += nbytes
        while self.nbytes > self.max_bytes:
            _, (_, freed) = self._values.popitem(last=False)
            self.nbytes -= freed
            self.counts.evictions += 1

    def remove(self, key: Hashable) -> None:
        """Remove a key, if it exists."""
        found = self._values.pop(key, None)
        if found is not None:
            self.nbytes -= found[1]

    def clear(self) -> None:
        """Remove all values."""
        self._values.clear()
        self.nbytes = 0
