"""The service around an engine: its thread and queue, its metrics, and whether it is ready."""

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
"""Requests that are kept in memory to compare a new model on."""


@dataclass
class Service:
    """What the endpoints call.

    now: seconds UTC; token: the bearer token that requests must send; None: they need none, and deleting and reloading
    are refused. titles: personalized titles of items; None: there are none.
    """

    engine: Engine
    limits: BatchLimits = field(default_factory=BatchLimits)
    token: str | None = None
    now: Callable[[], float] = clock.time
    draining: bool = False
    titles: ServedTitles | None = None

    def __post_init__(self) -> None:
        self.recent: deque[ScoreRequest] = deque(maxlen=RECENT)
        """Latest requests of scores, which a new model is compared on."""
        self.metrics = ServiceMetrics(lambda: self.engine, lambda: self.batches.waiting)
        self.batches: MicroBatcher[AnyRequest, Scores] = MicroBatcher(
            lambda requests: self.engine.score(requests), self.limits, self.metrics.observe_batch
        )

    @property
    def ready(self) -> bool:
        """True if requests are answered."""
        return not self.draining and self.batches.alive

    async def score(self, request: AnyRequest) -> tuple[Scores, list[float]]:
        """Result of a request, from its micro-batch, and the probabilities of its first label.

        Raises:
            ValueError: ids or times that are not known.
            QueueFull: too many requests wait.
            DeadlineMissed: no answer within the deadline.
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
        """Forget a user: events and state; returns the number of events.

        The user's events in the dataset are ignored from then on.
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
        """Answer what waits, and end the thread."""
        self.draining = True
        self.batches.close()
        self.engine.close()
