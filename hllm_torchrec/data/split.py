"""Splitting of events into train, valid and test: by global time, by dates, or by the end of each user's sequence.

Legend: N events of one partition, sorted by (user, timestamp, order), where `order` is the source row; U users of the
partition.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hllm_torchrec.common.seconds import text_of

SPLITS = ("train", "valid", "test")
RULES = ("time", "date", "leave_one_out", "leave_last")
_DIGIT_BITS = 16
_DIGITS = 1 << _DIGIT_BITS
_KEY_BITS = 48

Pairs = Iterable[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Split:
    """Rule that divides events into train, valid and test."""

    rule: str = "time"
    """"time": all events, sorted by (timestamp, source row), are cut by position (ranking). "date": the same order is
    cut at given seconds. "leave_one_out": each user's last event is test, the second to last is valid (for retrieval).
    "leave_last": shares at the end of each user's sequence are valid and test (for ranking over all users)."""
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of train, valid and test; ignored by "date" and "leave_one_out"."""
    hold_out_items: float = 0.0
    """If above 0, the training events of this share of the items are removed, also from the history of the later parts,
    as if the items had appeared later. For the evaluation of cold start."""
    hold_out_seed: int = 0
    """Seed of the selection of held-out items, which depends only on this seed and an item's raw id."""
    train_until: int | None = None
    """Second UTC, only for "date": events before it are train."""
    valid_until: int | None = None
    """Second UTC, only for "date": events from `train_until` until before it are valid, later ones are test."""

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"split.rule={self.rule!r} is not one of {', '.join(RULES)}; choose one of them")
        dates = (self.train_until, self.valid_until)
        if self.rule == "date" and (None in dates or not 0 < self.train_until < self.valid_until):  # type: ignore[operator]
            raise ValueError(
                f"split date: train until {_moment(self.train_until)}, valid until {_moment(self.valid_until)}: give "
                "both (--train-until, --valid-until), the second later"
            )
        if self.rule != "date" and dates != (None, None):
            raise ValueError(
                f"split.rule={self.rule!r} with dates: --train-until and --valid-until belong to --split date"
            )
        if len(self.fractions) != 3 or min(self.fractions) < 0 or abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(
                f"split.fractions={self.fractions} must be three shares (train, valid, test), none negative, "
                "that sum to 1"
            )
        if not 0 <= self.hold_out_items < 1:
            raise ValueError(
                f"split.hold_out_items={self.hold_out_items}: must be a share of the items, 0 or more and < 1"
            )

    def to_dict(self) -> dict[str, Any]:
        """The rule as JSON values."""
        uses_fractions = self.rule not in ("date", "leave_one_out")
        found: dict[str, Any] = {"rule": self.rule, "fractions": list(self.fractions) if uses_fractions else None}
        if self.rule == "date":
            found |= {"train_until": self.train_until, "valid_until": self.valid_until}
        if self.hold_out_items:
            found |= {"hold_out_items": self.hold_out_items, "hold_out_seed": self.hold_out_seed}
        return found

    @property
    def is_by_time(self) -> bool:
        """True if the parts are given by two cuts of all events in the order of (timestamp, source row)."""
        return self.rule in ("time", "date")

    def held_out(self, raw_item_ids: Iterable[str]) -> np.ndarray:
        """Mask (bool [n]) of the items that are held out of train."""
        prefix, limit = f"{self.hold_out_seed}/".encode(), self.hold_out_items * 2**64
        digests = (hashlib.blake2b(prefix + raw.encode(), digest_size=8).digest() for raw in raw_item_ids)
        return np.array([int.from_bytes(digest) < limit for digest in digests], bool)


@dataclass(frozen=True)
class Cut:
    """A boundary between events: events with (timestamp, order) less than the cut's are before it."""

    timestamp: int
    order: int


def select_kth(stream: Callable[[], Iterable[np.ndarray]], k: int) -> int:
    """The k-th smallest (from 0) of the non-negative keys below 2^48 that `stream()` yields in arrays.

    A radix search: each pass counts one 16-bit digit of the keys that share the digits found so far. Memory
    does not depend on the number of keys; `stream` is called three times.
    """
    prefix = 0
    for shift in range(_KEY_BITS - _DIGIT_BITS, -1, -_DIGIT_BITS):
        counts = np.zeros(_DIGITS, np.int64)
        for keys in stream():
            # Use only keys with the digits found so far; in the first round the shift gives 0 for every key.
            inside = keys[(keys >> (shift + _DIGIT_BITS)) == prefix]
            counts += np.bincount((inside >> shift) & (_DIGITS - 1), minlength=_DIGITS)
        below = np.cumsum(counts)
        digit = int(np.searchsorted(below, k, side="right"))
        assert digit < _DIGITS, "k is beyond the number of keys"
        k -= int(below[digit] - counts[digit])  # rank among the keys that share the longer prefix
        prefix = (prefix << _DIGIT_BITS) | digit
    return prefix


