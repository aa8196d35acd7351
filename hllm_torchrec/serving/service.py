"""The service around an engine: its thread, its queue, and whether it is ready."""

import asyncio
import time as clock
from collections.abc import Callable
from dataclasses import dataclass, field

from hllm_torchrec.serving.engine import Engine, ScoreRequest, Scores
from hllm_torchrec.serving.micro_batches import BatchLimits, DeadlineMissed, MicroBatcher


@dataclass
class Service:
    """What the endpoints call.

    now: seconds UTC; token: the bearer token that requests need, None: none (and then nothing that deletes).
    """

    engine: Engine
    limits: BatchLimits = field(default_factory=BatchLimits)
    token: str | None = None
    now: Callable[[], float] = clock.time
    draining: bool = False

    def __post_init__(self) -> None:
        self.batches: MicroBatcher[ScoreRequest, Scores] = MicroBatcher(self.engine.score, self.limits)

    @property
    def ready(self) -> bool:
        """True if requests are answered."""
        return not self.draining and self.batches.alive

    async def score(self, request: ScoreRequest) -> Scores:
        """Scores of a request, from its micro-batch.

        Raises:
            ValueError: ids or times that are not known.
            QueueFull: too many requests wait.
            DeadlineMissed: no answer within the deadline.
        """
        answer = asyncio.wrap_future(self.batches.submit(request))
        try:
            return await asyncio.wait_for(answer, self.limits.deadline)
        except TimeoutError:
            raise DeadlineMissed from None

    def close(self) -> None:
        """Answer what waits, and end the thread."""
        self.draining = True
        self.batches.close()
