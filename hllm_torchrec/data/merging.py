"""Merging of event files by user, in the order of (second, file, row).

The events of one user in one file are a segment. Normally a user's sequence is the concatenation of the user's segments
in the order of the files, and a range of the sequence is read without reading other events. If an event came late, this
is not the order of the seconds; then all events of the users are read and sorted.

Legend: R users, S segments, T events that are read.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.data.event_files import EventFile, check_columns
from hllm_torchrec.data.jagged_arrays import concat_ranges
from hllm_torchrec.data.validation import TableRows

Columns = dict[str, NDArray[Any]]
TIMES = "timestamps"


@dataclass(frozen=True)
class _Segments:
    """Segments by (user, file).

    place: [S] index of the user among the users that are read; file: [S] index of the file; first: [S] index of the
    segment's first event in the file; length: [S] number of events.
    """

    place: Ints
    file: Ints
    first: Ints
    length: Ints

    def between(self, start: Ints, end: Ints, lengths: Ints) -> "_Segments":
        """The segments cut to the events start [R] to end [R] - 1 of each user; lengths: [R] events of each user."""
        # before [S]: number of the user's events in earlier segments, which is the running sum over all segments minus
        # its value at the user's first segment.
        before = np.cumsum(self.length) - self.length - (np.cumsum(lengths) - lengths)[self.place]
        skipped = np.clip(start[self.place] - before, 0, self.length)
        kept = np.clip(end[self.place] - before, 0, self.length)
        own = kept > skipped
        return _Segments(self.place[own], self.file[own], (self.first + skipped)[own], (kept - skipped)[own])


class UserEvents:
    """The events of some users in several files.

    Args:
        files: in the order of the versions.
        users: [R] ascending.
        rows: sizes of the tables, against which ids are checked.
        in_order: True if it is known that no event of a file is earlier than an event of an earlier file.
    """

    def __init__(self, files: Sequence[EventFile], users: Ints, rows: TableRows, in_order: bool) -> None:
        found = [(file, *file.rows_of(users)) for file in files if len(file) and users.size]
        self._found = [one for one in found if one[1].size]
        self._rows = rows
        self._users = users.size
        self._segments = self._all_segments()
        self._in_order = in_order or len(self._found) < 2 or self._ascend()

    def _all_segments(self) -> _Segments:
        parts = [
            np.stack([places, np.full_like(own, number), file.offsets[own], file.lengths[own]])
            for number, (file, places, own) in enumerate(self._found)
        ]
        columns = np.concatenate([np.zeros((4, 0), np.int64), *parts], axis=1)
        if len(parts) > 1:
            columns = columns[:, np.argsort(columns[0], kind="stable")]
        return _Segments(*columns)

    def _ascend(self) -> bool:
        """True if, for each user, no segment begins before the end of the previous segment."""
        segments = self._segments
        first, last = np.empty_like(segments.place), np.empty_like(segments.place)
        for number, (file, _, _) in enumerate(self._found):
            own = segments.file == number
            first[own] = file.events.timestamps[segments.first[own]]
            last[own] = file.events.timestamps[segments.first[own] + segments.length[own] - 1]
        return not ((last[:-1] > first[1:]) & (segments.place[:-1] == segments.place[1:])).any()

    def read(self, names: Collection[str], start: Ints, end: Ints) -> Columns:
        """The columns `names` [T] of the events start [R] to end [R] - 1 of each user, grouped by user.

        Raises:
            ValueError: a value is not allowed; the message names file, row, column and value.
        """
        lengths = np.bincount(self._segments.place, self._segments.length, self._users).astype(np.int64)
        if self._in_order:
            chosen = self._segments.between(start, end, lengths)
            columns = self._gathered(chosen, names)
            self._check(columns, end - start)
            return columns
        columns = self._gathered(self._segments, {*names, TIMES})
        for number in range(len(self._found)):
            self._check_file(number, columns)
        owner = np.repeat(np.arange(self._users), lengths)
        order = np.argsort((owner << 32) | columns[TIMES], kind="stable")  # by user, then second; both are below 2^32
        order = order[concat_ranges(np.cumsum(lengths) - lengths + start, end - start)]
        return {name: values[order] for name, values in columns.items() if name in names}

    def _gathered(self, segments: _Segments, names: Collection[str]) -> Columns:
        """The columns `names` of the concatenated segments, in the columns' dtypes."""
        dtypes = {column.name: column.dtype for column in self._rows.schema.columns if column.name in names}
        if not self._found:
            return {name: np.empty(0, dtype) for name, dtype in dtypes.items()}
        if len(self._found) == 1:
            read = self._found[0][0].columns(_range(segments.first, segments.length), dtypes)
            return {name: read[name].astype(dtype, copy=False) for name, dtype in dtypes.items()}
        # Most events are in one file, normally the base. One index into this file gathers an event for every position;
        # the events that it finds at the few positions of other files are wrong, and are overwritten below.
        main = int(np.bincount(segments.file, segments.length, len(self._found)).argmax())
        index = concat_ranges(np.where(segments.file == main, segments.first, 0), segments.length)
        stored = self._found[main][0].columns(slice(None), dtypes)
        columns = {
            name: stored[name].take(index, mode="clip").astype(dtype, copy=False) for name, dtype in dtypes.items()
        }
        place = np.cumsum(segments.length) - segments.length
        for number, (file, _, _) in enumerate(self._found):
            own = np.flatnonzero(segments.file == number)
            if number != main and own.size:
                length = segments.length[own]
                places = concat_ranges(place[own], length)
                for name, values in file.columns(_range(segments.first[own], length), dtypes).items():
                    columns[name][places] = values
        return columns

    def _check(self, columns: Columns, lengths: Ints) -> None:
        """Raise ValueError for a value that is not allowed."""
        try:
            check_columns("merged events", columns, lengths, self._rows)
        except ValueError:
            for number in range(len(self._found)):
                self._check_file(number, columns)  # names the file and the row in it
            raise

    def _check_file(self, number: int, names: Collection[str]) -> None:
        file, _, own = self._found[number]
        file.check(own, names, self._rows)


def _range(first: Ints, length: Ints) -> slice | Ints:
    """The indices first[i], ..., first[i] + length[i] - 1 of all i; a slice if they are contiguous."""
    if first.size and (first[1:] == first[:-1] + length[:-1]).all():
        return slice(first[0], first[-1] + length[-1])
    return concat_ranges(first, length)
