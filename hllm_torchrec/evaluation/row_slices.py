"""Slices of the rows of predictions: by history length, by item and by time."""

import math

import numpy as np

Slices = tuple[list[str], np.ndarray]
"""Names of the slices by one column, and the index of each row's slice [n], -1 for none."""

_DAY = 86_400
DAY_SLICE = "day_"
"""Beginning of the names of slices by day."""
HISTORY_BUCKETS = {
    "0": (0.0, 0.0),
    "1-9": (1.0, 9.0),
    "10-49": (10.0, 49.0),
    "50-199": (50.0, 199.0),
    "200+": (200.0, math.inf),
}
"""Slices by history length: name → inclusive bounds."""

ITEM_BUCKETS = {"0": 0, "1-5": 1, "6-20": 6, "21+": 21}
"""Slices by an item's number of training events: name → lowest number."""
HISTORY_SLICES = tuple(f"history_{name}" for name in HISTORY_BUCKETS)
ITEM_SLICES = tuple(f"item_events_{name}" for name in ITEM_BUCKETS)
"""Names of slices, in their order."""


def cold_slices(is_cold: np.ndarray) -> Slices:
    """Slices of cold and warm items; is_cold: bool [n]."""
    return ["item_cold", "item_warm"], np.where(is_cold, 0, 1)


def history_slices(lengths: np.ndarray) -> Slices:
    """Slices by `HISTORY_BUCKETS` of history lengths [n]."""
    lows = [low for low, _ in HISTORY_BUCKETS.values()]
    return [*HISTORY_SLICES], np.searchsorted(lows, lengths, side="right") - 1


def item_slices(events: np.ndarray) -> Slices:
    """Slices by `ITEM_BUCKETS` of the items' numbers of training events [n]."""
    return [*ITEM_SLICES], np.searchsorted(list(ITEM_BUCKETS.values()), events, side="right") - 1


def time_slices(seconds: np.ndarray) -> list[Slices]:
    """Slices by day (UTC) and by hour of the day of int64 seconds [n]."""
    days, hours = seconds // _DAY, seconds % _DAY // 3600
    # Only the days that occur in the batch get a slice.
    unique, of_row = np.unique(days, return_inverse=True)
    by_day = [f"{DAY_SLICE}{np.datetime64(int(day), 'D')}" for day in unique], of_row
    unique, of_row = np.unique(hours, return_inverse=True)
    return [by_day, ([f"hour_{hour:02d}" for hour in unique], of_row)]
