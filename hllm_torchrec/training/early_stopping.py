"""Early stopping by validation score."""

import math
from dataclasses import dataclass


@dataclass
class EarlyStopping:
    """Early stopping: training ends after `patience` consecutive evaluations without a better score (0: never).

    best: best validation score so far (larger is better); stale: number of evaluations since the best one.
    """

    patience: int
    best: float = -math.inf
    stale: int = 0

    def improves(self, score: float) -> bool:
        """Record the score of an evaluation; returns True if it is the best so far."""
        improved = score > self.best
        self.stale = 0 if improved else self.stale + 1
        self.best = max(self.best, score)
        return improved

    @property
    def is_over(self) -> bool:
        """True if training should end."""
        return 0 < self.patience <= self.stale
