"""The rows of several models' prediction files, in any order, brought together by user and position.

Every rank reads a share of each model's files and sends each row to the rank of its user, which keeps it in one of a
few buckets: in memory up to a share of the limit, beyond that on disk. A bucket is then sorted and read as a whole.

Letters: n rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from hllm_torchrec.common.hashing import hash_columns
from hllm_torchrec.distributed.array_collectives import Group, all_to_all, group_rank, in_step, world_size
from hllm_torchrec.evaluation.prediction_files import RowReader, identities

PAIR_COLUMNS = ("user_id", "position")
"""What names an exposure in the files that our jobs write."""

ROW = "__row"
"""Column with the row's number in its model's files, for messages."""

READ_ROWS = 1 << 18
HELD = 8
"""Buckets in memory take at most an eighth of the limit."""

BUCKET_BYTES = 8
"""Memory that reading a bucket needs (its parts, their order, the sorted copy), in times its size, times two."""

Tables = dict[str, tuple[pa.Table, np.ndarray]]
"""Model → rows, and their numbers in the model's files [n]."""


class PairedTables:
    """Rows of all models by user and position, those of this rank's users; made by a shuffle over the ranks."""

    def __init__(self, readers: Mapping[str, RowReader], memory: int, folder: Path, group: Group = None):
        """Read and shuffle. Collective.

        Args:
            readers: model → its files, whose columns include `PAIR_COLUMNS`; the first model is the reference.
            memory: bytes for rows on a rank.
            folder: for what does not fit.

        Raises:
            ValueError: files that cannot be read, on every rank.
        """
        for reader in readers.values():
            _check_keys(reader)
        self._readers, self._folder, self._group = readers, folder, group
        self._limit, self._held = memory // HELD, 0
        size = sum(reader.rows * 8 * len(reader.columns) for reader in readers.values()) // world_size(group)
        self._count = 1 + size * BUCKET_BYTES // max(memory, 1)
        self._parts: dict[tuple[str, int], list[pa.Table]] = {}
        self.spilled = 0
        for name, reader in readers.items():
            for table in in_step(self._read(reader), group):
                self._receive(name, table)

    def batches(self, size: int) -> Iterator[Tables]:
        """This rank's exposures, in the order of user and position within a bucket, `size` at most at a time.

        Raises:
            ValueError: an exposure that a model has twice, or that only some of the models have.
        """
        first, *others = self._readers
        for bucket in range(self._count):
            tables, keys = {}, {}
            for name in self._readers:
                tables[name], keys[name] = self._sorted(name, bucket)
            if any(not np.array_equal(keys[first], keys[other]) for other in others):
                raise ValueError(self._difference(first, others))
            for start in range(0, keys[first].shape[1], size):
                parts = {name: table.slice(start, size) for name, table in tables.items()}
                yield {name: (part.drop_columns([ROW]), part[ROW].to_numpy()) for name, part in parts.items()}

    def _read(self, reader: RowReader) -> Iterator[pa.Table]:
        """This rank's share of a model's rows, numbered."""
        rank, ranks = group_rank(self._group), world_size(self._group)
        low, high = reader.rows * rank // ranks, reader.rows * (rank + 1) // ranks
        for table in reader.batches(low, high, READ_ROWS):
            for column in PAIR_COLUMNS:
                if table[column].null_count:
                    place = reader.locate(low + int(table[column].is_null().to_numpy().argmax()))
                    raise ValueError(f"{place}: column {column!r} is null; it names the exposure; leave the row out")
            yield table.append_column(ROW, pa.array(np.arange(low, low + len(table))))
            low += len(table)

    def _receive(self, name: str, table: pa.Table | None) -> None:
        """Send rows (None: there are no more) to the ranks of their users, and keep what comes. Collective."""
        ranks = world_size(self._group)
        arrived = [table] if table is not None else []
        if ranks > 1:
            arrived = _exchange(table, ranks, self._group)
        for part in arrived:
            bucket = _spread(part) // np.uint64(ranks) % np.uint64(self._count)
            for index, rows in _grouped(bucket.astype(np.int64), self._count):
                self._keep(name, index, part if self._count == 1 else part.take(rows))

    def _keep(self, name: str, bucket: int, table: pa.Table) -> None:
        if self._held + table.nbytes <= self._limit:
            self._held += table.nbytes
            self._parts.setdefault((name, bucket), []).append(table)
            return
        with self._path(name, bucket).open("ab") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
        self.spilled += table.nbytes

    def _path(self, name: str, bucket: int) -> Path:
        return self._folder / f"paired-{list(self._readers).index(name)}-{bucket}"

    def _load(self, name: str, bucket: int) -> pa.Table | None:
        parts = list(self._parts.get((name, bucket), []))
        if (path := self._path(name, bucket)).exists():
            with pa.OSFile(str(path)) as file:
                parts += _streams(file)
        return pa.concat_tables(parts, promote_options="permissive") if parts else None

    def _sorted(self, name: str, bucket: int) -> tuple[pa.Table, np.ndarray]:
        """A bucket's rows of a model in the order of their keys, and the keys [2, n]."""
        table = self._load(name, bucket)
        if table is None:
            return pa.table({ROW: np.empty(0, np.int64)}), np.empty((2, 0), np.int64)
        keys = np.stack([identities(table[column]) for column in PAIR_COLUMNS])
        order = np.lexsort(keys[::-1])
        keys = keys[:, order]
        repeated = (keys[:, 1:] == keys[:, :-1]).all(axis=0)
        if repeated.any():
            place = int(repeated.argmax())
            again = max(table[ROW].take(pa.array(order[place : place + 2])).to_pylist())
            raise ValueError(
                f"{self._readers[name].locate(again)}: an exposure appears again, as {int(repeated.sum())} do: "
                f"{_describe(keys[:, place].tolist())}; each may appear once; empty the directory and predict again"
            )
        return table.combine_chunks().take(pa.array(order)), keys

    def _difference(self, first: str, others: Sequence[str]) -> str:
        """What is wrong with the first model that has other exposures than the reference, on this rank."""
        for other in others:
            missing, extra, total, example = 0, 0, 0, None
            for bucket in range(self._count):
                wanted, own = (set(zip(*self._sorted(name, bucket)[1].tolist())) for name in (first, other))
                missing, extra, total = missing + len(wanted - own), extra + len(own - wanted), total + len(wanted)
                example = min([*(wanted ^ own), *([example] if example else [])], default=None)
            if example:
                here = f" (on rank {group_rank(self._group)})" if world_size(self._group) > 1 else ""
                return (
                    f"the predictions of {other!r} miss {missing} of the {total} exposures of {first!r} and have "
                    f"{extra} that it misses{here}, for example {_describe(example)}; all models must score the same "
                    "exposures; predict with each on the same dataset and split"
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
    """A hash of each row's user, uint64 [n]: the same as `UserBuckets` deals users out by."""
    return hash_columns(identities(table[PAIR_COLUMNS[0]]))


def _grouped(places: np.ndarray, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """(place, its rows) of each of 0..count-1 that has any."""
    order = np.argsort(places, kind="stable")
    cuts = np.searchsorted(places[order], np.arange(count + 1))
    for place in range(count):
        if cuts[place] < cuts[place + 1]:
            yield place, order[cuts[place] : cuts[place + 1]]


def _exchange(table: pa.Table | None, ranks: int, group: Group) -> list[pa.Table]:
    """What all ranks have for the users of this one. Collective."""
    messages = [b""] * ranks
    if table is not None:
        owner = (_spread(table) % np.uint64(ranks)).astype(np.int64)
        for rank, rows in _grouped(owner, ranks):
            messages[rank] = _as_bytes(table.take(rows))
    sent = np.frombuffer(b"".join(messages), np.uint8).copy()
    received = all_to_all(sent, [len(message) for message in messages], group)
    return _streams(pa.BufferReader(pa.py_buffer(received)))


def _as_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return bytes(sink.getvalue())


def _streams(source: pa.NativeFile) -> list[pa.Table]:
    """The tables of Arrow streams one after the other."""
    found, size = [], source.size()
    while source.tell() < size:
        with pa.ipc.open_stream(source) as stream:
            found.append(stream.read_all())
    return found