def find_cut(stream: Callable[[], Pairs], position: int) -> Cut:
    """The cut before the event at `position` (from 0) of all events sorted by (timestamp, order).

    `stream()` yields (timestamps int64 [N], orders int64 [N]) of every partition, in any order. Within a second
    the order decides, so that exactly `position` events come before the cut.
    """
    second = select_kth(lambda: (times for times, _ in stream()), position)
    earlier = sum(int(np.count_nonzero(times < second)) for times, _ in stream())
    order = select_kth(lambda: (orders[times == second] for times, orders in stream()), position - earlier)
    return Cut(second, order)


def date_cuts(split: Split) -> list[Cut]:
    """The two cuts of a split by dates; with order 0, all events of the cut's second are after it."""
    assert split.train_until is not None and split.valid_until is not None
    return [Cut(split.train_until, 0), Cut(split.valid_until, 0)]


def time_cuts(split: Split, total: int, stream: Callable[[], Pairs]) -> list[Cut]:
    """The two cuts of the time split of `total` events. Raises ValueError if a part would be empty.

    stream: see `find_cut`.
    """
    first = round(total * split.fractions[0])
    second = round(total * (split.fractions[0] + split.fractions[1]))
    check_not_empty(dict(zip(SPLITS, (first, second - first, total - second), strict=True)), split)
    return [find_cut(stream, first), find_cut(stream, second)]


def cuts_of(split: Split, total: int, stream: Callable[[], Pairs]) -> list[Cut]:
    """The two cuts of a split by time or dates; an empty list for the per-user rules. Raises like `time_cuts`."""
    if split.rule == "date":
        return date_cuts(split)
    return time_cuts(split, total, stream) if split.rule == "time" else []


def cut_facts(split: Split, cuts: Sequence[Cut]) -> dict[str, Any]:
    """The manifest's entry for a split with its cuts."""
    seconds, orders = [cut.timestamp for cut in cuts], [cut.order for cut in cuts]
    return {**split.to_dict(), "cut_timestamps": seconds, "cut_orders": orders}


def _moment(second: int | None) -> str:
    return "none" if second is None else text_of(second)


def check_not_empty(events: dict[str, int], split: Split) -> None:
    """Raise ValueError if parts have no event; the message names these parts."""
    empty = [part for part, count in events.items() if count == 0]
    if empty:
        raise ValueError(
            f"the {' and '.join(empty)} part of the {split.rule} split is empty (events: {events}). Give more events, "
            f"other {'dates' if split.rule == 'date' else 'split.fractions'}, or another split.rule"
        )


def assign_splits(
    split: Split, cuts: Sequence[Cut], timestamps: np.ndarray, orders: np.ndarray, user_counts: np.ndarray
) -> np.ndarray:
    """The part (0 train, 1 valid, 2 test; int8 [N]) of each event of a partition sorted by user and time.

    `user_counts` [U] are the users' numbers of events. In the two per-user rules, all events of users with fewer than
    three events are in train, since these users cannot have an event in each part.
    """
    if split.is_by_time:
        part = np.zeros(len(timestamps), np.int8)
        # The part is the number of cuts at or before the event.
        for cut in cuts:
            part += (timestamps > cut.timestamp) | ((timestamps == cut.timestamp) & (orders >= cut.order))
        return part
    # position: index of each event in its user's sequence.
    first = np.cumsum(user_counts) - user_counts
    position = np.arange(len(timestamps)) - np.repeat(first, user_counts)
    start_valid, start_test = per_user_starts(split.rule, split.fractions, user_counts)
    in_valid = position >= np.repeat(start_valid, user_counts)
    return in_valid.astype(np.int8) + (position >= np.repeat(start_test, user_counts))


def per_user_starts(rule: str, fractions: Sequence[float] | None, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions ([U], [U]) at which valid and test begin in sequences of `counts` [U] events, in the per-user rules."""
    if rule == "leave_one_out":
        held_test = held_valid = np.ones_like(counts)
    else:
        assert fractions is not None, "leave_last has fractions"
        held_test = np.maximum(np.rint(counts * fractions[2]).astype(np.int64), 1)
        held_valid = np.maximum(np.rint(counts * fractions[1]).astype(np.int64), 1)
    # With too few events, both starts are the end of the sequence, so that all events are train.
    enough = counts >= 3
    start_test = np.where(enough, np.maximum(counts - held_test, 0), counts)
    return np.where(enough, np.maximum(start_test - held_valid, 0), counts), start_test
