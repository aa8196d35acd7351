"""The rule that nothing of the same second is history, which everything else about visibility follows from."""

from typing import overload

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@overload
def visible_before(times: Ints, at: int) -> int: ...
@overload
def visible_before(times: Ints, at: Ints) -> Ints: ...
def visible_before(times: Ints, at: int | Ints) -> int | Ints:
    """How many of one user's events, from the first on, a request may see: those strictly earlier than itself.

    Args:
        times: [n] sorted seconds UTC of the events; or, for leave-one-out retrieval, their positions.
        at: second (or position) of a request, or those of several [X].

    Returns:
        The number for each of `at`. An event of the request's own second does not count: the log does not say which
        of the two came first, and mostly both are rows of one request.
    """
    found = np.searchsorted(times, at, side="left")
    return found if isinstance(at, np.ndarray) else int(found)


def visible_at_each_event(times: Ints, offsets: Ints) -> Ints:
    """[T] `visible_before` at every event, among the events of its own user, for many users at once.

    times: [T] seconds UTC, sorted within a user; offsets: [R + 1] where each user's events start, and the last end.
    """
    index, row = np.arange(times.size), np.repeat(np.arange(offsets.size - 1), np.diff(offsets))
    same = np.concatenate([[False], (np.diff(times) == 0) & (np.diff(row) == 0)])[: times.size]
    first_of_second = np.maximum.accumulate(np.where(same, 0, index))
    return first_of_second - offsets[row]
