"""Least-recently-used cache of user states, bounded by bytes."""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass
class CacheCounts:
    """Counts since the start. A hit found a state, also one that later events still had to extend."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0


class StateCache(Generic[T]):
    """Values with their sizes; the ones used longest ago leave when all together exceed `max_bytes`.

    It is not synchronized: one thread uses it.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.nbytes, self.counts = max_bytes, 0, CacheCounts()
        self._values: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable) -> T | None:
        """The value of a key, which becomes the latest used; None and a miss if there is none."""
        found = self._values.get(key)
        if found is None:
            self.counts.misses += 1
            return None
        self._values.move_to_end(key)
        self.counts.hits += 1
        return found[0]

    def put(self, key: Hashable, value: T, nbytes: int) -> None:
        """Keep a value of `nbytes` bytes; one larger than the whole cache is not kept."""
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
        """Forget a key, if it is there."""
        found = self._values.pop(key, None)
        if found is not None:
            self.nbytes -= found[1]

    def clear(self) -> None:
        """Forget all."""
        self._values.clear()
        self.nbytes = 0
