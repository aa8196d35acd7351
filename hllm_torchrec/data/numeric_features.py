"""Numbers about a request that are known strictly before its second.

Each is scaled to be of order one, so that one linear layer without normalisation can read it. "Earlier" means
within the stretch of events that a pass reads: of users longer than `data.max_history` that is a part.

One of your own, `module:name` in the configuration, is called with the events of one user, sorted by time, and
returns [X] float32, a number for each request:

    timestamps [n] int64 seconds; labels [n] float32, NaN where there is none; targets [X] int64, which events are the
    requests; seen [X] int64, how many events, from the first, are of strictly earlier seconds: read only those.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from hllm_torchrec.common.arrays import Floats, Ints
from hllm_torchrec.config.extensions import EXTENSION_FORM, is_extension, load_extension
from hllm_torchrec.data.visibility import visible_before

Numeric = Callable[[Ints, Floats, Ints, Ints], Floats]
"""(timestamps, labels, targets, seen) -> [X]."""

SHRINKAGE = 5.0
"""Pseudo-exposures at 0.5 in the running mean."""


def numeric_columns(names: Sequence[str], timestamps: Ints, labels: Floats, targets: Ints) -> Floats:
    """[X, F] float32: the features `names` of the exposures `targets` of one user's sorted events.

    timestamps [n] seconds; labels [n], NaN where there is none; targets [X], indices of events. Only events
    of strictly earlier seconds count.
    """
    if not names:
        return np.empty((targets.size, 0), np.float32)
    seen = visible_before(timestamps, timestamps[targets])
    columns = [numeric_feature(name)(timestamps, labels, targets, seen) for name in names]
    return np.stack(columns, axis=1).astype(np.float32)


def _history_length(timestamps: Ints, labels: Floats, targets: Ints, seen: Ints) -> Floats:
    """log(1 + earlier events) / 4."""
    return (np.log1p(seen) / 4).astype(np.float32)


def _user_mean(timestamps: Ints, labels: Floats, targets: Ints, seen: Ints) -> Floats:
    """Share of positive labels among earlier exposures, shrunk towards 0.5 and centred there."""
    known = np.concatenate([[0], np.cumsum(~np.isnan(labels))])[seen]
    positive = np.concatenate([[0], np.cumsum(np.nan_to_num(labels))])[seen]
    return (2 * (positive - 0.5 * known) / (known + SHRINKAGE)).astype(np.float32)


def _log_gap(timestamps: Ints, labels: Floats, targets: Ints, seen: Ints) -> Floats:
    """log(1 + seconds since the last earlier event) / 8; 0 without one."""
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
    """The function of a name of NUMERIC_FEATURES, or of the user's own `module:name`.

    Raises:
        ValueError: there is none.
    """
    if name in NUMERIC_FEATURES:
        return NUMERIC_FEATURES[name]
    if not is_extension(name):
        known = sorted(NUMERIC_FEATURES)
        raise ValueError(f"data.numeric_features: {name!r}: unknown; there are {known}, or {EXTENSION_FORM}")
    found: Numeric = load_extension(name, "data.numeric_features")
    return found


def numeric_problems(names: Sequence[str]) -> list[str]:
    """What `numeric_feature` says of those names that are wrong."""
    problems = []
    for name in names:
        try:
            numeric_feature(name)
        except ValueError as error:
            problems.append(str(error))
    return problems
