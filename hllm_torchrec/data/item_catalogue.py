"""The item catalogue and the feature vocabularies during preparation of a dataset.

Ids are dense from 1 in order of first appearance, 0 is unknown. A dataset that is extended keeps its existing ids.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hllm_torchrec.common.yaml_files import abbreviate
from hllm_torchrec.data.bad_rows import BadRowLog
from hllm_torchrec.data.dataset import ACTIVE, Dataset
from hllm_torchrec.data.id_map import IdMap, grown
from hllm_torchrec.data.jagged_arrays import offsets_from_lengths
from hllm_torchrec.data.sources.base import Chunk, Source
from hllm_torchrec.data.split import Split

FEATURE_TYPE = pa.list_(pa.int32())
_OPTIONAL = {"created_at": pa.int64(), ACTIVE: pa.bool_()}
"""Optional columns of a source, in addition to texts and features."""
_OWN = ("item_id", "raw_item_id", "row", "number", *_OPTIONAL)
"""Names of columns of `items.parquet`, of chunks of items and of the spool file, which no text column may have."""
_ROWS_PER_BATCH = 16_384


class Vocabulary:
    """Value → id of one categorical feature: int32, dense from 1, in order of first appearance."""

    def __init__(self, values: Sequence[str] = ()) -> None:
        self._ids = {value: i for i, value in enumerate(values, start=1)}
        self.known = len(self._ids)
        """Number of values that the constructor was given."""

    @property
    def values(self) -> list[str]:
        """All values, in the order of their ids."""
        return list(self._ids)

    @property
    def size(self) -> int:
        """Number of ids, 0 (unknown) included."""
        return len(self._ids) + 1

    def encode(self, values: pa.Array | pa.ChunkedArray) -> pa.Array:
        """Encode list<string> [n] as list<int32> [n]; new values get the next free ids, a null list becomes empty."""
        lists = pa.chunked_array([values]).combine_chunks() if isinstance(values, pa.Array) else values.combine_chunks()
        lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
        flat = lists.flatten().dictionary_encode()
        # One dictionary lookup per distinct value instead of one per row.
        of_value = [self._ids.setdefault(v, len(self._ids) + 1) for v in flat.dictionary.to_pylist()]
        ids = np.array(of_value, np.int32)[flat.indices.to_numpy()] if len(flat) else np.zeros(0, np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets_from_lengths(lengths), pa.int32()), pa.array(ids, pa.int32()))

    def table(self) -> pa.Table:
        """Columns `id` int32 and `value` string."""
        return pa.table({"id": pa.array(self._ids.values(), pa.int32()), "value": pa.array(self._ids, pa.string())})


def load_vocabularies(old: Dataset | None, names: Iterable[str]) -> dict[str, Vocabulary]:
    """The vocabularies of the features `names`; they start with the values of the existing dataset `old`, if any."""
    known = {} if old is None else old.all_features
    return {
        name: Vocabulary(old.feature_values(name).to_pylist() if old is not None and name in known else ())
        for name in names
    }


def check_text_columns(source: Source) -> None:
    """Raise ValueError if a text column has one of the names `_OWN`, or the name of a feature's column."""
    for name in source.text_columns:
        if name in _OWN or name.startswith("feature_"):
            raise ValueError(
                f"{source.name}: the text column {name!r} has a name that datasets use themselves: rename it"
            )


