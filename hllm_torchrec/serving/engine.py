"""Scores and states of many users: the part of the service without HTTP.

    engine = Engine(scorer, cache_bytes=1 << 30)
    engine.score([ScoreRequest("u7", ["s3", "s41"], time), ...])     # one micro-batch

The history of a user is that of the dataset, followed by the events that the service was given. A state in the cache
holds the events before the latest request's second; a later request extends it by those that came since, and one with
an earlier time than the state's is computed without the cache, so its scores are those of that time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hllm_torchrec.data.events import Events
from hllm_torchrec.data.visibility import visible_before
from hllm_torchrec.inference.raw_ids import RawIds
from hllm_torchrec.serving.scorer import Scorer
from hllm_torchrec.serving.state_cache import StateCache
from hllm_torchrec.serving.user_state import UserHistory, UserState


@dataclass(frozen=True)
class RawEvents:
    """Events as a request gives them: raw ids and names of actions (None: unknown), labels (NaN: none), [n] each."""

    items: Sequence[str]
    timestamps: Sequence[int]
    labels: Sequence[float]
    actions: Sequence[str | None]


@dataclass(frozen=True)
class ScoreRequest:
    """Candidates of one user at a second.

    user: raw id; a user whom neither the dataset nor an event names has the unknown user's features and no history.
    candidates: raw ids. time: seconds UTC. history: events of the request alone, which are scored instead of the
    user's and not kept; None: the user's.
    """

    user: str | None
    candidates: Sequence[str]
    time: int
    history: RawEvents | None = None


@dataclass(frozen=True)
class Scores:
    """logits: [m] float32, as by `Scorer.score`; events: number of events of the history that was read; model: mark of
    the weights and the dataset."""

    logits: NDArray[np.float32]
    events: int
    model: str


@dataclass(frozen=True)
class _Known:
    """A user in the cache: the state, and all events known so far, which may go beyond the state's."""

    history: UserHistory
    state: UserState


class Engine:
    """Histories, states and scores of one model. All methods are called by one thread.

    Args:
        scorer: its catalogue is encoded.
        cache_bytes: bytes of states and histories that are kept.
    """

    def __init__(self, scorer: Scorer, cache_bytes: int = 1 << 30) -> None:
        self.scorer = scorer
        self.states: StateCache[_Known] = StateCache(cache_bytes)
        self._users = RawIds(scorer.experiment.dataset.users["raw_user_id"], "user")

    @property
    def mark(self) -> str:
        """Mark of the weights and the dataset."""
        return self.scorer.mark

    def score(self, requests: Sequence[ScoreRequest]) -> list[Scores | Exception]:
        """Scores of each request, or the error that it has alone."""
        return [self._score(request) for request in requests]

    def _score(self, request: ScoreRequest) -> Scores | Exception:
        try:
            items = self.scorer.item_ids(request.candidates)
            state = self._state(request)
            return Scores(self.scorer.score(state, items, request.time), len(state.history), self.mark)
        except ValueError as error:
            return error

    def _state(self, request: ScoreRequest) -> UserState:
        """The state of the events before the request."""
        if request.history is not None or request.user is None:
            history = self._given(request.user, request.history or RawEvents([], [], [], []))
            return self.scorer.read(self._before(history, request.time))
        known = self.states.get(request.user)
        history = self._history(request.user) if known is None else known.history
        seen = self._before(history, request.time)
        if known is None:
            state = self.scorer.read(seen)
        elif len(seen) < len(known.state.history):
            return self.scorer.read(seen)  # a request of an earlier second than the last one
        elif len(seen) > len(known.state.history):
            state = self.scorer.extend(known.state, seen.since(len(known.state.history)))
        else:
            return known.state
        self.states.put(request.user, _Known(history, state), state.cache.nbytes + _nbytes(history))
        return state

    def _before(self, history: UserHistory, time: int) -> UserHistory:
        """The events that a request at `time` may have as its history."""
        if self.scorer.experiment.batch_spec.visibility != "second":
            return history
        count = visible_before(history.timestamps, time)
        return history if count == len(history) else UserHistory(history.user_id, **history[:count].columns)

    def _given(self, user: str | None, events: RawEvents) -> UserHistory:
        """The events of a request as a history."""
        found = self.scorer.history(None, events.items, events.timestamps, events.labels, events.actions)
        return UserHistory(self._dense_user(user), **found.columns)

    def _history(self, user: str) -> UserHistory:
        """All events of a user."""
        dense = self._dense_user(user)
        events = self.scorer.experiment.dataset.user_events(dense) if dense else Events.at([])
        return UserHistory(dense, **events.columns)

    def _dense_user(self, user: str | None) -> int:
        """Dense id of a raw one; 0 for a user whom the dataset does not have."""
        return 0 if user is None else max(0, int(self._users.find([user])[0]))


def _nbytes(history: UserHistory) -> int:
    return sum(column.nbytes for column in history.columns.values())
