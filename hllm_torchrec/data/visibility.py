"""The visibility rule: a request sees only events of earlier seconds. All other code uses these functions."""

from typing import overload

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
_SECOND_BITS = 33
"""Number of bits for a second in a key; seconds until 2099 need 32."""


@overload
def visible_before(times: Ints, at: int) -> int: ...
@overload
def visible_before(times: Ints, at: Ints) -> Ints: ...
def visible_before(times: Ints, at: int | Ints) -> int | Ints:
    """Number of one user's events, from the first on, that a request may see: the events strictly before `at`.

    Args:
        times: [n] sorted seconds UTC of the events; or, for leave-one-out retrieval, their positions.
        at: second (or position) of one request, or of several requests [X].

    Returns:
        int, or int64 [X]. Events of the same second as the request do not count: the log does not record which came
        first, and usually they are rows of the same request.
    """
    found = np.searchsorted(times, at, side="left")
    return found if isinstance(at, np.ndarray) else int(found)


def visible_at_each_event(times: Ints, offsets: Ints, delay: int = 0) -> Ints:
    """[T] number of visible events, `visible_before(times of the user, second - delay)`, for each event of many users.

    times: [T] seconds UTC, sorted within a user; offsets: [R + 1] boundaries of the users' events; delay: seconds from
    an event until it may be seen.
    """
    row = np.repeat(np.arange(offsets.size - 1), np.diff(offsets))
    # With the row in the upper bits, the keys of all users are one ascending array. No second is below 0, so a limit
    # below 0 can be replaced by 0: both find no event of this row.
    first_key = row << _SECOND_BITS
    limits = first_key | np.maximum(times - delay, 0)
    return np.searchsorted(first_key | times, limits, side="left") - offsets[row]
