"""Pairing of the rows of several models' prediction files, which may be in any order, by user and position.

Every rank reads a share of each model's files and sends each row to the rank of its user. That rank puts the row into
one of a few buckets, in memory up to a share of the limit and otherwise on disk. Each bucket is then loaded and sorted.

Legend: n rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from hllm_torchrec.common.hashing import hash_columns
from hllm_torchrec.distributed.array_collectives import all_to_all, group_rank, in_step, world_size
from hllm_torchrec.evaluation.prediction_files import RowReader, identities

PAIR_COLUMNS = ("user_id", "position")
"""Key of an exposure in the prediction files of this library."""

ROW = "__row"
"""Column with the row's number in its model's files, for messages."""

READ_ROWS = 1 << 18
HELD = 8
"""Buckets in memory take at most 1 / HELD of the limit."""

BUCKET_FACTOR = 8
"""Factor from a bucket's size to the memory for reading it (parts, order, sorted copy), with a margin of 2."""

Tables = dict[str, tuple[pa.Table, np.ndarray]]
"""Model → (rows, their row numbers in the model's files [n])."""


class PairedTables:
    """The rows of all models for this rank's users, sorted by user and position; built by a shuffle over the ranks."""

    def __init__(self, readers: Mapping[str, RowReader], memory: int, folder: Path):
        """Read and shuffle. Collective.

        Args:
            readers: model → its files, whose columns include `PAIR_COLUMNS`; the first model is the reference.
            memory: bytes for rows on a rank.
            folder: directory for rows that do not fit.

        Raises:
            ValueError: a file cannot be read; raised on every rank.
        """
        for reader in readers.values():
            _check_keys(reader)
        self._readers, self._folder = readers, folder
        self._limit, self._held = memory // HELD, 0
        # About 8 bytes per value; the number of buckets is such that one bucket of all models fits into the memory.
        size = sum(reader.rows * 8 * len(reader.columns) for reader in readers.values()) // world_size()
        self._count = 1 + size * BUCKET_FACTOR // max(memory, 1)
        self._parts: dict[tuple[str, int], list[pa.Table]] = {}
        self.spilled = 0
        for name, reader in readers.items():
            for table in in_step(self._read(reader)):
                self._receive(name, table)

    def batches(self, size: int) -> Iterator[tuple[int, Tables]]:
        """Yield this rank's exposures, sorted by user and position within a bucket, at most `size` at a time.

        Each part is (index of its first exposure in the bucket, tables). After the last part, nothing is left in memory
        or on disk.

        Raises:
            ValueError: a model has an exposure twice, or only some of the models have it.
        """
        first, *others = self._readers
        for bucket in range(self._count):
            tables, keys = {}, {}
            for name in self._readers:
                tables[name], keys[name] = self._sorted(name, bucket)
            # Users are assigned to ranks and buckets by hash, so equal exposures give equal sorted keys in each bucket.
            if any(not np.array_equal(keys[first], keys[other]) for other in others):
                raise ValueError(self._difference(first, others))
            for start in range(0, keys[first].shape[1], size):
                parts = {name: table.slice(start, size) for name, table in tables.items()}
                yield (
                    start,
                    {name: (part.drop_columns([ROW]), part[ROW].to_numpy()) for name, part in parts.items()},
                )
        self._remove()

    def _read(self, reader: RowReader) -> Iterator[pa.Table]:
        """Yield this rank's share of a model's rows, with row numbers."""
        rank, ranks = group_rank(), world_size()
        low, high = reader.rows * rank // ranks, reader.rows * (rank + 1) // ranks
        for table in reader.batches(low, high, READ_ROWS):
            for column in PAIR_COLUMNS:
                if table[column].null_count:
                    place = reader.locate(low + int(table[column].is_null().to_numpy().argmax()))
                    raise ValueError(f"{place}: column {column!r} is null; it is part of the key; remove the row")
            yield table.append_column(ROW, pa.array(np.arange(low, low + len(table))))
            low += len(table)

    def _receive(self, name: str, table: pa.Table | None) -> None:
        """Send rows (None: no more rows) to the ranks of their users, and store the received rows. Collective."""
        ranks = world_size()
        arrived = [table] if table is not None else []
        if ranks > 1:
            arrived = _exchange(table, ranks)
        for part in arrived:
            # The bucket depends on the quotient of the hash, because all rows of a rank have the same remainder.
            bucket = _spread(part) // np.uint64(ranks) % np.uint64(self._count)
            for index, rows in _grouped(bucket.astype(np.int64), self._count):
                self._keep(name, index, part if self._count == 1 else part.take(rows))

    def _keep(self, name: str, bucket: int, table: pa.Table) -> None:
        if self._held + table.nbytes <= self._limit:
            self._held += table.nbytes
            self._parts.setdefault((name, bucket), []).append(table)
            return
        # Appends a complete Arrow stream; `_streams` reads the streams of a file one after the other.
        with self._path(name, bucket).open("ab") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
        self.spilled += table.nbytes

    def _remove(self) -> None:
        self._parts.clear()
        for bucket in range(self._count):
            for name in self._readers:
                self._path(name, bucket).unlink(missing_ok=True)

    def _path(self, name: str, bucket: int) -> Path:
        return self._folder / f"paired-{list(self._readers).index(name)}-{bucket}"

    def _load(self, name: str, bucket: int) -> pa.Table | None:
        parts = list(self._parts.get((name, bucket), []))
        if (path := self._path(name, bucket)).exists():
            with pa.OSFile(str(path)) as file:
                parts += _streams(file)
        return pa.concat_tables(parts, promote_options="permissive") if parts else None

    def _sorted(self, name: str, bucket: int) -> tuple[pa.Table, np.ndarray]:
        """A model's rows of a bucket sorted by key, and the keys [2, n]."""
        table = self._load(name, bucket)
        if table is None:
            return pa.table({ROW: np.empty(0, np.int64)}), np.empty((2, 0), np.int64)
        keys = np.stack([identities(table[column]) for column in PAIR_COLUMNS])
        order = np.lexsort(keys[::-1])  # lexsort's last key is the primary one: user, then position
        keys = keys[:, order]
        repeated = (keys[:, 1:] == keys[:, :-1]).all(axis=0)
        if repeated.any():
            place = int(repeated.argmax())
            again = max(table[ROW].take(pa.array(order[place : place + 2])).to_pylist())
            raise ValueError(
                f"{self._readers[name].locate(again)}: an exposure is repeated, one of {int(repeated.sum())}: "
                f"{_describe(keys[:, place].tolist())}; each may appear once; empty the directory and predict again"
            )
        return table.combine_chunks().take(pa.array(order)), keys

    def _difference(self, first: str, others: Sequence[str]) -> str:
        """Message for the first model whose exposures differ from the reference's on this rank."""
        for other in others:
            missing, extra, total, example = 0, 0, 0, None
            for bucket in range(self._count):
                wanted, own = (set(zip(*self._sorted(name, bucket)[1].tolist())) for name in (first, other))
                missing, extra, total = missing + len(wanted - own), extra + len(own - wanted), total + len(wanted)
                example = min([*(wanted ^ own), *([example] if example else [])], default=None)
            if example:
                here = f" (on rank {group_rank()})" if world_size() > 1 else ""
                return (
                    f"the predictions of {other!r} miss {missing} of the {total} exposures of {first!r} and have "
                    f"{extra} that {first!r} misses{here}, for example {_describe(example)}; all models must score the "
                    "same exposures; predict with each on the same dataset and split"
                )
        raise AssertionError("called where exposures differ")


