"""Negatives drawn for the ranking head from the catalogue, for data in which every event is positive.

For each exposure, `count` items are drawn from the distribution q and added to its request with label 0; a draw of the
exposure's own item is left out. Item j is then a negative of a request r_j = count * q_j times on average; if the
complete catalogue were used as negatives, it would be a negative once. The loss corrects for this like for subsampled
negatives (`data.task_targets`): z_train = z - log r_j, on positive and negative rows. Then z is the logit of P_j = P(a
request chooses j), because the odds of a positive row of j in the sample are P_j / (r_j (1 - P_j)). This holds for any
q above 0. In evaluation the draws are uniform and the same for all runs, and each negative has the weight 1 / r, so
that the metrics estimate those of ranking the complete catalogue.

    uniform      q_j = 1 / N
    popularity   q_j proportional to 1 + training events of j
    batch        items of other exposures of the step on this rank: q_j is the share of training events of j
    hard         q_j = (1 - HARD) / N, plus HARD / K for the K candidates that a retrieval run gives for the user

Legend: X exposures, M drawn rows, N items that may be drawn.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hllm_torchrec.common.arrays import Floats, Ints
from hllm_torchrec.common.hashing import hash_columns
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.event_schema import LABEL
from hllm_torchrec.data.events import Events, Piece

Draw = Literal["uniform", "popularity", "batch", "hard"]
HARD = 0.5
"""Probability that a draw by "hard" is made from the user's candidates."""
STRIDE = 1 << 24
"""Added to the position of an exposure for each of its draws, so that (user, position) identifies a row."""


class DrawnRows(NamedTuple):
    """Rows of a piece: its exposures [X], followed by their drawn negatives [M].

    source: index in the piece of the exposure that a row is or was drawn for; rates: r of each row's item; positions:
    position of each exposure, and of each draw as described at STRIDE.
    """

    source: Ints
    events: Events
    rates: Floats
    positions: Ints


class NegativeDraws:
    """Draws negatives for a dataset, as a function of (seed, epoch, user, position), so equally on every rank; those
    by "batch" also depend on the pieces of the rank.

    Args:
        items: ids [n] that may be drawn.
        count: draws per exposure.
        candidates: for "hard" negatives, (items [n], offsets [users + 1]) of each user; for users without candidates
            all draws are uniform.
    """

    def __init__(
        self,
        dataset: Dataset,
        items: Ints,
        by: Draw,
        count: int,
        seed: int = 0,
        candidates: tuple[Ints, Ints] | None = None,
    ) -> None:
        self.by, self.count, self._items, self._seed = by, count, items, seed
        self._candidates = candidates
        events = dataset.training_item_counts().astype(np.float64)
        mass = np.ones(dataset.num_items)
        if by in ("popularity", "batch"):
            mass = events + (1 if by == "popularity" else 0)
        total = mass[items].sum()
        self._shares = mass / (total or 1.0)
        """q of each of the dataset's items; for items that cannot be drawn, the value by the same formula."""
        self._ends = np.cumsum(mass[items]) / (total or 1.0)

    def rows(self, piece: Piece, targets: Ints, epoch: int, pool: Ints) -> DrawnRows:
        """The exposures `targets` [X] of a piece and their draws; pool: see `pool_of`."""
        users = np.full(targets.size, piece.user_id)
        positions, own = targets + piece.offset, piece.item_ids[targets]
        # One uniform number per draw, a hash of (seed, epoch, user, position, draw): the same on any rank, in any
        # batch.
        numbers = np.tile(np.arange(self.count), targets.size)
        keys = (np.full(numbers.size, self._seed), np.full(numbers.size, epoch))
        again = (np.repeat(column, self.count) for column in (users, positions))
        at = hash_columns(*keys, *again, numbers) / 2.0**64
        drawn = self._item_at(at, pool, piece.user_id)
        kept = drawn != np.repeat(own, self.count)  # the exposed item itself is not a negative
        source = np.concatenate([targets, np.repeat(targets, self.count)[kept]])
        events = Events.concat([piece[targets], self._negatives(piece[source[targets.size :]], drawn[kept])])
        # STRIDE is above every position of a sequence, so (user, position) stays unique over exposures and draws.
        places = np.concatenate([positions, np.repeat(positions, self.count)[kept] + (numbers[kept] + 1) * STRIDE])
        return DrawnRows(source, events, self.rates(events.item_ids, piece.user_id), places)

    def rates(self, items: Ints, user: int) -> Floats:
        """float32 [n] expected draws of each item at a request of a user, count * q."""
        shares = self._shares[items]
        own = self._of_user(user)
        if own.size:
            shares = (1 - HARD) * shares + HARD / own.size * np.isin(items, own)
        return (self.count * shares).astype(np.float32)

    def _item_at(self, at: NDArray[Any], pool: Ints, user: int) -> Ints:
        """Items [m] drawn by uniform numbers [m] in [0, 1)."""
        if self.by == "batch":
            return pool[np.minimum(at * pool.size, pool.size - 1).astype(np.int64)]
        own = self._of_user(user)
        if not own.size:
            return self._at(at)
        hard = own[np.minimum(at / HARD * own.size, own.size - 1).astype(np.int64)]
        return np.where(at < HARD, hard, self._at((at - HARD) / (1 - HARD)))

    def _at(self, at: NDArray[Any]) -> Ints:
        """Items [m] drawn from q by its inverse distribution function at uniform numbers [m]."""
        return self._items[np.minimum(np.searchsorted(self._ends, at, side="right"), self._items.size - 1)]

    def _of_user(self, user: int) -> Ints:
        if self._candidates is None:
            return self._items[:0]
        items, offsets = self._candidates
        return items[offsets[user] : offsets[user + 1]]

    @staticmethod
    def _negatives(requests: Events, items: Ints) -> Events:
        """Copies of the requests' events [M] with `items`, label 0, the unknown action and NaN for all other labels."""
        extra = {
            name: np.full_like(values, np.nan) if name.startswith(LABEL) else values
            for name, values in requests.extra.items()
        }
        zeros = np.zeros(items.size)
        return replace(
            requests, item_ids=items, labels=zeros.astype(np.float32), actions=zeros.astype(np.int64), extra=extra
        )


def pool_of(pieces: Sequence[Piece]) -> Ints:
    """Items of the exposures of a rank's pieces, from which negatives are drawn by "batch"."""
    return np.concatenate([np.empty(0, np.int64), *(piece.item_ids[piece.exposures] for piece in pieces)])
