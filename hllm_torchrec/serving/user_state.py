"""History of a user in a request, and its encoding by one model."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from hllm_torchrec.common.arrays import Floats
from hllm_torchrec.data.events import Events, Piece
from hllm_torchrec.data.past_events import PastEvents
from hllm_torchrec.inference.raw_ids import raw_texts
from hllm_torchrec.modules.attention.keys_values import HistoryCache


@dataclass(frozen=True, init=False)
class UserHistory(Events):
    """Events of one user, oldest first; ids are dense ids of the dataset (`Scorer.history` takes raw ones).

    Raises:
        ValueError: columns of different lengths, decreasing times, or raw ids.
    """

    user_id: int = field(kw_only=True)

    def __init__(self, user_id: int, *columns: ArrayLike, **named: ArrayLike) -> None:
        """Accept the columns of `Events`: item_ids, timestamps, labels, actions, in this order or by name."""
        # Checked first, because numpy would convert the raw ids "242" and "302" to numbers.
        items = named.get("item_ids", columns[0] if columns else ())
        if isinstance(user_id, str) or raw_texts(items, f"item_ids of user {user_id}") is not None:
            raise ValueError(
                f"user {user_id!r}: raw ids: make the history with Scorer.history, which knows the dataset"
            )
        super().__init__(**Events(*columns, **named).as_arrays().columns)  # type: ignore[arg-type]  # not yet arrays
        object.__setattr__(self, "user_id", user_id)
        sizes = {name: values.size for name, values in (self.columns | self.extra).items() if name != "extra"}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"user {self.user_id}: columns of different lengths {sizes}: give one entry per event")
        # User 0: the request has no user, or a raw id that the dataset does not have.
        whose = f"user {self.user_id}" if self.user_id else "history"
        back = np.flatnonzero(np.diff(self.timestamps) < 0)
        if back.size:
            row = int(back[0]) + 1
            raise ValueError(
                f"{whose}, event {row}: time {self.timestamps[row]} is before that of the previous event "
                f"({self.timestamps[row - 1]}): sort events by time"
            )

    def as_piece(self, first: int = 0) -> Piece:
        """The events as an input of the collator; events from index `first` on are the exposures."""
        return Piece(**self.columns, user_id=self.user_id, first_target=first)

    def since(self, start: int) -> "UserHistory":
        """The events from index `start` on."""
        return UserHistory(self.user_id, **self[start:].columns)

    def followed_by(self, later: "UserHistory") -> "UserHistory":
        """The concatenation of both histories.

        Raises:
            ValueError: events of another user, or before the last event of this history.
        """
        if later.user_id != self.user_id:
            raise ValueError(
                f"events of user {later.user_id} after those of user {self.user_id}: give events of one user"
            )
        return UserHistory(self.user_id, **Events.concat([self, later]).columns)


@dataclass(frozen=True)
class UserState:
    """Encoded history of a user.

    history: all events; start: index of the first event that the model uses; cache: keys and values of the events from
    `start` on. mark: identifies the model and the numbering of the items; scorers with another mark refuse the state.
    past: what evidence needs of all events; None for a model without evidence. numbers: memo of `RequestRules.numbers`,
    number of visible events -> numeric features [1, F] of a request; filled only if all numeric features depend on the
    events alone, not on the time of the request.
    """

    history: UserHistory
    start: int
    cache: HistoryCache
    mark: str
    past: PastEvents | None = None
    numbers: dict[int, Floats] = field(default_factory=dict, compare=False, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the cache and the evidence; not those of the history."""
        return self.cache.nbytes + (0 if self.past is None else self.past.nbytes)

    @cached_property
    def highest_item(self) -> int:
        """Highest dense item id in the history; 0 for an empty history."""
        return int(self.history.item_ids.max(initial=0))
