"""Scores and states of many users: the part of the service without HTTP.

    engine = Engine(BatchScorer.of_run(run), EventLog(run / "serving" / "events.sqlite"), cache_bytes=1 << 30)
    engine.score([ScoreRequest("u7", ["s3", "s41"], time), ...])     # one micro-batch
    engine.append("u7", [LoggedEvent("s3", time, 1.0, "5")])         # seen by requests of later seconds

A state in the cache holds the events that the latest request could see; a later request extends it by those that came
since, and one of an earlier time than the state's is computed without the cache, so its scores are those of that time.
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
"""Item feature -> values of each item."""


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
    user's and not kept; None: the user's. context: of the request, see `Scorer.score`.
    """

    user: str | None
    candidates: Sequence[str]
    time: int
    history: RawEvents | None = None
    context: Mapping[str, ContextValue] | None = None


@dataclass(frozen=True)
class RecommendRequest:
    """The best items of the catalogue for a user at a second.

    user, time, history, context: as in `ScoreRequest`. top: number of items. candidates: number of items that are
    retrieved and then ranked. seen_too: whether items of the history are recommended. filters: item feature -> values;
    an item has at least one of each.
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

    logits: [m] float32, as by `Scorer.score`; of recommendations, descending. tasks: what each task predicts [m], as by
    `Scorer.score_tasks`. events: number of events that the request could see. model: see `Engine.mark`. items: raw id
    and text of each recommendation.
    """

    logits: NDArray[np.float32]
    tasks: Mapping[str, NDArray[np.float32]]
    events: int
    model: str
    items: Sequence[tuple[str, str]] = ()

    @property
    def probabilities(self) -> NDArray[np.float32]:
        """Of the first label [m], calibrated if the run is."""
        return next(iter(self.tasks.values()))


@dataclass(frozen=True)
class _Cached:
    """A user in the cache: all events known so far, and the state, which may hold fewer."""

    known: KnownHistory
    state: UserState

    @property
    def nbytes(self) -> int:
        events = self.known.events
        columns = [getattr(events, column.name) for column in EVENT_COLUMNS] + list(events.extra.values())
        return self.state.cache.nbytes + 2 * sum(column.nbytes for column in columns)