def _check_keys(reader: RowReader) -> None:
    for file, schema in zip(reader.files, reader.schemas):
        for column in PAIR_COLUMNS:
            kind = schema.field(column).type
            if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise ValueError(
                    f"{file}: column {column!r} is {kind}; it must hold whole numbers or text; predict again"
                )


def _describe(key: Sequence[int]) -> str:
    return ", ".join(f"{column} {value}" for column, value in zip(PAIR_COLUMNS, key))


def _spread(table: pa.Table) -> np.ndarray:
    """Hash of each row's user, uint64 [n]; the hash by which `UserBuckets` assigns users to ranks."""
    return hash_columns(identities(table[PAIR_COLUMNS[0]]))


def _grouped(places: np.ndarray, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (place, indices of its rows) for each place in 0..count-1 that has rows."""
    order = np.argsort(places, kind="stable")
    cuts = np.searchsorted(places[order], np.arange(count + 1))
    for place in range(count):
        if cuts[place] < cuts[place + 1]:
            yield place, order[cuts[place] : cuts[place + 1]]


def _exchange(table: pa.Table | None, ranks: int) -> list[pa.Table]:
    """Exchange rows: returns the rows of all ranks for the users of this rank. Collective."""
    # A rank without rows sends empty messages: `all_to_all` needs every rank.
    messages = [b""] * ranks
    if table is not None:
        owner = (_spread(table) % np.uint64(ranks)).astype(np.int64)
        for rank, rows in _grouped(owner, ranks):
            messages[rank] = _as_bytes(table.take(rows))
    sent = np.frombuffer(b"".join(messages), np.uint8).copy()
    received = all_to_all(sent, [len(message) for message in messages])
    return _streams(pa.BufferReader(pa.py_buffer(received)))


def _as_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return bytes(sink.getvalue())


def _streams(source: pa.NativeFile) -> list[pa.Table]:
    """Read concatenated Arrow streams, one table each."""
    found, size = [], source.size()
    while source.tell() < size:
        with pa.ipc.open_stream(source) as stream:
            found.append(stream.read_all())
    return found
