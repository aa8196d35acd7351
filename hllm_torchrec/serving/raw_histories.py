"""Conversion of histories from raw ids and action names to dense ids, and checks of the ids in a request."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.inference.raw_ids import RawIds, raw_texts
from hllm_torchrec.serving.user_state import UserHistory


class UnknownIdsError(ValueError):
    """Raised for raw ids or names that are not in the dataset."""


class RawHistories:
    """Look-up of a dataset's users by raw id and of its actions by name."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._actions = {name: int(number) for number, name in dataset.manifest["actions"]["names"].items()}

    @cached_property
    def _users(self) -> RawIds:
        return RawIds(self._dataset.users["raw_user_id"])

    def user(self, raw_id: str | None) -> int:
        """Dense id of a user; 0 for None, a user who came after `hllm prepare`.

        Raises:
            ValueError: the id is unknown or not a string.
        """
        if raw_id is None:
            return 0
        if raw_texts([raw_id], "user") is None:
            raise ValueError(f"user: {raw_id!r}: a raw id is a text; UserHistory takes dense ids")
        found = self._users.find([raw_id])
        check_found("user", found, [raw_id], "give None for a user who came after `hllm prepare`")
        return int(found[0])

    def history(
        self,
        user: str | None,
        item_ids: Ints,
        timestamps: ArrayLike,
        labels: ArrayLike | None,
        actions: Sequence[str | None] | None,
    ) -> UserHistory:
        """See `Scorer.history`; item_ids: [n] dense ids."""
        numbers = np.zeros(item_ids.size, np.int64)
        if actions is not None:
            numbers = np.array([0 if name is None else self._actions.get(name, -1) for name in actions], np.int64)
            named = [str(name) for name in actions]
            check_found(f"actions {of_user(user)}", numbers, named, f"it has {', '.join(self._actions)}")
        given = np.full(item_ids.size, np.nan) if labels is None else labels
        return UserHistory(self.user(user), item_ids, timestamps, given, numbers)


def of_user(user: str | None) -> str:
    """Words for messages about a history: "of user 'u7'", or "of the history" if it has no user."""
    return "of the history" if user is None else f"of user {user!r}"


def check_ids(name: str, ids: Ints, number: int) -> None:
    """Check that dense ids [n] are in [0, number).

    Raises:
        ValueError: an id is outside; the message gives its index.
    """
    wrong = np.flatnonzero((ids < 0) | (ids >= number))
    if wrong.size:
        raise ValueError(
            f"{name}, entry {int(wrong[0])}: {int(ids[wrong[0]])}: the dataset's ids go from 1 to {number - 1}, and "
            "0 is unknown; give 0 for ids added after `hllm prepare`, or prepare again"
        )


def check_found(what: str, ids: Ints, raw: Sequence[str], remedy: str) -> None:
    """Check that all raw ids were found: none of their dense ids [n] is negative.

    Raises:
        UnknownIdsError: some were not found; the message gives the first five and `remedy`.
    """
    wrong = np.flatnonzero(ids < 0)
    if wrong.size:
        shown = ", ".join(repr(raw[row]) for row in wrong[:5]) + (", ..." if wrong.size > 5 else "")
        raise UnknownIdsError(f"{what}: {wrong.size} of {len(raw)} are not in the dataset: {shown}; {remedy}")
