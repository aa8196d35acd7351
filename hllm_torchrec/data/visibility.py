"""The visibility rule: events of a request's own second are not its history. All other code uses these functions."""

from typing import overload

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
_SECOND_BITS = 33
"""Bits of a second: those of 2099 have 32."""


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


def visible_at_each_event(times: Ints, offsets: Ints, delay: int = 0) -> Ints:
    """[T] `visible_before` of (its second - delay) at every event among its own user's, for many users at once.

    times: [T] seconds UTC, sorted within a user; offsets: [R + 1] start of each user's events, then the end of the
    last; delay: seconds from an event until it may be seen.
    """
    row = np.repeat(np.arange(offsets.size - 1), np.diff(offsets))
    # Users one after the other are one ascending array if the row is the upper part of the key. No second is below 0,
    # so a limit below 0 finds what the limit 0 finds: nothing of this row.
    first_key = row << _SECOND_BITS
    limits = first_key | np.maximum(times - delay, 0)
    return np.searchsorted(first_key | times, limits, side="left") - offsets[row]
