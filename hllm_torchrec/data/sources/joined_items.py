"""Columns of items that are in separate files and are joined by the item's id."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hllm_torchrec.common.yaml_files import abbreviate
from hllm_torchrec.data.sources.columnar import read_columns
from hllm_torchrec.data.sources.dialect import NULL_WORDS
from hllm_torchrec.data.sources.table_columns import Join
from hllm_torchrec.data.sources.values import as_id_strings, as_lists, as_texts, is_list
from hllm_torchrec.data.validation import error_location


class JoinedItems:
    """Looks up columns by item id. The files are read into memory at the first use.

    A later row of an id with different values is an error, because one of the values would be lost.
    """

    def __init__(self, joined: Sequence[tuple[tuple[Path, ...], Join]]) -> None:
        """joined: (files, settings) of each join."""
        self._joined = joined
        self.names = frozenset(name for _, join in joined for name in join.columns)
        self._tables: list[pa.Table] | None = None

    def take(self, ids: pa.Array) -> dict[str, pa.Array]:
        """Column -> values [n] for the ids [n], null where the file does not have the id."""
        if self._tables is None:
            self._tables = [_read(files, join) for files, join in self._joined]
        found: dict[str, pa.Array] = {}
        for table in self._tables:
            at = pc.index_in(ids, value_set=table["id"].combine_chunks(), skip_nulls=True)
            found |= {name: table[name].combine_chunks().take(at) for name in table.column_names if name != "id"}
        return found


def _read(files: tuple[Path, ...], join: Join) -> pa.Table:
    tables = []
    for path in files:
        for _, data, _, _ in read_columns(path, [join.item, *join.columns], join.format):
            with error_location(path, "convert the column, or correct the mapping"):
                nulls = NULL_WORDS if join.format is None or join.format.nulls is None else tuple(join.format.nulls)
                columns = {"id": as_id_strings(data[join.item], "item", nulls)}
                for name in join.columns:
                    values = data[name].combine_chunks()
                    columns[name] = as_lists(values, None) if is_list(values.type) else as_texts(values)
            tables.append(pa.table(columns).filter(pc.is_valid(columns["id"])))
    if not tables:
        return pa.table({name: pa.nulls(0, pa.string()) for name in ("id", *join.columns)})
    table = pa.concat_tables(tables)
    _require_agreement(files[0], table)
    return table


def _require_agreement(path: Path, table: pa.Table) -> None:
    ids = table["id"].combine_chunks()
    first = pc.index_in(ids, value_set=ids).to_numpy()
    again = np.flatnonzero(first != np.arange(len(first)))
    for i in again:
        for name in table.column_names:
            if table[name][int(i)] != table[name][int(first[i])]:
                item = abbreviate(ids[int(i)].as_py())
                raise ValueError(f"{path}: item {item} came before with another {name}; give one row per item")
