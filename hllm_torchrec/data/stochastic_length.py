"""Stochastic Length: training reads a long history whole only now and then (HSTU, section 3.2, Eq. 4).

Of n events, where a pass may hold N, a history keeps

    all                                  if n <= N^(alpha / 2), or else with probability N^alpha / n^2
    a subsample of N^(alpha / 2), sorted  otherwise

so the attention of the longest histories costs N^alpha instead of N^2 on average.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from hllm_torchrec.common.arrays import Ints

STREAM = 0x534C
"""Sets these draws apart from others that begin with (seed, epoch)."""


@dataclass(frozen=True)
class StochasticLength:
    """What of a history is read, drawn by (seed, epoch, user, stretch): the same at any world size and on resuming.

    alpha: above 1, at most 2 (never shortens); max_events: N, the events that a pass may hold; choice: "uniform", or
    "recent", where an event's weight falls linearly with its age, from 1 at the latest to nearly 0 at the oldest.
    (The paper's appendix weighs by age as well, but divides it by the sum of all ages, which leaves long histories
    with all but equal weights.)
    """

    alpha: float
    max_events: int
    choice: Literal["recent", "uniform"] = "recent"
    seed: int = 0

    @property
    def subsample_size(self) -> int:
        """Events of a subsample: N^(alpha / 2), rounded down."""
        return max(1, int(self.max_events ** (self.alpha / 2) + 1e-9))

    def shortened_share(self, events: int) -> float:
        """Probability that a history of so many events is subsampled."""
        if events <= self.subsample_size:
            return 0.0
        return max(0.0, 1 - self.max_events**self.alpha / events**2)

    def choose(self, times: Ints, *, epoch: int, user: int, offset: int) -> Ints:
        """Indices [m] of the events of `times` [n] that are read, in order.

        The first event always stays, so that each of the others has one before it to be predicted from.

        Args:
            times: seconds, rising.
            offset: where in the user's whole sequence the stretch begins.
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
