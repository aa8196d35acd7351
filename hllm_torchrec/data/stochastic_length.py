"""Stochastic Length: random subsampling of long histories in training (HSTU, section 3.2, Eq. 4).

From a history of n events, with N = maximum number of events in a forward pass, training reads

    all n events                           if n <= N^(alpha / 2), else with probability N^alpha / n^2
    a sorted subsample of N^(alpha / 2)    otherwise

so that attention over the longest histories costs O(N^alpha) instead of O(N^2) on average.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from hllm_torchrec.common.arrays import Ints

STREAM = 0x534C
"""Last element of the seed; makes these draws independent of others whose seed begins with (seed, epoch)."""


@dataclass(frozen=True)
class StochasticLength:
    """Selects the events of a history that training reads, seeded by (seed, epoch, user, offset of the piece).

    The selection is therefore the same at any world size and after resuming. alpha: above 1, at most 2 (2 never
    shortens); max_events: N, the maximum number of events in a pass; choice: "uniform", or "recent", where an event's
    weight falls linearly with its age, from 1 at the latest to nearly 0 at the oldest. (The paper's appendix also uses
    weights by age, but divides the age by the sum of all ages, which makes the weights of a long history nearly equal.)
    """

    alpha: float
    max_events: int
    choice: Literal["recent", "uniform"] = "recent"
    seed: int = 0

    @property
    def subsample_size(self) -> int:
        """Number of events of a subsample: N^(alpha / 2), rounded down."""
        # 1e-9: the result may be slightly below a power that is an integer in exact arithmetic.
        return max(1, int(self.max_events ** (self.alpha / 2) + 1e-9))

    def shortened_share(self, events: int) -> float:
        """Probability that a history of `events` events is subsampled."""
        if events <= self.subsample_size:
            return 0.0
        return max(0.0, 1 - self.max_events**self.alpha / events**2)

    def choose(self, times: Ints, *, epoch: int, user: int, offset: int) -> Ints:
        """Sorted indices [m] of the events at `times` [n] that are read.

        The first event is always read, so that every other event has an earlier one from which it is predicted.

        Args:
            times: ascending seconds.
            epoch, user: parts of the seed.
            offset: index of the first event in the user's complete sequence.
        """
        events = times.size
        share = self.shortened_share(events)
        if share == 0.0:
            return np.arange(events)
        rng = np.random.default_rng((self.seed, epoch, user, offset, STREAM))
        if rng.random() >= share:
            return np.arange(events)
        weights = None
        if self.choice == "recent":
            age = (times[-1] - times[1:]).astype(np.float64)
            weights = 1 - age / (times[-1] - times[0] + 1)
            weights /= weights.sum()
        others = rng.choice(events - 1, size=self.subsample_size - 1, replace=False, p=weights) + 1
        return np.concatenate([[0], np.sort(others)])
