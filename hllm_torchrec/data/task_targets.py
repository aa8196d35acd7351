"""Labels, weights and sampling rates of a batch's exposures, by task.

Negatives (exposures whose first label is 0) may have been subsampled with rate r, before `prepare` (`sampling_rate`) or
when they are loaded (`data.negative_rate`). A model trained on the sample learns odds that are too large by a factor of
1 / r. For the first label, training therefore adds an offset to the logit, z_train = z - log r, so that z, which is
served, is calibrated on the complete traffic. For other labels that are defined on negatives, the negatives are
weighted by 1 / r, which makes the expected loss exact for any label. Labels that are defined only where the first label
is 1 do not depend on r.

Legend: X exposures, K tasks.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hllm_torchrec.common.arrays import Floats, Ints
from hllm_torchrec.common.hashing import hash_columns
from hllm_torchrec.data.event_schema import SAMPLING_RATE, WEIGHT, EventSchema
from hllm_torchrec.data.events import Events, Piece


def drawn_exposures(piece: Piece, rate: float, seeds: Iterable[int]) -> tuple[Ints, Floats]:
    """(indices [X] of the sampled exposures, float32 [X] sampling rate of the negatives at each).

    rate: probability with which a negative exposure is kept. The draw is a hash of (seeds, user, position), so it is
    the same on any rank and in any batch.
    """
    targets = piece.exposures
    rates = kept_shares(piece, targets, rate)
    if rate == 1.0:
        return targets, rates
    kept = is_kept(piece.labels[targets], np.full(targets.size, piece.user_id), targets + piece.offset, rate, seeds)
    return targets[kept], rates[kept]


def kept_shares(events: Events, rows: Ints, rate: float = 1.0) -> Floats:
    """float32 [X] sampling rate of the negatives at the exposures `rows` [X]: the source's rate times `rate`."""
    before = events.extra.get(SAMPLING_RATE)
    return np.full(rows.size, rate, np.float32) if before is None else (before[rows] * rate).astype(np.float32)


def is_kept(labels: Floats, users: Ints, positions: Ints, rate: float, seeds: Iterable[int]) -> NDArray[np.bool_]:
    """bool [X], True for all positive exposures, and for negative ones with probability `rate`."""
    keys = (np.full(labels.size, one) for one in np.array(list(seeds), np.int64))
    return (hash_columns(*keys, users, positions) / 2.0**64 < rate) | (labels > 0)


def exposure_weights(targets: Events) -> Floats:
    """float32 [X] declared weights; 1 without a declaration."""
    return targets.extra.get(WEIGHT, np.ones(len(targets), np.float32))


def traffic_weights(targets: Events, rates: Floats) -> Floats:
    """float32 [X] weights with which the sample represents the complete traffic: 1 / rate for negatives, else 1."""
    return np.where(targets.labels > 0, np.float32(1), 1 / rates).astype(np.float32)


def targets_of(
    targets: Events, tasks: Sequence[str], schema: EventSchema, rates: Floats, training: bool
) -> dict[str, NDArray[Any]]:
    """The fields `weights`, `task_labels`, `task_weights` and `logit_offset` of a batch.

    tasks: names of K labels; empty: no task fields. rates: [X] sampling rate of the negatives at each exposure.
    Outside of training there is no offset; negatives are weighted by 1 / rate, so that metrics estimate those of the
    complete traffic.
    """
    weights = exposure_weights(targets)
    thinned = schema.sampled or bool((rates != 1).any())
    if thinned and not training:
        weights = weights * traffic_weights(targets, rates)
    found: dict[str, NDArray[Any]] = {"weights": weights}
    if thinned and training:
        found["logit_offset"] = -np.log(rates)
    if not tasks:
        return found
    labels = np.stack([_label(targets, schema, name) for name in tasks], axis=1)
    columns = np.repeat(weights[:, None], len(tasks), axis=1)
    if thinned and training:
        corrected = [schema.labels[0].name != name and not _needs_first(schema, name) for name in tasks]
        columns[:, corrected] *= traffic_weights(targets, rates)[:, None]
    defined = ~np.isnan(labels)
    return found | {
        "task_labels": labels.astype(np.float32),
        "task_weights": np.where(defined, columns, 0).astype(np.float32),
    }


def _label(targets: Events, schema: EventSchema, name: str) -> Floats:
    """[X] values of a label; NaN where it is not defined, or if its column was not read."""
    if name == schema.labels[0].name:
        return targets.labels
    column = next(one for one in schema.extra if one.name == schema.label(name).column)
    return targets.column(column)


def _needs_first(schema: EventSchema, name: str) -> bool:
    """True if a label is defined only where the first label is 1."""
    given = schema.label(name).given
    return given is not None and (given == schema.labels[0].name or _needs_first(schema, given))
