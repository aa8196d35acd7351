"""Scoring engine of the service, without HTTP: histories, cached states and scores of many users.

    engine = Engine(BatchScorer.of_run(run), EventLog(run / "serving" / "events.sqlite"), cache_bytes=1 << 30)
    engine.score([ScoreRequest("u7", ["s3", "s41"], time), ...])     # one micro-batch
    engine.append("u7", [LoggedEvent("s3", time, 1.0, "5")])         # visible to later requests (`RequestRules`)

A user's state in the cache holds the events that were visible to the user's request with the latest time. A later
request extends the state by the events that have become visible since. A request with an earlier time is computed
without the cache, from the events that were visible at that time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.common.hashing import hash_json
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.event_log import EventLog, LoggedEvent
from hllm_torchrec.data.events import EVENT_COLUMNS
from hllm_torchrec.data.tombstones import USERS
from hllm_torchrec.serving.batch_scorer import BatchScorer, Request, concatenated, split
from hllm_torchrec.serving.raw_context import ContextValue
from hllm_torchrec.serving.raw_histories import check_found
from hllm_torchrec.serving.recommend import item_reader
from hllm_torchrec.serving.retrieval import IndexKind, Retrieval
from hllm_torchrec.serving.service_histories import KnownHistory, ServiceHistories
from hllm_torchrec.serving.state_cache import StateCache
from hllm_torchrec.serving.user_state import UserHistory, UserState

Features = Mapping[str, Sequence[str | Sequence[str]]]
"""Item feature -> the value or values of each item."""


@dataclass(frozen=True)
class RawEvents:
    """Events in a request, columns [n]: raw item ids, seconds UTC, labels (NaN: none), action names (None: unknown)."""

    items: Sequence[str]
    timestamps: Sequence[int]
    labels: Sequence[float]
    actions: Sequence[str | None]


@dataclass(frozen=True)
class ScoreRequest:
    """Request to score candidates for a user at one point in time.

    user: raw id; a user who is neither in the dataset nor in the log has the features of the unknown user and no
    history; None: no user. candidates: raw ids. time: seconds UTC. history: events, not stored, to use instead of the
    user's known history; None: the known history. context: see `Scorer.score`.
    """

    user: str | None
    candidates: Sequence[str]
    time: int
    history: RawEvents | None = None
    context: Mapping[str, ContextValue] | None = None


@dataclass(frozen=True)
class RecommendRequest:
    """Request for the best items of the catalogue for a user at one point in time.

    user, time, history, context: as in `ScoreRequest`. top: number of items to return. candidates: number of items that
    the index retrieves for the head to rank (`top` if that is more); without an index all allowed items are ranked.
    seen_too: whether items of the history may be recommended. filters: item feature -> values; an item must have at
    least one of the values of every feature.
    """

    user: str | None
    top: int
    time: int
    history: RawEvents | None = None
    candidates: int = 200
    seen_too: bool = False
    filters: Mapping[str, Sequence[str]] = field(default_factory=dict)
    context: Mapping[str, ContextValue] | None = None


AnyRequest = ScoreRequest | RecommendRequest


@dataclass(frozen=True)
class Scores:
    """Result of a request.

    logits: [m] float32, as from `Scorer.score`; descending for recommendations. tasks: task name -> predictions [m], as
    from `Scorer.score_tasks`. events: number of events that the request could see. model: see `Engine.mark`. items: raw
    id and text of each recommendation; empty for a `ScoreRequest`.
    """

    logits: NDArray[np.float32]
    tasks: Mapping[str, NDArray[np.float32]]
    events: int
    model: str
    items: Sequence[tuple[str, str]] = ()

    @property
    def probabilities(self) -> NDArray[np.float32]:
        """Predictions [m] of the first task, calibrated if the run is."""
        return next(iter(self.tasks.values()))


@dataclass(frozen=True)
class _Cached:
    """Cache entry of a user: all known events, and the state, which may hold fewer (the visible ones)."""

    known: KnownHistory
    state: UserState

    @property
    def nbytes(self) -> int:
        events = self.known.events
        columns = [getattr(events, column.name) for column in EVENT_COLUMNS] + list(events.extra.values())
        return self.state.nbytes + 2 * sum(column.nbytes for column in columns)


class Engine:
    """Histories, states and scores of one model.

    Only one thread may call `score` and `forget_state`; the other methods may be called by any thread.

    Args:
        scorer: scorer of the model, with the encoded catalogue.
        log: log of the events that the service accepts; None: the service accepts no events.
        cache_bytes: upper bound of the bytes of cached states and histories.
        index: kind of the item index, see `Retrieval`.
        index_folder: folder of a stored item index, see `Retrieval`.
    """

    def __init__(
        self,
        scorer: BatchScorer,
        log: EventLog | None = None,
        cache_bytes: int = 1 << 30,
        index: IndexKind = "flat",
        index_folder: Path | None = None,
    ) -> None:
        self.scorer, self.log = scorer, log
        # For a later dataset version with the same ids the scorer's mark is the same, but the histories differ. So the
        # engine's mark also includes the dataset version, and the calibration.
        calibration = None if scorer.calibration is None else scorer.calibration.to_json()
        self._mark = hash_json([scorer.mark, scorer.experiment.dataset.version, calibration])[:16]
        self.retrieval = Retrieval(scorer, index, index_folder)
        self.histories = ServiceHistories(scorer, log)
        self.states: StateCache[_Cached] = StateCache(cache_bytes)
        self._appended: set[str] = set()
        self._note = self._appended.add
        if log is not None:
            log.forget_those_of(scorer.experiment.dataset.tombstones)
            log.listeners.append(self._note)
        self._texts: tuple[Dataset, Callable[[int], tuple[str, str]]] | None = None

    @property
    def mark(self) -> str:
        """Hash of the scorer's mark, the calibration and the version of the dataset."""
        return self._mark

    def score(self, requests: Sequence[AnyRequest]) -> list[Scores | Exception]:
        """Return the scores or the error of each request; an invalid request does not affect the others."""
        prepared: list[Request | Exception] = []
        for request in requests:
            try:
                state = self._state(request)
                context = self.scorer.context_columns(request.context)
                prepared.append(Request(state, self._items(request, state), request.time, context))
            except ValueError as error:
                prepared.append(error)
        logits = iter(self._logits([one for one in prepared if isinstance(one, Request)]))
        outputs = [next(logits) if isinstance(one, Request) else one for one in prepared]
        return self._results(requests, prepared, outputs)

    def _items(self, request: AnyRequest, state: UserState) -> Ints:
        """Dense ids of the candidates."""
        if isinstance(request, ScoreRequest):
            return self.scorer.item_ids(request.candidates)
        seen = np.empty(0, np.int64) if request.seen_too else state.history.item_ids
        allowed = self.retrieval.allowed(seen, request.filters)
        return self.retrieval.candidates(state, allowed, max(request.candidates, request.top))

    def _results(
        self,
        requests: Sequence[AnyRequest],
        prepared: Sequence[Request | Exception],
        outputs: Sequence[NDArray[np.float32] | Exception],
    ) -> list[Scores | Exception]:
        """Results from the outputs or error of each request; the tasks' predictions are computed in one call."""
        items, outputs = [np.empty(0, np.int64)] * len(requests), list(outputs)
        for index, (request, one, output) in enumerate(zip(requests, prepared, outputs, strict=True)):
            if isinstance(request, RecommendRequest) and isinstance(one, Request) and isinstance(output, np.ndarray):
                best = np.argsort(-(output if output.ndim == 1 else output[:, 0]), kind="stable")[: request.top]
                items[index], outputs[index] = one.items[best], output[best]
        arrays = [output for output in outputs if isinstance(output, np.ndarray)]
        if not arrays:
            return list(outputs)  # type: ignore[arg-type]  # only errors
        tasks = self.scorer.predictions(concatenated(arrays))
        sizes = [len(output) for output in arrays]
        parts = iter(zip(*(split(values, sizes) for values in tasks.values()), strict=True))
        results: list[Scores | Exception] = []
        for index, output in enumerate(outputs):
            one = prepared[index]
            if isinstance(output, Exception) or isinstance(one, Exception):
                results.append(output if isinstance(output, Exception) else one)  # type: ignore[arg-type]
                continue
            logits, by_task = output if output.ndim == 1 else output[:, 0], dict(zip(tasks, next(parts), strict=True))
            results.append(Scores(logits, by_task, len(one.state.history), self.mark, self.item_texts(items[index])))
        return results

    def add_items(self, raw_ids: Sequence[str], texts: Mapping[str, Sequence[str]], features: Features) -> int:
        """See `Scorer.add_items`."""
        return self.scorer.add_items(raw_ids, texts, features)

    def item_texts(self, items: Ints) -> list[tuple[str, str]]:
        """Raw id and text of items [m] by their dense ids."""
        if not items.size:
            return []
        dataset = self.scorer.experiment.dataset
        if self._texts is None or self._texts[0] is not dataset:
            self._texts = dataset, item_reader(dataset, self.scorer.experiment.config)
        return [self._texts[1](item) for item in items.tolist()]

    def append(self, user: str, events: Sequence[LoggedEvent]) -> None:
        """Store events of a user; when this returns, they are on the disk, and later requests see them.

        Raises:
            ValueError: an item or action is not known.
        """
        assert self.log is not None, "a service without a log"
        self.scorer.item_ids([event.item for event in events], "events")
        known = self.histories.actions
        numbers = np.array([0 if event.action is None else known.get(event.action, -1) for event in events])
        names = [str(event.action) for event in events]
        check_found("actions of events", numbers, names, f"the dataset has {', '.join(known)}")
        if self.scorer.experiment.dataset.tombstones.find(USERS, user) is not None and not self.log.is_forgotten(user):
            # The dataset has forgotten this user, who has returned: only events from now on are kept.
            self.log.forget(user)
        self.log.append(user, events)

    def close(self) -> None:
        """Stop reading the log, and restore the scorer's weights; see `Scorer.close`."""
        if self.log is not None:
            self.log.listeners.remove(self._note)
        self.states.clear()
        self.scorer.close()

    def forget_state(self, user: str) -> None:
        """Remove a user's state and history from memory."""
        self.states.remove(user)
        self._appended.discard(user)

    def _logits(self, requests: Sequence[Request]) -> Sequence[NDArray[np.float32] | Exception]:
        try:
            return self.scorer.score_batch(requests)
        except ValueError:  # one by one, to find the requests that are invalid
            return [self._logits_of_one(request) for request in requests]

    def _logits_of_one(self, request: Request) -> NDArray[np.float32] | Exception:
        try:
            return self.scorer.score_batch([request])[0]
        except ValueError as error:
            return error

    def _state(self, request: AnyRequest) -> UserState:
        """The state of the events that a request may see."""
        if request.history is not None or request.user is None:
            history = self._given(request.user, request.history or RawEvents([], [], [], []))
            return self.scorer.read(self.scorer.seen_part(history, request.time))
        cached = self.states.get(request.user)
        if cached is None:
            known = self.histories.read(request.user)
            state = self.scorer.read(self.scorer.seen_part(known.events, request.time))
            return self._keep(request.user, known, state)
        if request.user in self._appended:
            cached = self._with_appended(cached, request.user, request.time)
        return self._at(request.user, cached, request.time)

    def _with_appended(self, cached: _Cached, user: str, time: int) -> _Cached:
        """A user's cache entry, extended by the new events of the log."""
        # Before the log is read, so that an event that is appended meanwhile marks the user again.
        self._appended.discard(user)
        try:
            known, state = self.histories.newer(cached.known, user), cached.state
            if not _continues(known.events, state.history):  # an event arrived late: encode the history again
                state = self.scorer.read(self.scorer.seen_part(known.events, time))
        except BaseException:  # the next request reads the events
            self._appended.add(user)
            raise
        return _Cached(known, self._keep(user, known, state))

    def _at(self, user: str, cached: _Cached, time: int) -> UserState:
        """The state at `time` of a user with a cache entry."""
        seen, held = self.scorer.seen_part(cached.known.events, time), len(cached.state.history)
        if len(seen) == held:
            return cached.state
        if len(seen) < held:
            return self.scorer.read(seen)  # the request has an earlier time than the latest one
        return self._keep(user, cached.known, self.scorer.extend(cached.state, seen.since(held)))

    def _keep(self, user: str, known: KnownHistory, state: UserState) -> UserState:
        cached = _Cached(known, state)
        self.states.put(user, cached, cached.nbytes)
        return state

    def _given(self, user: str | None, events: RawEvents) -> UserHistory:
        """The events of a request as a history."""
        given = self.scorer.history(None, events.items, events.timestamps, events.labels, events.actions)
        return UserHistory(self.histories.dense_user(user), **given.columns)


def _continues(events: UserHistory, held: UserHistory) -> bool:
    """True if `events` begin with the events `held` by a state: same user, and no late event was inserted."""
    first = events[: len(held)]
    if events.user_id != held.user_id:
        return False
    return np.array_equal(first.timestamps, held.timestamps) and np.array_equal(first.item_ids, held.item_ids)
