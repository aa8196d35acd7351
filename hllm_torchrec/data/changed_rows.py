"""Rows of items and users that an append adds or changes, found by comparison with the dataset's rows."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.data.dataset import ACTIVE, Dataset
from hllm_torchrec.data.event_partitions import read_stream
from hllm_torchrec.data.item_catalogue import FEATURE_TYPE, ItemCatalogue, Vocabulary, encode_features
from hllm_torchrec.data.user_table import UserTable, known_ids


def changed_items(dataset: Dataset, catalogue: ItemCatalogue, item_ids: Ints, words: dict[str, Vocabulary]) -> pa.Table:
    """New items, and known ones of which a column differs, in the columns of `items.parquet`.

    If the source has no creation times or no `active` column, known items keep their values.

    item_ids: final id of each item number. New values of features are added to `words`.
    """
    rows, known = encode_features(catalogue.source_rows(item_ids), words).sort_by("item_id"), dataset.items
    ids = rows["item_id"].to_numpy()
    for name in ("created_at", ACTIVE):
        if name in known.column_names and name not in rows.column_names:
            rows = rows.append_column(name, known[name].take(pa.array(ids - 1, mask=ids > len(known))))
    if ACTIVE in rows.column_names:  # null, also for items from before the column existed, means active
        rows, known = _with_active(rows), _with_active(known)
    return _without_equal(rows, known, "item_id")


def _with_active(items: pa.Table) -> pa.Table:
    """The items with the column `active`, in which null is replaced by true."""
    active = items[ACTIVE] if ACTIVE in items.column_names else pa.chunked_array([pa.nulls(len(items), pa.bool_())])
    others = items.drop_columns([ACTIVE]) if ACTIVE in items.column_names else items
    return others.append_column(ACTIVE, pc.fill_null(active, True))


def changed_users(
    dataset: Dataset, users: UserTable, feature_files: list[Path], words: dict[str, Vocabulary]
) -> pa.Table:
    """New users, and known users with a changed feature, in the columns of `users.parquet`.

    An empty cell of a known user leaves the feature as it was. New values of features are added to `words`.
    """
    columns = [f"feature_{name}" for name in words]
    tables, start = [], 0
    for raw, file in zip(users.raw_ids, feature_files, strict=True):
        ids = users.final_ids[start : start + len(raw)]
        start += len(raw)
        tables.append(_user_rows(dataset, raw, ids, read_stream(file), columns))
    rows = encode_features(pa.concat_tables(tables), words).sort_by("user_id")
    return _without_equal(_completed(rows, dataset.users, columns), dataset.users, "user_id")


def _user_rows(dataset: Dataset, raw: pa.Array, ids: Ints, table: pa.Table | None, columns: list[str]) -> pa.Table:
    """Rows of the users with events and of the other known users in the user file `table`.

    A user's features are those of the user's first row in `table`.
    """
    keep = pa.array(ids > 0)
    raw, ids = raw.filter(keep), ids[ids > 0]
    if table is None:
        nothing = {name: pa.nulls(len(raw), pa.list_(pa.string())) for name in columns}
        return pa.table({"user_id": pa.array(ids), "raw_user_id": raw, **nothing})
    others = pc.unique(table["raw_user_id"]).filter(pc.invert(pc.is_in(pc.unique(table["raw_user_id"]), value_set=raw)))
    other_ids = known_ids(dataset.users["raw_user_id"], pa.chunked_array([others]))
    others, other_ids = others.filter(pa.array(other_ids > 0)), other_ids[other_ids > 0]
    every = pa.concat_arrays([raw, others])
    at = pc.index_in(every, value_set=table["raw_user_id"].combine_chunks())
    features = {name: table[name].combine_chunks().take(at) for name in columns}
    return pa.table({"user_id": pa.array(np.concatenate([ids, other_ids])), "raw_user_id": every, **features})


def _completed(rows: pa.Table, known: pa.Table, columns: list[str]) -> pa.Table:
    """`rows` in which the empty features of known users are replaced by their known values."""
    ids = rows["user_id"].to_numpy()
    old = np.where(ids <= len(known), ids - 1, 0)
    for name in columns if len(known) else ():
        new = rows[name].combine_chunks()
        both = pa.concat_arrays([new, known[name].combine_chunks().take(pa.array(old)).cast(FEATURE_TYPE)])
        empty = (pc.list_value_length(new).to_numpy() == 0) & (ids <= len(known))
        chosen = both.take(pa.array(np.arange(ids.size) + np.where(empty, ids.size, 0)))
        rows = rows.set_column(rows.column_names.index(name), pa.field(name, FEATURE_TYPE), chosen)
    return rows


def _without_equal(rows: pa.Table, known: pa.Table, key: str) -> pa.Table:
    """`rows` without the rows that are equal to the known row of the same id in every column."""
    ids = rows[key].to_numpy()
    is_known = np.flatnonzero(ids <= len(known))
    old, new = known.take(pa.array(ids[is_known] - 1)), rows.take(pa.array(is_known))
    differs = np.zeros(is_known.size, bool)
    for name in rows.column_names:
        if name not in known.column_names:  # only the new source has this column
            differs |= new[name].is_valid().to_numpy()
        else:
            differs |= _differing(new[name].combine_chunks(), old[name].combine_chunks())
    keep = np.ones(ids.size, bool)
    keep[is_known] = differs
    return rows.filter(pa.array(keep))


def _differing(one: pa.Array, other: pa.Array) -> np.ndarray:
    """Mask (bool [n]) of the rows in which two columns, of lists or of single values, differ."""
    if not pa.types.is_list(one.type):
        same = pc.fill_null(pc.equal(one, other.cast(one.type)), False)
        return ~pc.or_(same, pc.and_(pc.is_null(one), pc.is_null(other))).to_numpy(zero_copy_only=False)
    lengths, others = (pc.fill_null(pc.list_value_length(column), 0).to_numpy() for column in (one, other))
    differs = lengths != others
    same = pa.array(~differs)
    a, b = (column.filter(same).flatten().to_numpy() for column in (one, other))
    row = np.repeat(np.flatnonzero(~differs), lengths[~differs])
    differs[row[a != b]] = True
    return differs
