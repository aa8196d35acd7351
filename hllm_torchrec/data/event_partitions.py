"""Partitions of events on disk, divided by user, so that memory is bounded by the size of a partition.

A partition holds all events of its users. It is written in source order while the source is read, then rewritten
once, sorted by (user, timestamp, source row) with user numbers instead of raw ids.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from hllm_torchrec.data.bad_rows import BadRowLog

BYTES_PER_PARTITION = 64 << 20
MAX_PARTITIONS = 256
_HASH_BASE = np.uint64(0x100000001B3)
_HASH_MIX = np.uint64(0xFF51AFD7ED558CCD)
_OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4")


def partition_count(event_bytes: int, compressed: bool) -> int:
    """Number of partitions for `event_bytes` of event files.

    It depends on the source only, not on the machine, because user ids follow the order of the partitions.
    """
    # 4: assumed ratio of uncompressed to compressed bytes; -(-a // b) rounds up.
    return int(np.clip(-(-event_bytes * (4 if compressed else 1) // BYTES_PER_PARTITION), 1, MAX_PARTITIONS))


class PartitionWriter:
    """Distributes the rows of tables over `count` Arrow streams in `folder` by a hash of `raw_user_id`."""

    def __init__(self, folder: Path, prefix: str, count: int) -> None:
        self._paths = [folder / f"{prefix}-{p:05d}.arrows" for p in range(count)]
        self._writers: list[pa.ipc.RecordBatchStreamWriter | None] = [None] * count

    def write(self, table: pa.Table) -> None:
        """Append each row of `table` to the partition of its user."""
        count = len(self._paths)
        if table.num_rows == 0:
            return
        if count == 1:
            self._append(0, table)
            return
        part = (hash_strings(table["raw_user_id"].combine_chunks()) % np.uint64(count)).astype(np.int64)
        # Stable, so that rows of a partition stay in source order, which `sort_partition` relies on for ties.
        table = table.take(np.argsort(part, kind="stable"))
        ends = np.cumsum(np.bincount(part, minlength=count))
        for p, (start, end) in enumerate(zip(np.concatenate([[0], ends[:-1]]), ends, strict=True)):
            if end > start:
                self._append(p, table.slice(start, end - start))

    def _append(self, p: int, table: pa.Table) -> None:
        writer = self._writers[p]
        if writer is None:
            writer = self._writers[p] = pa.ipc.new_stream(str(self._paths[p]), table.schema, options=_OPTIONS)
        writer.write_table(table)

    def close(self) -> list[Path]:
        """Close the streams; return the paths, one per partition (a partition without rows has no file)."""
        for writer in self._writers:
            if writer is not None:
                writer.close()
        return self._paths


def read_stream(path: Path, columns: Sequence[str] | None = None) -> pa.Table | None:
    """The table of an Arrow stream, or its named columns; None if the file does not exist."""
    if not path.exists():
        return None
    with pa.OSFile(str(path)) as file:
        if columns is None:
            return pa.ipc.open_stream(file).read_all()
        # The reader selects columns by index only, so the schema is read first and the file rewound.
        names = pa.ipc.read_schema(file).names
        file.seek(0)
        options = pa.ipc.IpcReadOptions(included_fields=[names.index(name) for name in columns])
        return pa.ipc.open_stream(file, options=options).read_all()


def hash_strings(values: pa.Array) -> np.ndarray:
    """Hash (uint64 [n]) of each string's bytes, the same in every process: polynomial, then mixed.

    hash = mix(sum_k (byte_k + 1) * base^(k + 1)) modulo 2^64. `values` has no null and no empty string. Vectorized,
    since it runs over every event.
    """
    # Arrow's string layout: buffer 1 holds int32 offsets, buffer 2 the bytes. A sliced array shares both, so its own
    # offsets begin at `values.offset` and need not start at 0.
    offsets = np.frombuffer(values.buffers()[1], np.int32)[values.offset : values.offset + len(values) + 1]
    data = np.frombuffer(values.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]
    starts, lengths = offsets[:-1] - offsets[0], np.diff(offsets)
    assert len(values) == 0 or lengths.min() > 0, "an empty string"
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is intended
        powers = np.cumprod(np.full(int(lengths.max(initial=0)), _HASH_BASE, np.uint64))
        place = np.arange(len(data)) - np.repeat(starts, lengths)
        # reduceat sums from each start to the next one; an empty string would give a wrong sum, hence the assertion.
        sums = np.add.reduceat((data.astype(np.uint64) + np.uint64(1)) * powers[place], starts)
        # Drop the low bits, which depend on few bits of the sum, because callers take a remainder.
        return (sums ^ (sums >> np.uint64(33))) * _HASH_MIX >> np.uint64(20)


def sort_partition(table: pa.Table, first_user: int, log: BadRowLog, locate: "RowLocator") -> tuple[pa.Table, pa.Array]:
    """Sort one partition by (user, timestamp, order) and apply the policy for duplicate events.

    Args:
        table: has the columns `raw_user_id` and `order` and the columns of the dataset's events, of which `item` int64
            is an item number; its rows are sorted by `order`.
        first_user: number of the partition's first user.

    Returns:
        The table with `user` int64 (numbers from `first_user` on, in order of first appearance) instead of
        `raw_user_id`, and the raw ids of these users.

    Raises:
        ValueError: a duplicate event, if the policy is "error".
    """
    users = table["raw_user_id"].combine_chunks().dictionary_encode()
    user = users.indices.to_numpy().astype(np.int64)
    item, time, order = (table[name].to_numpy() for name in ("item", "timestamp", "order"))
    sort = np.lexsort((time, user))  # stable, so ties keep the order of the source
    repeated = _repeated(user[sort], time[sort], item[sort])
    if repeated.any():
        # Report the first duplicate in the order of the source; the table is now sorted by user number.
        first = sort[repeated][np.argmin(order[sort][repeated])]
        path, row = locate(int(order[first]))
        problem = f"user {users.dictionary[int(user[first])]} has this item in this second already"
        if log.handle("duplicate_event", repeated, path, np.full(len(repeated), row), lambda _: problem):
            sort = sort[~repeated]
    columns = {"user": pa.array(user[sort] + first_user)}
    for name in table.column_names[1:]:
        columns[name] = table[name].combine_chunks().take(pa.array(sort))
    return pa.table(columns), users.dictionary


def _repeated(user: np.ndarray, time: np.ndarray, item: np.ndarray) -> np.ndarray:
    """Mask (bool [n]) of events, sorted by (user, time), that repeat an earlier one's user, second and item."""
    repeated = np.zeros(len(user), bool)
    # same_second[i]: event i continues the (user, second) run of event i - 1. False at both ends.
    same_second = np.zeros(len(user) + 1, bool)
    same_second[1:-1] = (np.diff(user) == 0) & (np.diff(time) == 0)
    shared = np.flatnonzero(same_second[1:] | same_second[:-1])  # events that share user and second
    if len(shared):
        run = np.cumsum(~same_second[:-1])[shared]
        # Within a run, sort by item: repetitions become neighbours. lexsort is stable, so the first stays unmarked.
        by_item = np.lexsort((item[shared], run))
        again = (np.diff(run[by_item]) == 0) & (np.diff(item[shared][by_item]) == 0)
        repeated[shared[by_item[1:][again]]] = True
    return repeated


