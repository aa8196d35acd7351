"""Numeric features of a request, computed from events strictly before its second.

Each feature is scaled to be of order one, so that it can be the input of a linear layer without normalization. Features
use only the events of the piece that a forward pass reads; if a user has more than `data.max_history` events, earlier
events are not used.

A custom feature, `module:name` in the configuration, is a function that is called with the events of one user, sorted
by time, and returns [X] float32, one number per request. Its arguments:

    timestamps [n] int64 seconds; labels [n] float32, NaN without a label; targets [X] int64, indices of the requests'
    events; seen [X] int64, number of events, from the first, that each request may see: use no other events.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from hllm_torchrec.common.arrays import Floats, Ints
from hllm_torchrec.config.extensions import EXTENSION_FORM, is_extension, load_extension
from hllm_torchrec.data.visibility import visible_before

Numeric = Callable[[Ints, Floats, Ints, Ints], Floats]
"""(timestamps, labels, targets, seen) -> [X]."""

OF_EVENTS = frozenset({"history_length", "user_mean"})
"""Features that depend only on the visible events, not on the request's second, so a user's state can store them."""
SHRINKAGE = 5.0
"""Number of pseudo-exposures with label 0.5 in the running mean."""


def numeric_columns(names: Sequence[str], timestamps: Ints, labels: Floats, targets: Ints, delay: int = 0) -> Floats:
    """The features `names` [X, F] float32 of the exposures `targets` of one user's sorted events.

    timestamps: [n] seconds; labels: [n], NaN without a label; targets: [X] indices of events. Features depend only on
    events more than `delay` seconds earlier.
    """
    if not names:
        return np.empty((targets.size, 0), np.float32)
    seen = visible_before(timestamps, timestamps[targets] - delay)
    columns = [numeric_feature(name)(timestamps, labels, targets, seen) for name in names]
    return np.stack(columns, axis=1).astype(np.float32)


def _history_length(timestamps: Ints, labels: Floats, targets: Ints, seen: Ints) -> Floats:
    """log(1 + number of earlier events) / 4."""
    return (np.log1p(seen) / 4).astype(np.float32)


def _user_mean(timestamps: Ints, labels: Floats, targets: Ints, seen: Ints) -> Floats:
    """Share of positive labels among earlier exposures, shrunk towards 0.5 and scaled to [-1, 1].

    2 * (positives - exposures / 2) / (exposures + SHRINKAGE).
    """
    # Index `seen` of a running sum that starts with 0 is the sum over the first `seen` events.
    known = np.concatenate([[0], np.cumsum(~np.isnan(labels))])[seen]
    positive = np.concatenate([[0], np.cumsum(np.nan_to_num(labels))])[seen]
    return (2 * (positive - 0.5 * known) / (known + SHRINKAGE)).astype(np.float32)


def _log_gap(timestamps: Ints, labels: Floats, targets: Ints, seen: Ints) -> Floats:
    """log(1 + seconds since the last earlier event) / 8; 0 without an earlier event."""
    # Requests without an earlier event use index 0 only to have a valid index; `where` discards the value.
    last = timestamps[np.maximum(seen - 1, 0)]
    gap = np.where(seen > 0, timestamps[targets] - last, 0)
    return (np.log1p(gap) / 8).astype(np.float32)


NUMERIC_FEATURES: dict[str, Numeric] = {
    "history_length": _history_length,
    "user_mean": _user_mean,
    "log_gap": _log_gap,
}


@functools.cache
def numeric_feature(name: str) -> Numeric:
    """The feature function of a name in NUMERIC_FEATURES, or of a custom `module:name`.

    Raises:
        ValueError: the name is unknown, or the custom function cannot be loaded.
    """
    if name in NUMERIC_FEATURES:
        return NUMERIC_FEATURES[name]
    if not is_extension(name):
        known = sorted(NUMERIC_FEATURES)
        raise ValueError(f"data.numeric_features: {name!r}: unknown; there are {known}, or {EXTENSION_FORM}")
    found: Numeric = load_extension(name, "data.numeric_features")
    return found


def numeric_problems(names: Sequence[str]) -> list[str]:
    """The messages of `numeric_feature` for the invalid names."""
    problems = []
    for name in names:
        try:
            numeric_feature(name)
        except ValueError as error:
            problems.append(str(error))
    return problems
