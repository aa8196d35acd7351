"""Sequences of a dataset with appended events: base and appends are merged by user when they are read.

A user's events are sorted by (second, version, row in the version), so late events are at the position of their time.
The parts are ranges of this sequence, given by the number of events before each cut: for the time split, events before
a second are counted; for the per-user splits, the number is a function of the sequence's length. So moving a cut
rewrites no events.

Legend: U users of the dataset, including the unknown user; R rows that are read; T events of all rows.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, pairwise

import numpy as np
from numpy.typing import NDArray

from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.data.event_files import EventFile
from hllm_torchrec.data.events import EVENT_COLUMNS, Events, RowHeads, Sequences
from hllm_torchrec.data.jagged_arrays import concat_ranges, offsets_from_lengths
from hllm_torchrec.data.merging import Columns, UserEvents
from hllm_torchrec.data.split import SPLITS, per_user_starts
from hllm_torchrec.data.validation import TableRows

_USERS_AT_ONCE = 8192
_Int32 = NDArray[np.int32]


@dataclass(frozen=True)
class Cuts:
    """The split of a version.

    rule: one of `split.RULES`; fractions: shares of the parts, for "leave_last"; seconds: first second of valid and of
    test, for a split by time; of_base: True if the base was divided at the same cuts, so that the starts in its event
    files are valid, also within the second of a cut.
    """

    rule: str
    fractions: Sequence[float] | None
    seconds: Sequence[int]
    of_base: bool


class MergedSequences:
    """Reads the merged sequences of the parts; see the module docstring.

    Args:
        base: event files with each user at most once.
        appended: event files of the appends, in the order of the versions.
        cuts: the split.
        rows: sizes of the tables, against which ids are checked.
    """

    def __init__(self, base: Sequence[EventFile], appended: Sequence[EventFile], cuts: Cuts, rows: TableRows) -> None:
        self._base, self._appended, self._files = base, appended, [*base, *appended]
        self._cuts, self._rows = cuts, rows
        self._counted: dict[int, _Int32] = {}

    def users(self, part: str, since: int | None = None) -> Ints:
        """Ascending ids of the users with an event in a part; since: with such an event from this second on."""
        p = SPLITS.index(part)
        start, end = self._starts[p], self._starts[p + 1]
        if since is not None:
            start = np.maximum(start, self.before(since))
        return np.flatnonzero(end > start)

    def heads(self, user_ids: Ints, part: str, since: int) -> RowHeads:
        """Length, start of the part and events before `since` (numbers) of the sequences of `user_ids` [R]."""
        p = SPLITS.index(part)
        found = (self._starts[p + 1], self._starts[p], self.before(since) if since else self._starts[0])
        lengths, target_start, before = (column[user_ids].astype(np.int64) for column in found)
        return RowHeads(user_ids, lengths, target_start, np.minimum(before, lengths))

    def read(self, user_ids: Ints, part: str, columns: Collection[str], skipped: Ints | None = None) -> Sequences:
        """The sequences of `user_ids` [R] to the end of a part; columns not in `columns` have their unknown value.

        skipped: [R] number of events at the start of each user's sequence to leave out.
        """
        p = SPLITS.index(part)
        users = np.asarray(user_ids, np.int64)
        lengths, target_start = self._starts[p + 1][users].astype(np.int64), self._starts[p][users].astype(np.int64)
        first = np.zeros_like(lengths) if skipped is None else np.minimum(skipped, lengths)
        merged = self._merged(users, columns, first, lengths)
        offsets = offsets_from_lengths(lengths - first)
        found = {
            column.name: merged[column.name]
            if column.name in columns
            else np.broadcast_to(np.array(column.unknown, column.dtype), offsets[-1])
            for column in EVENT_COLUMNS
        }
        extra = {column.name: merged[column.name] for column in self._rows.schema.extra if column.name in columns}
        rows = Sequences(**found, extra=extra, user_ids=users, target_start=target_start, offsets=offsets)
        return rows if skipped is None else replace(rows, skipped=first)

    def events_of(self, user_ids: Ints) -> tuple[Events, Ints]:
        """(all events of `user_ids` [R], grouped by user; number of events of each user [R])."""
        users = np.asarray(user_ids, np.int64)
        names, totals = [column.name for column in self._rows.schema.columns], self.totals(users)
        return Events.of_columns(self._merged(users, names, np.zeros_like(totals), totals)), totals

    def totals(self, users: Ints) -> Ints:
        """[R] number of events of each of `users` [R]."""
        return self._totals[users].astype(np.int64)

    def layout(self) -> tuple[Ints, Ints, Ints]:
        """(ascending ids of users with events [R], numbers of events [R], numbers of events before each cut [R, 2])."""
        users = np.flatnonzero(self._totals)
        starts = np.stack(self._starts[1:-1], axis=1)[users]
        return users, self._totals[users].astype(np.int64), starts.astype(np.int64)

    def item_counts(self, part: str) -> Ints:
        """Number of events of each item in a part, int64 [items]."""
        counts = np.zeros(self._rows.items, np.int64)
        if part == SPLITS[0] and self._cuts.seconds and not self._cuts.of_base:
            # The part consists of all events before a second, so they need not be merged by user.
            for events in (one.events for one in self._files if len(one)):
                before = events.item_ids[events.timestamps < self._cuts.seconds[0]]
                counts += np.bincount(before, minlength=counts.size)
            return counts
        users = self.users(part)
        for first in range(0, users.size, _USERS_AT_ONCE):
            rows = self.read(users[first : first + _USERS_AT_ONCE], part, ["item_ids"])
            counts += np.bincount(rows.item_ids[rows.own_events], minlength=self._rows.items)
        return counts

    # ------------------------------------------------------------------ files

    @cached_property
    def _base_of(self) -> NDArray[np.int16]:
        """[U] index of the base file that has the user, -1 if none has."""
        number_of = np.full(self._rows.users, -1, np.int16)
        for number, one in enumerate(self._base):
            number_of[one.user_ids] = number
        return number_of

    @cached_property
    def _in_order(self) -> bool:
        """True if, by the files' bounds, no event is earlier than any event of an earlier version."""
        bounds = [one.seconds for one in (*self._base[:1], *self._appended)]
        return all(a is not None and b is not None and a[1] <= b[0] for a, b in pairwise(bounds))

    def _merged(self, users: Ints, names: Collection[str], start: Ints, end: Ints) -> Columns:
        """The columns `names` of the events start [R] to end [R] - 1 of distinct `users` [R], grouped by user."""
        if (np.diff(users) <= 0).any():
            order = np.argsort(users)
            found = self._merged(users[order], names, start[order], end[order])
            place, lengths = np.argsort(order), end - start
            moved = concat_ranges((np.cumsum(lengths[order]) - lengths[order])[place], lengths)
            return {name: values[moved] for name, values in found.items()}
        base = self._base
        if len(base) > 1:  # the users of one call are in only a few of the base's files
            base = [base[number] for number in np.unique(self._base_of[users]) if number >= 0]
        return UserEvents([*base, *self._appended], users, self._rows, self._in_order).read(names, start, end)

    # ------------------------------------------------------------------ parts

    @cached_property
    def _starts(self) -> list[_Int32]:
        """Four arrays [U]: each user's number of events before train (0), before valid, before test, and in total."""
        total, cuts = self._totals, self._cuts
        if not cuts.seconds:
            starts = [column.astype(np.int32) for column in per_user_starts(cuts.rule, cuts.fractions, total)]
        elif cuts.of_base:
            starts = [self._before_cut(k, second) for k, second in enumerate(cuts.seconds)]
        else:
            starts = [self.before(second) for second in cuts.seconds]
        return [np.zeros_like(total), *starts, total]

    def _before_cut(self, k: int, second: int) -> _Int32:
        """[U] number of each user's events before cut k; for the base, the stored starts, which may divide a second."""
        of_appends = ((one, one.lengths_before(second)) for one in self._appended)
        return self._sums(chain(((one, one.starts[:, k]) for one in self._base), of_appends))

    @cached_property
    def _totals(self) -> _Int32:
        """[U] number of each user's events."""
        return self._sums((one, one.lengths) for one in self._files)

    def before(self, second: int) -> _Int32:
        """[U] number of each user's events before a second."""
        if second not in self._counted:
            # Normally most files end before this second, so only the later events of the other files are subtracted.
            counts = ((one, one.lengths_before(second)) for one in self._files)
            later = self._sums((one, one.lengths - count) for one, count in counts if count is not one.lengths)
            self._counted[second] = self._totals - later
        return self._counted[second]

    def _sums(self, counts: Iterable[tuple[EventFile, Ints]]) -> _Int32:
        """[U] sum over files of a number per row; counts: file, and [R] number of each of its rows."""
        found = np.zeros(self._rows.users, np.int32)
        for one, count in counts:
            if len(one):
                first, last = int(one.user_ids[0]), int(one.user_ids[-1])
                # A base normally has all users, so that its ids are a range.
                is_range = last - first < len(one)
                found[slice(first, last + 1) if is_range else one.user_ids] += count.astype(np.int32)
        return found
