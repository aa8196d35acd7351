"""`Service`: an engine with its queue, thread and metrics; the HTTP endpoints call it."""

import asyncio
import time as clock
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hllm_torchrec.serving.engine import AnyRequest, Engine, ScoreRequest, Scores
from hllm_torchrec.serving.micro_batches import BatchLimits, DeadlineMissed, MicroBatcher
from hllm_torchrec.serving.served_titles import ServedTitles
from hllm_torchrec.serving.service_metrics import ServiceMetrics

RECENT = 64
"""Number of recent requests that are kept in memory, so that a reload can compare both models on them."""


@dataclass
class Service:
    """Methods of the endpoints.

    now: returns the time in seconds UTC; token: the bearer token that requests must send; None: requests need no token,
    and deleting and reloading are refused. draining: True if the service shuts down. titles: personalized titles of
    items; None: there are none.
    """

    engine: Engine
    limits: BatchLimits = field(default_factory=BatchLimits)
    token: str | None = None
    now: Callable[[], float] = clock.time
    draining: bool = False
    titles: ServedTitles | None = None

    def __post_init__(self) -> None:
        self.recent: deque[ScoreRequest] = deque(maxlen=RECENT)
        """Latest score requests; a reload compares the scores of old and new model for them."""
        self.metrics = ServiceMetrics(lambda: self.engine, lambda: self.batches.waiting)
        self.batches: MicroBatcher[AnyRequest, Scores] = MicroBatcher(
            lambda requests: self.engine.score(requests), self.limits, self.metrics.observe_batch
        )

    @property
    def ready(self) -> bool:
        """True if requests are answered."""
        return not self.draining and self.batches.alive

    async def score(self, request: AnyRequest) -> tuple[Scores, list[float]]:
        """Compute a request in a micro-batch; return its scores and the probabilities of the first label.

        Raises:
            ValueError: an id is unknown, or a time or a context value is invalid.
            QueueFull: too many requests are waiting.
            DeadlineMissed: the request has no answer within the deadline.
        """
        answer = asyncio.wrap_future(self.batches.submit(request))
        try:
            found = await asyncio.wait_for(answer, self.limits.deadline)
        except TimeoutError:
            raise DeadlineMissed from None
        if isinstance(request, ScoreRequest):
            self.recent.append(request)
        probabilities = found.probabilities
        self.metrics.observe_scores(probabilities)
        return found, probabilities.tolist()

    def titles_of(self, user: str | None, items: Sequence[str]) -> list[str | None]:
        """Return the title of each item for a user; a user whom this service has forgotten counts as unknown."""
        assert self.titles is not None
        log = self.engine.log
        is_unknown = user is None or (log is not None and log.is_forgotten(user))
        return self.titles.of(None if is_unknown else user, items)

    async def forget(self, user: str) -> int:
        """Delete the events, state and recent requests of a user; return the number of deleted events.

        If the service has a log, the user's events in the dataset are ignored from then on.
        """
        log = self.engine.log
        deleted = 0 if log is None else await asyncio.to_thread(log.forget, user)
        await asyncio.wrap_future(self.batches.between_batches(lambda: self._forget(user)))
        return deleted

    def _forget(self, user: str) -> None:
        self.engine.forget_state(user)
        kept = [request for request in self.recent if request.user != user]
        self.recent.clear()
        self.recent.extend(kept)

    def close(self) -> None:
        """Answer the waiting requests, end the thread, and close the engine."""
        self.draining = True
        self.batches.close()
        self.engine.close()
