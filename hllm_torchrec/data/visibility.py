"""The visibility rule: events of a request's own second are not its history. All other code uses these functions."""

from typing import overload

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@overload
def visible_before(times: Ints, at: int) -> int: ...
@overload
def visible_before(times: Ints, at: Ints) -> Ints: ...
def visible_before(times: Ints, at: int | Ints) -> int | Ints:
    """Number of one user's events, from the first on, that a request may see: those strictly earlier than itself.

    Args:
        times: [n] sorted seconds UTC of the events; or, for leave-one-out retrieval, their positions.
        at: second (or position) of one request, or [X] of several.

    Returns:
        The number for each of `at`. An event of the request's own second does not count: the log does not record
        which of the two came first, and usually both are rows of one request.
    """
    found = np.searchsorted(times, at, side="left")
    return found if isinstance(at, np.ndarray) else int(found)


def visible_at_each_event(times: Ints, offsets: Ints) -> Ints:
    """[T] `visible_before` at every event among the events of its own user, for many users at once.

    times: [T] seconds UTC, sorted within a user; offsets: [R + 1] start of each user's events, then the end of the
    last.
    """
    index, row = np.arange(times.size), np.repeat(np.arange(offsets.size - 1), np.diff(offsets))
    same = np.concatenate([[False], (np.diff(times) == 0) & (np.diff(row) == 0)])[: times.size]
    # The running maximum carries the index of a second's first event to the other events of that second.
    first_of_second = np.maximum.accumulate(np.where(same, 0, index))
    return first_of_second - offsets[row]
