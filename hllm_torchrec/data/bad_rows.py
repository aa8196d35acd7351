"""Handling of bad rows: each kind either raises an error that names file and row, or is counted in the manifest."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hllm_torchrec.common.yaml_files import abbreviate
from hllm_torchrec.data.table_facts import TableFacts

MAX_SECOND = 4_102_444_799
"""2099-12-31 23:59:59 UTC, the last second that the tables of the time features cover."""

_ALLOWED = {
    "missing_id": ("error", "drop"),
    "nan_label": ("error", "drop", "keep"),
    "bad_time": ("error", "drop"),
    "duplicate_item": ("error", "drop"),
    "item_without_text": ("error", "drop", "keep"),
    "unknown_item": ("error", "drop", "keep"),
    "duplicate_event": ("error", "drop", "keep"),
}
_CAUSES = {
    "missing_id": "another column may hold the ids, or these are visitors who were not logged in",
    "nan_label": "another column may hold the labels, or the mapping lacks positive_from",
    "bad_time": "another column may hold the times, or they are in another unit",
    "duplicate_item": "the file may have a row for each category, language or seller of an item",
    "item_without_text": "other columns may hold the texts",
    "unknown_item": "users and items may have changed places, the item file may be another one, or its ids may be "
    "written differently (12 and 12.0, leading zeros, blanks, case)",
    "duplicate_event": "a file may be read twice, or the times may be days",
    "event_of_dropped_item": "items without text are dropped",
}
"""Likely cause of many bad rows of a kind."""
_TABLES = {"duplicate_item": "items", "item_without_text": "items", "missing_id": ""}
"""Table that the bad rows of a kind belong to, if not the events; "": the table that is being read."""
FEW_ROWS = 4
"""Fewer bad rows of a kind than this never fail `check_shares`, since a few bad rows in a small table can be chance."""


@dataclass(frozen=True)
class BadRows:
    """Policy for each kind of bad row: "error"; or "drop" or "keep", which count the row in the manifest."""

    missing_id: str = "error"
    """A row whose user or item id is null or blank."""
    nan_label: str = "error"
    """A label or rating that is not a number in its range. "keep": the event stays in the history, without a label."""
    bad_time: str = "error"
    """A time that is not a number or date, or is outside 1970..2099 UTC."""
    duplicate_item: str = "error"
    """An item that occurs again with another text or other features. "drop": the item's first row is kept."""
    item_without_text: str = "keep"
    """An item whose text columns are all empty. "drop": its events are dropped too."""
    unknown_item: str = "error"
    """An event of an item that is not in the item file. "keep": the item is added without text."""
    duplicate_event: str = "keep"
    """An event with the same user, item and second as an earlier one. "drop": the first of them stays."""
    largest_share: float = 0.2
    """Maximum share of a table's rows that may be bad in one way; above it, "drop" and "keep" raise an error too."""
    chosen: frozenset[str] = frozenset()
    """Kinds that `largest_share` does not limit, because the description of the data (a mapping) sets their handling.
    """

    def __post_init__(self) -> None:
        for name, allowed in _ALLOWED.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"policy {name}={value!r}: choose one of {', '.join(allowed)}")
        if not 0 <= self.largest_share <= 1:
            raise ValueError(f"largest share of bad rows {self.largest_share:g}: choose one in 0..1")

    def changed(
        self, choices: Mapping[str, str], *, chosen: bool = False, largest_share: float | None = None
    ) -> "BadRows":
        """A copy with other choices. chosen: exempt them from `largest_share`. Raises ValueError for a bad choice."""
        fields: dict[str, Any] = dict(choices)
        if chosen:
            fields["chosen"] = self.chosen | choices.keys()
        if largest_share is not None:
            fields["largest_share"] = largest_share
        return replace(self, **fields)

    def to_dict(self) -> dict[str, str]:
        """Kind -> handling, as JSON; `largest_share` and `chosen` are left out, as they do not change the dataset."""
        return {name: getattr(self, name) for name in _ALLOWED}


