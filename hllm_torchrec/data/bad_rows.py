"""Handling of bad rows: an error that names file and row, or a count in the manifest; never silent."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

MAX_SECOND = 4_102_444_799
"""2099-12-31 23:59:59 UTC, the last second that the split-timestamp tables cover."""

_ALLOWED = {
    "missing_id": ("error", "drop"),
    "nan_label": ("error", "drop", "keep"),
    "bad_time": ("error", "drop"),
    "duplicate_item": ("error", "drop"),
    "item_without_text": ("error", "drop", "keep"),
    "unknown_item": ("error", "drop", "keep"),
    "duplicate_event": ("error", "drop", "keep"),
}


@dataclass(frozen=True)
class BadRows:
    """Policy for each kind of bad row: "error", or "drop" or "keep", which count it in the manifest."""

    missing_id: str = "error"
    """A row whose user or item id is null or blank."""
    nan_label: str = "error"
    """A label or rating that is not a number in its range. "keep": the event stays in the history, without a label."""
    bad_time: str = "error"
    """A time that is not a number or date, or is outside 1970..2099 UTC."""
    duplicate_item: str = "error"
    """An item that occurs again with a different text. "drop": the first text stays."""
    item_without_text: str = "keep"
    """An item whose text columns are all empty. "drop": its events are dropped too."""
    unknown_item: str = "error"
    """An event of an item that is not in the item file. "keep": the item is added without text."""
    duplicate_event: str = "keep"
    """The same user and item in the same second again. "drop": the first stays."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if value not in _ALLOWED[f.name]:
                raise ValueError(f"policy {f.name}={value!r}: choose one of {', '.join(_ALLOWED[f.name])}")

    def to_dict(self) -> dict[str, str]:
        """The policy as JSON values."""
        return asdict(self)


class BadRowLog:
    """Applies a `BadRows` policy and counts dropped and kept rows.

    `dropped` and `kept` count rows by reason. Reasons that are not fields of the policy, such as
    "event_of_dropped_item", are consequences of other choices.
    """

    def __init__(self, policy: BadRows) -> None:
        self.policy = policy
        self.dropped: Counter[str] = Counter()
        self.kept: Counter[str] = Counter()

    def handle(
        self,
        reason: str,
        bad: np.ndarray,
        path: Path,
        rows: Sequence[int] | np.ndarray,
        problem: Callable[[int], str],
    ) -> bool:
        """Apply the policy to the rows marked in `bad` (bool [n]); return True if the caller must drop them.

        `rows` are the n row numbers in `path`; `problem(i)` describes the problem of row i and the rule.
        Raises ValueError naming file, row, problem and remedy if the policy is "error".
        """
        count = int(np.count_nonzero(bad))
        if count == 0:
            return False
        choice = getattr(self.policy, reason)
        if choice == "error":
            first = int(np.flatnonzero(bad)[0])
            others = [c for c in _ALLOWED[reason] if c != "error"]
            raise ValueError(
                f"{path}, row {int(rows[first])}: {problem(first)}. Correct the row, or set the policy "
                f"{reason} to {' or '.join(others)} (--bad-rows {reason}={others[0]}), to count it and go on"
            )
        (self.dropped if choice == "drop" else self.kept)[reason] += count
        return bool(choice == "drop")


def describe_time(text: str | None, second: int | None) -> str:
    """Describe the problem with a time: `text` is the value in the file, `second` the parsed value or None."""
    if second is None:
        return f"the time {text!r} is not a number or date of the stated unit"
    # A value that would be in range in a finer unit most likely is in that unit: suggest it.
    for unit, scale in (("milliseconds", 1_000), ("microseconds", 1_000_000), ("nanoseconds", 1_000_000_000)):
        if MAX_SECOND < second <= MAX_SECOND * scale:
            return (
                f"the time {text!r} is beyond 2099 if it is in seconds; it looks like {unit}. Set the time "
                f"unit to {unit}" + ("" if unit != "nanoseconds" else " (not supported: divide by 1000 first)")
            )
    return f"the time {text!r} (second {second}) is outside 1970-01-01..2099-12-31 UTC"
