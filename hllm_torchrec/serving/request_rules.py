"""Rules that select the visible events of a request, and the batches that a scorer makes of histories and requests."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hllm_torchrec.common.arrays import Floats, Ints
from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.data.batch_spec import BatchSpec
from hllm_torchrec.data.collate import Collator
from hllm_torchrec.data.events import Events, Piece
from hllm_torchrec.data.numeric_features import OF_EVENTS, numeric_columns
from hllm_torchrec.data.pieces import window_start
from hllm_torchrec.data.visibility import visible_before
from hllm_torchrec.serving.user_state import UserHistory, UserState


class RequestRules:
    """Visibility of events to a request, as in the evaluation of the model's run.

    With visibility "second" a request sees the events of earlier seconds that are older than `data.feedback_delay`,
    with "position" (leave-one-out datasets) all events; it reads the latest of them, fewer than `data.max_history`.
    """

    def __init__(self, spec: BatchSpec, max_history: int) -> None:
        self.spec, self._max_history = spec, max_history

    def start(self, seen: int) -> int:
        """Index of the first event that a request reads if it may see `seen` events, as in evaluation."""
        if self.spec.visibility == "position":
            return max(0, seen - self._max_history + 1)
        return int(window_start(seen, self._max_history))

    def seen(self, history: UserHistory, time: int) -> int:
        """Number of events of a complete history that a request at `time` may see."""
        if self.spec.visibility == "position":
            return len(history)
        times, limit = history.timestamps, time - self.spec.feedback_delay
        return len(times) if not len(times) or times[-1] < limit else visible_before(times, limit)

    def visible(self, user: UserState, time: int) -> int:
        """Number of cached positions visible to a request at `time`; with interleaved actions an event has two."""
        if self.spec.visibility == "second":
            limit = time - self.spec.feedback_delay
            return visible_before(user.cache.times.cpu().numpy(), limit)
        last = int(user.history.timestamps[-1]) if len(user.history) else time
        if time < last:
            raise ValueError(
                f"user {user.history.user_id}: a request at {time}, before the last event at {last}: leave-one-out "
                "requests see all events; give the history up to the request"
            )
        return user.cache.length

    def numbers(self, user: UserState, time: int) -> Floats | None:
        """Numeric features [1, F] of a request, or None if the model has none."""
        names = self.spec.numeric_features
        if not names:
            return None
        # The request is added as an event without a label: its features are computed from the visible events before it.
        seen, labels = user.history.timestamps[user.start :], user.history.labels[user.start :]
        earlier = visible_before(seen, time - self.spec.feedback_delay)
        if earlier in user.numbers:
            return user.numbers[earlier]
        times, labels = np.append(seen[:earlier], time), np.append(labels[:earlier], np.nan)
        columns = numeric_columns(names, times, labels.astype(np.float32), np.array([earlier]))
        if OF_EVENTS.issuperset(names):
            user.numbers[earlier] = columns
        return columns


def history_batch(collator: Collator, spec: BatchSpec, events: UserHistory) -> HybridBatch:
    """Batch of a history, with one exposure after all events."""
    # The collator drops history after the last exposure, so an exposure after all events keeps the complete history.
    after = int(events.timestamps[-1]) + 1 + spec.feedback_delay if len(events) else 0
    exposure = Events.at([after], labels=[0])
    with_exposure = events.followed_by(UserHistory(events.user_id, **exposure.columns))
    return collator([with_exposure.as_piece(len(events))], 0, 0)


def candidates_batch(
    collator: Collator,
    user: UserState,
    candidates: Ints,
    time: int,
    context: Mapping[str, NDArray[Any]],
    numbers: Floats | None,
) -> HybridBatch:
    """Batch of the candidates without history; numbers: [1, F] numeric features of the user at `time`, or None."""
    extra = {name: np.repeat(value, candidates.size) for name, value in context.items()}
    labels = np.zeros(candidates.size)
    asked = Events.at(np.full(candidates.size, time), item_ids=candidates, labels=labels, extra=extra)
    batch = collator([Piece(**asked.columns, user_id=user.history.user_id, first_target=0)], 0, 0)
    if numbers is None:
        return batch
    assert batch.numeric is not None
    # All candidates have the same time, so the one row of numbers is broadcast to all of them.
    numeric = batch.numeric.clone()
    numeric[: batch.query_times.numel(), : numbers.shape[1]] = torch.from_numpy(numbers)
    return replace(batch, numeric=numeric)
