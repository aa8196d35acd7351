"""`UserTable`: user ids and `users.parquet` during preparation of a dataset."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.event_partitions import read_stream
from hllm_torchrec.data.item_catalogue import FEATURE_TYPE, Vocabulary, decode_feature


class UserTable:
    """Numbers users by partition and assigns final ids; users of an existing dataset keep their ids.

    `raw_ids[p]` are the raw ids of partition p. A user's *number* is its index, from 0, in the concatenation of all
    partitions.
    """

    def __init__(self, old: Dataset | None) -> None:
        self.raw_ids: list[pa.Array] = []
        self._old = None if old is None else old.users
        self._dataset = old
        self.final_ids = np.zeros(0, np.int64)
        self.without_features = 0
        self.without_events = 0

    def __len__(self) -> int:
        """Number of users with an event, before any filter."""
        return sum(len(raw) for raw in self.raw_ids)

    @property
    def existing(self) -> int:
        """Number of users of the existing dataset."""
        return 0 if self._old is None else len(self._old)

    @property
    def total(self) -> int:
        """Number of final ids."""
        return max(int(self.final_ids.max(initial=0)), self.existing)

    def float_spelling(self) -> tuple[str, str] | None:
        """(an id, the same id written as a float), of which at least one is new; None if there is no such pair."""
        new = pa.chunked_array(self.raw_ids, pa.string())
        old = pa.chunked_array([], pa.string()) if self._old is None else self._old["raw_user_id"]
        every = pa.chunked_array([*new.chunks, *old.chunks], pa.string())
        floats = every.filter(pc.match_substring(every, ".0"))  # much faster than the regular expression
        floats = floats.filter(pc.match_substring_regex(floats, r"^-?\d+\.0+$")).combine_chunks()
        if not len(floats):
            return None
        whole = pc.replace_substring_regex(floats, r"\.0+$", "")
        in_old = [pc.is_in(ids, value_set=old.combine_chunks()) for ids in (whole, floats)]
        pairs = pc.and_not(pc.is_in(whole, value_set=every.combine_chunks()), pc.and_(*in_old))
        at = pc.index(pairs, True).as_py()
        return None if at < 0 else (str(whole[at]), str(floats[at]))

    def assign_ids(self, event_counts: np.ndarray) -> np.ndarray:
        """Assign final ids (int64, by user number; 0: dropped). event_counts: by user number, after all filters."""
        known = np.zeros(len(self), np.int64)
        if self._old is not None:
            known = known_ids(self._old["raw_user_id"], pa.chunked_array(self.raw_ids, pa.string()))
        new = (known == 0) & (event_counts > 0)
        self.final_ids = np.where(new, self.existing + np.cumsum(new), known)
        return self.final_ids

    def write(self, path: Path, feature_files: list[Path], vocabularies: dict[str, Vocabulary]) -> None:
        """Write `users.parquet` sorted by id; feature values in the source replace those of existing users."""
        start, tables = 0, self._old_tables(vocabularies)
        writer: pq.ParquetWriter | None = None
        for raw, file in zip(self.raw_ids, feature_files, strict=True):
            ids = self.final_ids[start : start + len(raw)]
            start += len(raw)
            table = self._partition_table(raw, ids, file, vocabularies)
            # New ids ascend through the partitions, so a new dataset is written as a stream. Existing ids do not, so an
            # extended dataset's users are joined and sorted in memory.
            if self._old is not None:
                tables.append(table)
            elif len(table):
                writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
                writer.write_table(table)
        if self._old is not None:
            pq.write_table(
                _latest_by_id(tables, [f"feature_{name}" for name in vocabularies]), path, compression="zstd"
            )
        elif writer is not None:
            writer.close()

    def _partition_table(
        self, raw: pa.Array, ids: np.ndarray, file: Path, vocabularies: dict[str, Vocabulary]
    ) -> pa.Table:
        keep = pa.array(ids > 0)
        raw = raw.filter(keep)
        columns = {"user_id": pa.array(ids).filter(keep), "raw_user_id": raw}
        for name, values in self._features(raw, file, list(vocabularies)).items():
            columns[f"feature_{name}"] = vocabularies[name].encode(values)
        return pa.table(columns)

    def _features(self, raw_ids: pa.Array, file: Path, names: list[str]) -> dict[str, pa.Array]:
        """The features (list<string> [n]) of the users of one partition; a user's first row is used."""
        table = read_stream(file)
        if table is None:
            self.without_features += len(raw_ids) if names else 0
            return dict.fromkeys(names, pa.nulls(len(raw_ids), pa.list_(pa.string())))
        position = pc.index_in(raw_ids, value_set=table["raw_user_id"].combine_chunks())
        self.without_features += position.null_count
        used = pc.is_in(table["raw_user_id"], value_set=raw_ids)
        self.without_events += len(table) - (pc.sum(used).as_py() or 0)
        return {name: table[f"feature_{name}"].combine_chunks().take(position) for name in names}

    def _old_tables(self, vocabularies: dict[str, Vocabulary]) -> list[pa.Table]:
        """The existing users in the columns of the new dataset, with features encoded by its vocabularies."""
        if self._old is None or self._dataset is None:
            return []
        columns = {"user_id": self._old["user_id"], "raw_user_id": self._old["raw_user_id"]}
        for name, vocabulary in vocabularies.items():
            column, values = f"feature_{name}", pa.nulls(len(self._old), pa.list_(pa.string()))
            if column in self._old.column_names:
                values = decode_feature(self._old[column].combine_chunks(), self._dataset.feature_values(name))
            columns[column] = vocabulary.encode(values)
        return [pa.table(columns)]


def known_ids(known: pa.ChunkedArray, raw_ids: pa.ChunkedArray) -> np.ndarray:
    """Ids (int64 [n]; 0: unknown) of the distinct `raw_ids` in the list `known`, whose entry i has id i + 1.

    `known` may be long, so it is streamed; the hash table contains only the few `raw_ids`.
    """
    found = np.zeros(len(raw_ids), np.int64)
    wanted, first = raw_ids.combine_chunks(), 1
    for chunk in known.chunks:
        at = pc.index_in(chunk, value_set=wanted)
        rows = np.flatnonzero(at.is_valid().to_numpy(zero_copy_only=False))
        found[at.take(pa.array(rows)).to_numpy()] = first + rows
        first += len(chunk)
    return found


def _latest_by_id(tables: list[pa.Table], features: list[str]) -> pa.Table:
    """One row per user id, sorted by id. Rows of later tables replace earlier ones, except for empty features."""
    rows = pa.concat_tables(tables).combine_chunks()
    ids = rows["user_id"].to_numpy()
    # row_of: last row of each id (for repeated indices, numpy's assignment keeps the last one); first_of: first row.
    row_of = np.zeros(int(ids.max(initial=0)) + 1, np.int64)
    row_of[ids] = np.arange(len(ids))
    first_of = row_of.copy()
    first_of[ids[::-1]] = np.arange(len(ids))[::-1]
    columns = {
        "user_id": pa.array(np.arange(1, len(row_of))),
        "raw_user_id": rows["raw_user_id"].take(row_of[1:]),
    }
    for name in features:
        length = pc.list_value_length(rows[name]).to_numpy()
        row = np.where(length[row_of[1:]] > 0, row_of[1:], first_of[1:])
        columns[name] = rows[name].combine_chunks().take(pa.array(row)).cast(FEATURE_TYPE)
    return pa.table(columns)
