"""When a run has stopped getting better."""

import math
from dataclasses import dataclass


@dataclass
class EarlyStopping:
    """The best validation score so far (larger is better), and how many evaluations have come since without a better
    one; training ends after `patience` of them (0: never)."""

    patience: int
    best: float = -math.inf
    stale: int = 0

    def improves(self, score: float) -> bool:
        """Take in the score of an evaluation; whether it is the best so far."""
        improved = score > self.best
        self.stale = 0 if improved else self.stale + 1
        self.best = max(self.best, score)
        return improved

    @property
    def is_over(self) -> bool:
        """Whether training is to end."""
        return 0 < self.patience <= self.stale