class BadRowLog:
    """Applies a `BadRows` policy, counts dropped and kept rows, and collects notes on the tables for the user.

    `dropped` and `kept` count rows by reason. Some reasons are not fields of the policy, such as
    "event_of_dropped_item", which follows from another choice, and "repeated_item_row", which is not an error.
    """

    def __init__(self, policy: BadRows) -> None:
        self.policy = policy
        self.dropped: Counter[str] = Counter()
        self.kept: Counter[str] = Counter()
        self.rows: Counter[str] = Counter()
        """Rows read, by table: "items", "events", "users"."""
        self.table = "events"
        """The table that is being read."""
        self.facts: dict[str, TableFacts] = {}
        self.hints: dict[str, str] = {}
        """Reason -> likely cause found in the values, which replaces the general text of `_CAUSES`."""
        self._counts: Counter[tuple[str, str]] = Counter()

    def read(self, table: str, path: Path, rows: pa.Table, dialect: str) -> None:
        """Record that these rows of a table were read."""
        self.table = table
        self.rows[table] += len(rows)
        self.facts.setdefault(table, TableFacts(table)).add(path, rows, dialect)

    def count(self, reason: str, count: int, choice: str = "drop") -> None:
        """Count rows that are dropped or kept for a reason."""
        if count:
            (self.dropped if choice == "drop" else self.kept)[reason] += count
            self._counts[_TABLES.get(reason, "events") or self.table, reason] += count

    def check_shares(self) -> None:
        """Raise ValueError if the bad rows of a kind exceed the policy's largest share of their table."""
        for (table, reason), count in self._counts.items():
            total, limit = self.rows[table], self.policy.largest_share
            judged = reason in _CAUSES and reason not in self.policy.chosen and count >= FEW_ROWS
            if judged and count > limit * total > 0:
                remedy = f"allow a larger share (--bad-share {min(1.0, -(-count * 100 // total) / 100):g})"
                if reason in _ALLOWED:  # a mapping cannot choose the handling of a consequence
                    choice = getattr(self.policy, reason)
                    remedy = f"choose their handling in the mapping (bad_rows: {{{reason}: {choice}}}), or {remedy}"
                raise ValueError(
                    f"{self.facts[table].place}: {reason}: {count:,} of {total:,} rows of the {table} "
                    f"({count / total:.0%}), more than {limit:.0%}: {self.hints.get(reason, _CAUSES[reason])}. If "
                    f"these rows are as expected, {remedy}"
                )

    def notes(self) -> list[str]:
        """Notes on the tables for the user, one line each. Raises ValueError like `check_shares`."""
        self.check_shares()
        return [
            note for name in ("events", "items", "users") if name in self.facts for note in self.facts[name].notes()
        ]

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
        self.count(reason, count, choice)
        return bool(choice == "drop")


def describe_time(text: str | None, second: int | None, remedy: str = "") -> str:
    """Describe the problem with a time: `text` is the value in the file, `second` the parsed value or None.

    remedy: text that is added, followed by the unit, if the value looks like a time in another unit.
    """
    # If the value is in range when read in a finer unit, it most likely has that unit, so suggest it.
    number = int(text) if text and re.fullmatch(r"\s*\d{1,19}\s*", text) else second
    if number is not None and (second is None or second > MAX_SECOND):
        for unit, scale in (("milliseconds", 1_000), ("microseconds", 1_000_000), ("nanoseconds", 1_000_000_000)):
            if MAX_SECOND < number <= MAX_SECOND * scale:
                problem = f"the time {text!r} is beyond 2099 in its unit; it looks like {unit}"
                return f"{problem}{remedy}{unit}" if remedy else problem
    if second is None:
        hint = ""
        if text and re.match(r"\s*\d{4}-\d\d-\d\d", text):
            hint = ": set the time unit to iso8601" if _is_iso(text) else ": write it like 2024-01-31T12:00:00+01:00"
        return f"the time {abbreviate(text)} is not a number or date of the stated unit{hint}"
    return f"the time {abbreviate(text)} (second {second}) is outside 1970-01-01..2099-12-31 UTC"


def _is_iso(text: str) -> bool:
    try:
        datetime.fromisoformat(text.strip().removesuffix(" UTC"))
    except ValueError:
        return False
    return True