class RowLocator:
    """Maps the running number of a source row back to its file and row.

    An event's `order` is its row number plus the rows of all files before, so that sorting by it gives the order of
    the source.
    """

    def __init__(self) -> None:
        self._starts: list[tuple[int, Path]] = []
        self._next = 0

    def orders(self, path: Path, rows: np.ndarray) -> np.ndarray:
        """The orders (int64 [n]) of `rows` of `path`; all chunks of a file must come before the next file."""
        if not self._starts or self._starts[-1][1] != path:
            self._starts.append((self._next, path))
        orders = self._starts[-1][0] + rows
        self._next = int(orders[-1]) + 1 if len(orders) else self._next
        return orders

    def __call__(self, order: int) -> tuple[Path, int]:
        """File and row of `order`."""
        start, path = next((s, p) for s, p in reversed(self._starts) if s <= order)
        return path, order - start


class SortedPartitions:
    """The sorted partitions on disk, read one at a time.

    `alive_users` and `alive_items` (bool, by number): only events of these users and items are read; None: all events.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.alive_users: np.ndarray | None = None
        self.alive_items: np.ndarray | None = None

    def __iter__(self) -> Iterator[pa.Table]:
        """Iterate over the partitions, without the events that the masks filter out."""
        return self._read(None)

    def _read(self, columns: Sequence[str] | None) -> Iterator[pa.Table]:
        for path in self.paths:
            if self.alive_users is None or self.alive_items is None:
                yield read_stream(path, columns)
                continue
            # The masks need `user` and `item`, even if the caller does not ask for them.
            table = read_stream(path, columns and list(dict.fromkeys(["user", "item", *columns])))
            assert table is not None, path
            user, item = table["user"].to_numpy(), table["item"].to_numpy()
            yield table.filter(pa.array(self.alive_users[user] & self.alive_items[item]))

    def counts(self, num_users: int, num_items: int) -> tuple[np.ndarray, np.ndarray]:
        """Number of events per user [num_users] and per item [num_items] after the masks, int64."""
        users, items = np.zeros(num_users, np.int64), np.zeros(num_items, np.int64)
        for table in self._read(["user", "item"]):
            users += np.bincount(table["user"].to_numpy(), minlength=num_users)
            items += np.bincount(table["item"].to_numpy(), minlength=num_items)
        return users, items

    def times(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(timestamps, orders) of each partition, for `split.find_cut`."""
        for table in self._read(["timestamp", "order"]):
            yield table["timestamp"].to_numpy(), table["order"].to_numpy()


def write_sorted(path: Path, table: pa.Table) -> None:
    """Write one partition as an Arrow stream."""
    with pa.ipc.new_stream(str(path), table.schema, options=_OPTIONS) as writer:
        writer.write_table(table)


def core_filter(
    partitions: SortedPartitions, counts: tuple[np.ndarray, np.ndarray], k: int, *, iterative: bool
) -> None:
    """Keep users and items with at least `k` events, by setting the masks of `partitions`.

    `counts` are the current events per user and per item. Iterative: the k-core, repeated until nothing changes.
    Otherwise the single pass of the published Books protocol (HLLM, HSTU): items and users by their counts in the
    complete data, then users once more, so that an item may end with fewer than k events.
    """
    users, items = counts
    while True:
        before = int(users.sum())
        partitions.alive_users, partitions.alive_items = users >= k, items >= k
        users, items = partitions.counts(len(users), len(items))
        if not iterative:
            partitions.alive_users = users >= k
            return
        # Each round only removes events, so an unchanged total means that the masks are stable.
        if int(users.sum()) == before:
            return