class ItemCatalogue:
    """Collects the items of a source; only their raw ids are in memory (`id_map.IdMap`), the rest is in a spool file.

    Each item has a *number* from 0 in order of first appearance. Existing items come first, so that their number is
    their id - 1. `write` maps numbers to final ids and drops the items without a final id.
    """

    def __init__(self, source: Source, spool: Path, log: BadRowLog) -> None:
        self.log = log
        self._text = source.text_columns
        self._columns = [*source.text_columns, *(f"feature_{name}" for name in source.item_features)]
        fields = [pa.field("number", pa.int64()), pa.field("raw_item_id", pa.string())]
        fields += [pa.field(name, pa.string()) for name in source.text_columns]
        fields += [pa.field(name, kind) for name, kind in _OPTIONAL.items()]
        fields += [pa.field(f"feature_{name}", pa.list_(pa.string())) for name in source.item_features]
        self._schema = pa.schema(fields)
        self._spool = spool
        self._writer = pa.ipc.new_stream(str(spool), self._schema)
        self._numbers = IdMap()
        # Arrays indexed by item number, longer than needed: hash of the text; True if this source has the item; row of
        # the item's latest text in the spool.
        self._digests, self._seen, self._current_row = np.zeros(0, np.int64), np.zeros(0, bool), np.zeros(0, np.int64)
        self._rows = 0
        self._refused: set[str] = set()
        self._old: Dataset | None = None
        self.existing = 0
        self.updated = 0
        self._has: set[str] = set()

    def __len__(self) -> int:
        return len(self._numbers)

    def load(self, old: Dataset, *, with_rows: bool) -> None:
        """Add the items of an existing dataset. with_rows: add their rows too, with feature ids decoded to values."""
        assert not len(self._numbers), "existing items come first"
        self._old, self.existing = old, len(old.items)
        number = 0
        for chunk in old.items["raw_item_id"].chunks:
            self._numbers.add(_placed(chunk, number))
            number += len(chunk)
        assert len(self._numbers) == self.existing, "raw ids of a dataset are distinct"
        self._grow()
        if with_rows:
            self._has |= _OPTIONAL.keys() & set(old.items.column_names)
            every = np.arange(self.existing)
            self._append(self._known_rows(every, [*self._columns, *_OPTIONAL]), every)

    def _known_rows(self, numbers: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """Rows of existing items with the columns of the spool; columns that are not in `columns` are null."""
        assert self._old is not None, "existing items are those of a dataset"
        items = self._old.items.take(pa.array(numbers))
        found = {"raw_item_id": items["raw_item_id"]}
        for name in columns:
            if name in items.column_names:
                found[name] = items[name]
                if name.startswith("feature_"):
                    values = self._old.feature_values(name.removeprefix("feature_"))
                    found[name] = decode_feature(items[name].combine_chunks(), values)
        return self._completed(pa.table(found))

    def _grow(self) -> None:
        """Extend the arrays that are indexed by item number to all items."""
        size = len(self._numbers)
        self._digests, self._seen, self._current_row = (
            grown(array, size) for array in (self._digests, self._seen, self._current_row)
        )

    def add(self, chunk: Chunk) -> None:
        """Add the items of one chunk. Raises ValueError for a bad row whose policy is "error"."""
        table = self._without_bad_ids(chunk)
        self._has |= _OPTIONAL.keys() & set(table.column_names)
        rows = table["row"].to_numpy()
        table = self._completed(table)
        texts = self._texts(table)
        empty = np.array([not any(text) for text in texts], bool)
        raw_ids = table["raw_item_id"]
        drop_empty = self.log.handle(
            "item_without_text",
            empty,
            chunk.path,
            rows,
            lambda i: f"item {abbreviate(raw_ids[i].as_py())} has no text in {self._text}",
        )
        accepted = np.flatnonzero(~empty) if drop_empty else np.arange(len(table))
        table, digests = table.take(pa.array(accepted)), _digests([texts[i] for i in accepted])
        numbers, take = self._place(table["raw_item_id"], digests, chunk.path, rows[accepted])
        self._append(table.take(pa.array(take)), numbers[take])
        if drop_empty and (empty.any() or self._refused):
            # An item is refused only if no row of it, earlier or later, has a text.
            refused = pa.array([*self._refused, *raw_ids.filter(pa.array(empty)).to_pylist()], pa.string())
            self._refused = set(refused.filter(pa.array(self._numbers.find(refused) < 0)).to_pylist())

    def _without_bad_ids(self, chunk: Chunk) -> pa.Table:
        blank = blank_mask(chunk.table["raw_item_id"])
        rows = chunk.table["row"].to_numpy()
        if self.log.handle("missing_id", blank, chunk.path, rows, lambda _: "the item id is missing"):
            return chunk.table.filter(pa.array(~blank))
        return chunk.table

    def _place(
        self, raw_ids: pa.ChunkedArray, digests: np.ndarray, path: Path, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(number of each row's item [n], indices of the rows to store).

        New items get the next numbers. Only the first row of each item in this source is stored; it replaces the row of
        an existing item. Later rows are repetitions.
        """
        known = len(self._numbers)
        numbers = self._numbers.add(raw_ids)
        self._grow()
        first = np.zeros(len(numbers), bool)
        first[np.unique(numbers, return_index=True)[1]] = True
        take = np.flatnonzero(first & ~self._seen[numbers])
        old = take[numbers[take] < min(known, self.existing)]
        if old.size:
            texts = self._texts(self._known_rows(numbers[old], self._text))
            self.updated += int(np.count_nonzero(_digests(texts) != digests[old]))
        self._digests[numbers[take]] = digests[take]
        self._seen[numbers] = True
        repeated = np.ones(len(numbers), bool)
        repeated[take] = False
        differs = repeated & (self._digests[numbers] != digests)
        self.log.handle(
            "duplicate_item",
            differs,
            path,
            rows,
            lambda i: f"item {abbreviate(raw_ids[i].as_py())} came before with another text",
        )
        if (repeated & ~differs).any():
            self.log.dropped["repeated_item_row"] += int(np.count_nonzero(repeated & ~differs))
        return numbers, take

    def _completed(self, table: pa.Table) -> pa.Table:
        """`table` with all columns of the spool except `number`, in order; missing columns are null, null texts ""."""
        columns = {}
        for field in list(self._schema)[1:]:
            if field.name not in table.column_names:
                columns[field.name] = pa.nulls(len(table), field.type)
            elif field.name in self._text:
                columns[field.name] = pc.utf8_trim_whitespace(pc.fill_null(table[field.name].cast(pa.string()), ""))
            else:
                columns[field.name] = table[field.name].cast(field.type)
        return pa.table(columns)

    def _texts(self, table: pa.Table) -> list[tuple[str, ...]]:
        return list(zip(*(table[name].to_pylist() for name in self._text), strict=True))

    def _append(self, table: pa.Table, numbers: np.ndarray) -> None:
        """Write the rows to the spool and record the latest row of each number."""
        if len(numbers) == 0:
            return
        # The spool is append-only, so an updated item has two rows, of which `_final_batches` uses the latest.
        self._current_row[numbers] = self._rows + np.arange(len(numbers))
        self._rows += len(numbers)
        self._writer.write_table(table.add_column(0, "number", pa.array(numbers, pa.int64())))

    def look_up(self, raw_ids: pa.ChunkedArray) -> np.ndarray:
        """The numbers (int64 [n]) of raw ids; -1 for ids that are not in the catalogue."""
        return self._numbers.find(raw_ids)

    def ids(self, most: int) -> pa.Array:
        """Raw ids of the first `most` items (large_string)."""
        return self._numbers.ids(0, min(most, len(self)))

    def was_refused(self, raw_ids: pa.ChunkedArray) -> np.ndarray:
        """Mask (bool [n]) of the ids of items that the policy dropped."""
        if not self._refused:
            return np.zeros(len(raw_ids), bool)
        refused = pa.array(self._refused, pa.string())
        return pc.is_in(raw_ids, value_set=refused).to_numpy(zero_copy_only=False)

    def add_without_text(self, raw_ids: Iterable[str]) -> None:
        """Add items that occur only in events, with empty texts."""
        new = pa.array(dict.fromkeys(raw_ids), pa.string())
        new = new.filter(pa.array(self._numbers.find(new) < 0))
        numbers = self._numbers.add(new)
        self._grow()
        self._seen[numbers] = True
        self._digests[numbers] = _digests([("",) * len(self._text)])
        table = self._completed(pa.table({"raw_item_id": new}))
        for name in self._text:
            blank = pa.array([""] * len(new), pa.string())
            table = table.set_column(table.column_names.index(name), name, blank)
        self._append(table, numbers)

    def final_ids(self, has_event: np.ndarray, keep_all: bool) -> np.ndarray:
        """The final id (int64; 0: dropped) of each number; `has_event` is bool [len(self)]."""
        keep = np.ones(len(self), bool) if keep_all else has_event.copy()
        keep[: self.existing] = True  # an extended dataset keeps all its ids, including those of items without events
        return np.where(keep, np.cumsum(keep), 0)

    def held_out(self, split: Split, final_ids: np.ndarray) -> np.ndarray:
        """Mask (bool [largest final id + 1]) of the final ids whose items are held out of train; False for id 0."""
        found = np.zeros(int(final_ids.max()) + 1, bool)
        if split.hold_out_items:
            found[final_ids] = split.held_out(self._numbers.ids().to_pylist())
            found[0] = False
        return found

    def write(self, path: Path, final_ids: np.ndarray, vocabularies: dict[str, Vocabulary]) -> None:
        """Write `items.parquet`: the rows with a final id, in order of the id, with encoded features."""
        self._writer.close()
        batches = self._final_batches(final_ids)
        if self.existing:  # rows of updated items are at the end of the spool, so sort by id
            rows = pa.concat_tables(batches)
            batches = iter(rows.sort_by("item_id").to_reader(max_chunksize=_ROWS_PER_BATCH))
            batches = (pa.Table.from_batches([batch]) for batch in batches)
        writer: pq.ParquetWriter | None = None
        for table in batches:
            table = encode_features(table, vocabularies)
            writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
            writer.write_table(table)
        if writer is None:
            raise ValueError("no item is left: the item file is empty, or every item was filtered out or dropped")
        writer.close()

    def source_rows(self, final_ids: np.ndarray) -> pa.Table:
        """The rows, with features as values, of the items that are in this source and have a final id."""
        self._writer.close()
        tables = list(self._final_batches(final_ids))
        rows = (
            pa.concat_tables(tables)
            if tables
            else self._schema.empty_table().rename_columns(["item_id", *self._schema.names[1:]])
        )
        of_source = np.zeros(int(final_ids.max(initial=0)) + 1, bool)
        of_source[final_ids[self._seen[: len(self)]]] = True
        of_source[0] = False
        return rows.filter(pa.array(of_source[rows["item_id"].to_numpy()]))

    def _final_batches(self, final_ids: np.ndarray) -> Iterator[pa.Table]:
        """The rows of the spool, batch by batch, that are the latest of their item and have a final id."""
        row = 0
        with pa.OSFile(str(self._spool)) as file, pa.ipc.open_stream(file) as reader:
            for batch in reader:
                number = batch.column("number").to_numpy()
                latest = self._current_row[number] == np.arange(row, row + len(number))
                row += len(number)
                ids = final_ids[number]
                keep = pa.array(latest & (ids > 0))
                table = pa.Table.from_batches([batch]).set_column(0, "item_id", pa.array(ids)).filter(keep)
                yield table.drop_columns([name for name in _OPTIONAL if name not in self._has])


def _digests(texts: list[tuple[str, ...]]) -> np.ndarray:
    """Hash of each item's texts, int64 [n]; valid in this process only, because Python's hashes are salted."""
    return np.fromiter((hash(text) for text in texts), np.int64, len(texts))


def encode_features(table: pa.Table, vocabularies: dict[str, Vocabulary]) -> pa.Table:
    """Replace the values in the columns `feature_<name>` by ids; new values are added to the vocabularies."""
    for name, vocabulary in vocabularies.items():
        column = f"feature_{name}"
        encoded = vocabulary.encode(table[column])
        table = table.set_column(table.column_names.index(column), pa.field(column, FEATURE_TYPE), encoded)
    return table


def decode_feature(ids: pa.ListArray, vocabulary: pa.ChunkedArray) -> pa.ListArray:
    """Decode list<int32> ids to list<string>; vocabulary: the values of the feature (`Dataset.feature_values`)."""
    values = vocabulary.combine_chunks().take(pc.subtract(ids.flatten(), 1))
    offsets = offsets_from_lengths(pc.list_value_length(ids).to_numpy())
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


def blank_mask(raw_ids: pa.ChunkedArray) -> np.ndarray:
    """Mask (bool [n]) of raw ids that are null, empty or white space."""
    return pc.equal(pc.utf8_trim_whitespace(pc.fill_null(raw_ids, "")), "").to_numpy(zero_copy_only=False)


def _placed(raw_ids: pa.Array, first: int) -> pa.Array:
    """Replace each null (the id of a forgotten item) by a unique text that no source contains, "\\0<item number>".

    first: item number of the first raw id.
    """
    if not raw_ids.null_count:
        return raw_ids
    substitutes = pa.array([f"\0{first + row}" for row in range(len(raw_ids))], pa.string())
    return pc.coalesce(raw_ids.cast(pa.string()), substitutes)