class Engine:
    """Histories, states and scores of one model. `score` and `forget_state` are called by one thread, the rest by any.

    Args:
        scorer: its catalogue is encoded.
        log: of the events; None: the service takes none.
        cache_bytes: bytes of states and histories that are kept.
        index: of the items, see `Retrieval`.
        index_folder: where it is kept, see there.
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
        # The scorer's mark stays the same on a later dataset version with the same ids, but the histories that the
        # service reads do not; so the version (and the calibration) is part of the engine's mark.
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
        """Mark of the weights, their calibration and the version of the dataset."""
        return self._mark

    def score(self, requests: Sequence[AnyRequest]) -> list[Scores | Exception]:
        """Scores of each request, or its error; an invalid request does not affect the others."""
        asked: list[Request | Exception] = []
        for request in requests:
            try:
                state = self._state(request)
                context = self.scorer.context_columns(request.context)
                asked.append(Request(state, self._items(request, state), request.time, context))
            except ValueError as error:
                asked.append(error)
        outputs = iter(self._logits([one for one in asked if isinstance(one, Request)]))
        found = [next(outputs) if isinstance(one, Request) else one for one in asked]
        return self._results(requests, asked, found)

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
        asked: Sequence[Request | Exception],
        found: Sequence[NDArray[np.float32] | Exception],
    ) -> list[Scores | Exception]:
        """Results from the outputs of each request; what the tasks predict is computed for all of them at once."""
        items, outputs = [np.empty(0, np.int64)] * len(requests), list(found)
        for place, (request, one, own) in enumerate(zip(requests, asked, found, strict=True)):
            if isinstance(request, RecommendRequest) and isinstance(one, Request) and isinstance(own, np.ndarray):
                best = np.argsort(-(own if own.ndim == 1 else own[:, 0]), kind="stable")[: request.top]
                items[place], outputs[place] = one.items[best], own[best]
        arrays = [own for own in outputs if isinstance(own, np.ndarray)]
        if not arrays:
            return list(outputs)  # type: ignore[arg-type]  # errors alone
        tasks = self.scorer.predictions(concatenated(arrays))
        sizes = [len(own) for own in arrays]
        parts = iter(zip(*(split(values, sizes) for values in tasks.values()), strict=True))
        results: list[Scores | Exception] = []
        for place, own in enumerate(outputs):
            one = asked[place]
            if isinstance(own, Exception) or isinstance(one, Exception):
                results.append(own if isinstance(own, Exception) else one)  # type: ignore[arg-type]
                continue
            logits, by_task = own if own.ndim == 1 else own[:, 0], dict(zip(tasks, next(parts), strict=True))
            results.append(Scores(logits, by_task, len(one.state.history), self.mark, self.item_texts(items[place])))
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
        """Keep events of a user; when this returns, they are on the disk and seen by requests of later seconds.

        Raises:
            ValueError: items or actions that are not known.
        """
        assert self.log is not None, "a service without a log"
        self.scorer.item_ids([event.item for event in events], "events")
        known = self.histories.actions
        numbers = np.array([0 if event.action is None else known.get(event.action, -1) for event in events])
        names = [str(event.action) for event in events]
        check_found("actions of events", numbers, names, f"the dataset has {', '.join(known)}")
        if self.scorer.experiment.dataset.tombstones.find(USERS, user) is not None and not self.log.is_forgotten(user):
            self.log.forget(user)  # who came back after the dataset forgot them keeps what comes from now on
        self.log.append(user, events)

    def close(self) -> None:
        """Stop reading the log, and restore the scorer's weights; see `Scorer.close`."""
        if self.log is not None:
            self.log.listeners.remove(self._note)
        self.states.clear()
        self.scorer.close()

    def forget_state(self, user: str) -> None:
        """Forget a user's state and history in memory."""
        self.states.remove(user)
        self._appended.discard(user)

    def _logits(self, asked: Sequence[Request]) -> Sequence[NDArray[np.float32] | Exception]:
        try:
            return self.scorer.score_batch(asked)
        except ValueError:
            return [self._logits_of_one(request) for request in asked]

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
        """A user in the cache with what the log has gained."""
        self._appended.discard(user)  # before the log is read: what comes later is read by a later request
        try:
            known, state = self.histories.newer(cached.known, user), cached.state
            if not _continues(known.events, state.history):  # one came late
                state = self.scorer.read(self.scorer.seen_part(known.events, time))
        except BaseException:  # the next request reads them
            self._appended.add(user)
            raise
        return _Cached(known, self._keep(user, known, state))

    def _at(self, user: str, cached: _Cached, time: int) -> UserState:
        """The state at `time` of a user in the cache."""
        seen, held = self.scorer.seen_part(cached.known.events, time), len(cached.state.history)
        if len(seen) == held:
            return cached.state
        if len(seen) < held:
            return self.scorer.read(seen)  # a request of an earlier second than the last one
        return self._keep(user, cached.known, self.scorer.extend(cached.state, seen.since(held)))

    def _keep(self, user: str, known: KnownHistory, state: UserState) -> UserState:
        cached = _Cached(known, state)
        self.states.put(user, cached, cached.nbytes)
        return state

    def _given(self, user: str | None, events: RawEvents) -> UserHistory:
        """The events of a request as a history."""
        found = self.scorer.history(None, events.items, events.timestamps, events.labels, events.actions)
        return UserHistory(self.histories.dense_user(user), **found.columns)


def _continues(events: UserHistory, held: UserHistory) -> bool:
    """True if a state's events are the first ones of `events`: nothing came late, before one of them."""
    first = events[: len(held)]
    if events.user_id != held.user_id:
        return False
    return np.array_equal(first.timestamps, held.timestamps) and np.array_equal(first.item_ids, held.item_ids)
