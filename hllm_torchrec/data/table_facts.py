"""`TableFacts`: facts about a source's tables, collected while they are read, and notes on them for the user."""

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

DAY = 86_400
EARLY = 315_532_800
"""1980-01-01 00:00:00 UTC; earlier times are probably in a wrong unit."""
_NOT_VALUES = ("raw_user_id", "raw_item_id", "row", "timestamp", "time_text", "label", "text_of_label")
_MAY_BE_TEXT = ("timestamp", "time_text", "label", "text_of_label")
_NULL_WORDS = ("nan", "none", "null", "na", "n/a", "<na>", "#n/a", "nat", "\\n")
_WORD_SHARE, _SPLIT_SHARE = 0.01, 0.5


class TableFacts:
    """Facts about one table of a source ("events", "items" or "users"), accumulated over its chunks."""

    def __init__(self, table: str) -> None:
        self.table = table
        self.rows = 0
        self._files: dict[str, list[Path]] = {}
        self._filled: Counter[str] = Counter()
        self._words: dict[str, Counter[str]] = {}
        self._labels: Counter[str] = Counter()
        self._first: int | None = None
        self._last: int | None = None
        self._whole_days = self._rounded = True
        self.is_labelled = True
        """False if the source gives every event label 1."""
        self.extra: list[str] = []
        """Additional lines for the summary, from other modules."""

    def add(self, path: Path, rows: pa.Table, dialect: str) -> None:
        """Add a chunk's rows, in the layout of `sources.base.Chunk`."""
        self.rows += len(rows)
        files = self._files.setdefault(dialect, [])
        if not files or files[-1] != path:
            files.append(path)
        for name in rows.column_names:
            if name not in _NOT_VALUES or (self.table == "items" and name in _MAY_BE_TEXT):
                self._add_column(name, rows[name])
        is_events = self.table == "events"  # a text column of items may be named label or timestamp
        if is_events and "label" in rows.column_names:
            self._add_labels(rows["label"])
        if is_events and "timestamp" in rows.column_names:
            self._add_times(rows["timestamp"], rows["time_text"])

    def _add_column(self, name: str, values: pa.ChunkedArray) -> None:
        shown = name.removeprefix("feature_")
        if pa.types.is_list(values.type):
            values = pc.list_flatten(values)
        elif not pa.types.is_string(values.type):
            filled = (
                len(values) - values.null_count
                if name in ("created_at", "active")
                else pc.sum(pc.not_equal(values, 0)).as_py()
            )
            self._filled[shown] += filled or 0
            return
        lower = pc.utf8_lower(pc.utf8_trim_whitespace(values.drop_null()))
        self._filled[shown] += int(pc.sum(pc.not_equal(lower, "")).as_py() or 0)
        words = lower.filter(pc.is_in(lower, value_set=pa.array(_NULL_WORDS, pa.string())))
        if len(words):
            found = {str(v["values"]): int(v["counts"]) for v in words.value_counts().to_pylist()}
            self._words.setdefault(shown, Counter()).update(found)

    def _add_labels(self, labels: pa.ChunkedArray) -> None:
        known = labels.drop_null().to_numpy()
        self._labels.update({"0": int((known == 0).sum()), "1": int((known == 1).sum())})

    def _add_times(self, seconds: pa.ChunkedArray, texts: pa.ChunkedArray) -> None:
        known = seconds.drop_null().to_numpy()
        if not len(known):
            return
        first, last = int(known.min()), int(known.max())
        self._first = first if self._first is None else min(first, self._first)
        self._last = last if self._last is None else max(last, self._last)
        self._whole_days &= not (known % DAY).any()
        if self._rounded:
            written = texts.drop_null()
            self._rounded = len(written) > 0 and bool(pc.all(pc.match_substring_regex(written, r"\d[eE]\+?\d")).as_py())

    @property
    def place(self) -> str:
        """The files of the table, for messages."""
        files = [file for files in self._files.values() for file in files]
        return f"{files[0]}{_others(files)}"

    def notes(self) -> Iterator[str]:
        """Lines for the summary."""
        for dialect, files in self._files.items():
            if dialect:
                yield f"{files[0].name}{_others(files)}: {dialect}"
        yield from self._time_notes()
        labels = [value for value, count in self._labels.items() if count]
        if len(labels) == 1 and self.is_labelled:
            yield f"caution: every label is {labels[0]}; a model needs both"
        for name, count in self._filled.items():
            if not count and self.rows:
                yield f"caution: {self.table}: {name} is empty in every row"
        for name, words in self._words.items():
            for word, count in words.items():
                if count > _WORD_SHARE * self.rows:
                    yield (
                        f"caution: {self.table}: {name} is {word!r} in {count / self.rows:.0%} of the rows; if that "
                        f"means missing, set format: {{nulls: [...]}} in the mapping"
                    )
        yield from self.extra

    def _time_notes(self) -> Iterator[str]:
        if self._first is None or self._last is None:
            return
        first, last = _moment(self._first), _moment(self._last)
        yield f"times: {first} to {last} UTC"
        if self._last < EARLY:
            yield f"caution: all times lie in {first[:4]} to {last[:4]}; is the time unit right?"
        elif self._first < EARLY:
            yield f"caution: some times lie before 1980, the first in {first[:4]}"
        if self._last > time.time() + DAY:
            yield f"caution: some times lie in the future, the last at {last}; events appended until then count as late"
        if self._rounded:
            yield "caution: times have an exponent (1.7E+09): a spreadsheet has rounded them"
        if self._whole_days and self.rows > 1 and self._last >= EARLY:
            yield "times are days: events of one day are not history of each other"


def _others(files: Sequence[Path]) -> str:
    return f" and {len(files) - 1:,} more" if len(files) > 1 else ""


def _moment(second: int) -> str:
    if not 0 <= second <= 253_402_300_799:
        return f"second {second}"
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%d %H:%M:%S")


def user_notes(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Lines for the summary about users with and without a row in the user file."""
    counts = manifest["counts"]
    without, idle = counts.get("users_without_features", 0), counts.get("user_rows_without_events", 0)
    if not manifest["user_features"] or not (without or idle):
        return
    if without == counts["users"]:
        yield "caution: no user of the events is in the user file, so that no user has a feature; compare the ids"
    elif without:
        yield f"{without:,} of {counts['users']:,} users have no features: they are not in the user file"
    if idle:
        yield f"{idle:,} rows of the user file are of users without events"


def describe_append(entry: Mapping[str, Any]) -> str:
    """Lines that describe an appended version: numbers of its events, and of new and changed items and users."""
    late = f", {entry['late_events']:,} of them late" if entry["late_events"] else ""
    lines = [f"  appended: {entry['events']:,} events of {entry['users']:,} users{late}"]
    for what in ("items", "users"):
        lines.append(f"  {what}: {entry[f'new_{what}']:,} new, {entry[f'changed_{what}']:,} changed")
    if entry["new_users_without_features"]:
        lines.append(
            f"  caution: {entry['new_users_without_features']:,} of the new users have no features: they are not in "
            "the append's user file. Give one that has all users (a later append with them adds the features)"
        )
    lines += [f"  {what}: {json.dumps(entry[what])}" for what in ("dropped", "kept") if entry[what]]
    return "\n".join(lines)
