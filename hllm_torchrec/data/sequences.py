"""`SequenceWriter`: writes the sequences of a base.

`sequences/{train,valid,test}/part-*.parquet` have one row per user of the part: the history to the part's end;
`events/part-*.arrow` have all events of each user once.

Legend: N events of a partition, sorted by (user, timestamp, source row); U users of the partition.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hllm_torchrec.data.bad_rows import MAX_SECOND
from hllm_torchrec.data.event_files import write_event_file
from hllm_torchrec.data.event_schema import EventSchema
from hllm_torchrec.data.events import Events, sequence_schema
from hllm_torchrec.data.jagged_arrays import concat_ranges, offsets_from_lengths
from hllm_torchrec.data.manifest import EVENTS
from hllm_torchrec.data.split import SPLITS, Cut, Split, assign_splits

GROUPS_AT_LEAST = 32


class SequenceWriter:
    """Writes the sequences partition by partition below `root` and counts the contents of each part.

    schema: the declared columns of events; None: no declared columns.

    parquet: False writes no Parquet files; used for the base of a later version, which is read from its event files.

    `facts[part]` has the numbers `users`, `events` (of the part, without the history before it), `exposures` (events
    with a label), `positives` (label > 0.5) and `files` (partitions with an event of the part). `seconds` are the
    seconds of the first and the last event.
    `item_counts` (int64 [items + 1]) counts training events by item id. Training events whose item is in `held_out`
    (bool [items + 1]) are removed from all parts, and counted in `held_out_events`.
    """

    def __init__(
        self,
        root: Path,
        split: Split,
        cuts: Sequence[Cut],
        held_out: np.ndarray,
        users_per_row_group: int,
        parquet: bool = True,
        schema: EventSchema | None = None,
    ) -> None:
        self._columns = (schema or EventSchema()).columns
        self._parquet, self.seconds = parquet, (MAX_SECOND, 0)
        self._root, self._split, self._cuts, self._held_out = root, split, cuts, held_out
        self.held_out_events = self.event_files = 0
        self._users_per_row_group = users_per_row_group
        self.facts = {p: {"users": 0, "events": 0, "exposures": 0, "positives": 0, "files": 0} for p in SPLITS}
        self.item_counts = np.zeros(len(held_out), np.int64)
        for part in SPLITS if parquet else ():
            (root / "sequences" / part).mkdir(parents=True)

    def write(self, table: pa.Table, user_ids: np.ndarray, item_ids: np.ndarray) -> None:
        """Write one partition of `SortedPartitions`; `user_ids` and `item_ids` map numbers to final ids."""
        user = table["user"].to_numpy()
        if len(user) == 0:
            return
        counts = np.diff(np.append(_starts(user), len(user)))
        part = assign_splits(self._split, self._cuts, table["timestamp"].to_numpy(), table["order"].to_numpy(), counts)
        items = item_ids[table["item"].to_numpy()]
        # Assign the parts before this filter, so that removing held-out items does not move other events between parts.
        kept = ~(self._held_out[items] & (part == 0))
        if not kept.all():
            self.held_out_events += int((~kept).sum())
            table, user, part, items = table.filter(pa.array(kept)), user[kept], part[kept], items[kept]
            if len(user) == 0:
                return
        starts = _starts(user)
        assert items.min() > 0, "an event of an item that was left out"
        columns = {c.name: table[c.single].combine_chunks() for c in self._columns} | {"item_ids": pa.array(items)}
        # in_part[p, u]: events of user u in part p. A user's events are sorted by part, so the running sum over parts
        # is the length of the history up to the end of each part.
        in_part = np.stack([np.add.reduceat((part == p).astype(np.int64), starts) for p in range(len(SPLITS))])
        ends = np.cumsum(in_part, axis=0)
        for p, name in enumerate(SPLITS):
            chosen = np.flatnonzero(in_part[p])
            self._count(name, len(chosen), columns["labels"].filter(pa.array(part == p)))
            if len(chosen) == 0 or not self._parquet:
                continue
            # A row is the history from the user's first event; `target_start` separates earlier parts from this one.
            lengths = ends[p][chosen]
            head = {"user_id": user_ids[user[starts[chosen]]], "target_start": lengths - in_part[p][chosen]}
            self._write_file(name, head, columns, starts[chosen], lengths)
        self._write_events(user_ids[user[starts]], ends, columns)
        self.item_counts += np.bincount(items[part == 0], minlength=len(self.item_counts))

    def _write_events(self, user_ids: np.ndarray, ends: np.ndarray, columns: dict[str, pa.Array]) -> None:
        """Write the event file of a partition; ends: [parts, U] events of each user up to the end of each part."""
        events = Events.of_columns({name: column.to_numpy(zero_copy_only=False) for name, column in columns.items()})
        path = self._root / EVENTS / f"part-{self.event_files:05d}.arrow"
        write_event_file(path, user_ids, ends[-1], events, ends[:-1].T)
        self.event_files += 1
        times = events.timestamps
        self.seconds = (min(self.seconds[0], int(times.min())), max(self.seconds[1], int(times.max())))

    def _count(self, name: str, users: int, labels: pa.Array) -> None:
        values = labels.fill_null(0).to_numpy(zero_copy_only=False)
        facts = self.facts[name]
        facts["users"] += users
        facts["events"] += len(labels)
        facts["exposures"] += len(labels) - labels.null_count
        facts["positives"] += int((values > 0.5).sum())
        facts["files"] += users > 0

    def _write_file(
        self,
        part: str,
        head: dict[str, np.ndarray],
        columns: dict[str, pa.Array],
        starts: np.ndarray,
        lengths: np.ndarray,
    ) -> None:
        """Write one Parquet file of len(starts) rows; row i holds `lengths[i]` events from starts[i] on."""
        index, limits = pa.array(concat_ranges(starts, lengths)), pa.array(offsets_from_lengths(lengths), pa.int32())
        lists = {name: pa.ListArray.from_arrays(limits, column.take(index)) for name, column in columns.items()}
        table = pa.table({**head, **lists}).cast(sequence_schema(self._columns))
        path = self._root / "sequences" / part / f"part-{self.facts[part]['files'] - 1:05d}.parquet"
        # Small datasets get smaller row groups, so that every rank and worker has row groups to read.
        group = min(self._users_per_row_group, -(-len(starts) // GROUPS_AT_LEAST))
        pq.write_table(table, path, row_group_size=group, compression="zstd", use_dictionary=False)


def _starts(user: np.ndarray) -> np.ndarray:
    """Index of each user's first event [U]; user: [N], N > 0, sorted by user."""
    return np.concatenate([[0], np.flatnonzero(np.diff(user)) + 1])
