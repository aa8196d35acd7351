"""`Creatives`: the titles of items for clusters of users, looked up in microseconds.

    <output>/creatives.json       what the folder is
    <output>/titles/titles.json   origin, options, counts, hashes of the files
    <output>/titles/titles.arrow  a row per item and cluster: the items in the order of their ids' hashes, each with its
                                  null title (for users whose cluster has none) first, then by cluster
    <output>/titles/items.arrow   raw_item_id of each item and its first row; hashes.npy: the order
    <output>/rounds/*.parquet     titles that a job has written and not yet committed
    <output>/lock                 held by the only job

A job keeps rounds of titles, named by their keys, and commits all titles at its end in one step; a killed job goes on.
"""

import json
import os
import secrets
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hllm_torchrec.common.atomic_files import atomic_folder, remove_folder, replace_file, sync_folder
from hllm_torchrec.common.hashing import hash_file
from hllm_torchrec.creative.clusters import NO_CLUSTER, Clusters
from hllm_torchrec.creative.mapped_table import (
    RawIndex,
    check_files,
    hash_order,
    read_hashes,
    read_mapped,
    write_mapped,
)
from hllm_torchrec.data.validation import error_location, read_table

MARKER, FILE = "creatives.json", "titles.json"
_FORMAT = 1
_TITLES, _ITEMS, _HASHES = "titles.arrow", "items.arrow", "hashes.npy"
_REMEDY = "remove the folder and write the titles again (hllm create)"
WRITTEN = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("text", pa.large_string()),
        pa.field("log_prob", pa.float32()),
        pa.field("tokens", pa.int32()),
        pa.field("fallback", pa.bool_()),
        pa.field("reasons", pa.large_string()),
    ]
)
"""A title that was written. key: hash of everything it depends on; log_prob: of its tokens, under the model's own
distribution; fallback: the source text stands for it, because of `reasons`."""
SCHEMA = pa.schema(
    [
        pa.field("raw_item_id", pa.large_string()),
        pa.field("cluster", pa.int32()),
        pa.field("match", pa.float32()),
        *WRITTEN,
    ]
)
"""A title in its place. cluster: -1 for the null title; match: predicted probability that the cluster likes the item,
null where pairs are not scored."""
_OF_ITEMS = pa.schema([pa.field("raw_item_id", pa.large_string()), pa.field("first", pa.int64())])


@dataclass(frozen=True)
class Title:
    """A text of an item. cluster: whom it was written for, -1: everybody; fallback: it is the item's source text."""

    item: str
    cluster: int
    text: str
    log_prob: float
    fallback: bool


class Creatives:
    """Titles in a folder, with the clusters whose titles they are; see `open`."""

    def __init__(self, path: Path, facts: Mapping[str, Any], clusters: Clusters, titles: dict[str, pa.Array]) -> None:
        self.path, self.facts, self.clusters, self.titles = path, facts, clusters, titles
        files, self._cluster = path / "titles", titles["cluster"].to_numpy()
        items = read_mapped(files / _ITEMS, _OF_ITEMS, _REMEDY)
        hashes = read_hashes(files / _HASHES, len(items["first"]), _REMEDY)
        self._index = RawIndex(hashes, items["raw_item_id"])
        self._first = np.append(items["first"].to_numpy(), len(self._cluster))
        if self._first[0] != 0 or (np.diff(self._first) < (len(self._first) > 1)).any():
            raise ValueError(f"{files / _ITEMS}: the rows of the items are not in order; {_REMEDY}")

    def __len__(self) -> int:
        return len(self._cluster)

    @classmethod
    def open(cls, path: Path) -> "Creatives":
        """Open the committed titles in a folder, and their clusters.

        Raises:
            ValueError: there are none, they are damaged, or the clusters were fitted again since.
        """
        facts = read_facts(path)
        clusters = Clusters.open((path / facts["clusters"]).resolve())
        if clusters.fingerprint != facts["centers"]:
            raise ValueError(
                f"{path}: its titles are for other clusters than those in {clusters.path}, which were fitted again: "
                "write titles for them (hllm create)"
            )
        return cls(path, facts, clusters, read_mapped(path / "titles" / _TITLES, SCHEMA, _REMEDY))

    def get(self, user: str | None, item: str) -> Title:
        """Title of an item for a user's cluster; the null title for a user, or a cluster, without one.

        Raises:
            KeyError: the item has no titles.
        """
        found = self.find(user, item)
        if found is None:
            raise KeyError(f"item {item!r}: {self.path} has no titles of it")
        return found

    def find(self, user: str | None, item: str) -> Title | None:
        """As `get`; None for an item without titles."""
        place = self._index.find(item)
        if place < 0:
            return None
        first, end = int(self._first[place]), int(self._first[place + 1])
        cluster = NO_CLUSTER if user is None else self.clusters.of(user)
        row = bisect_left(self._cluster, cluster, first, end)
        return self._title(item, row if row < end and self._cluster[row] == cluster else first)

    def of_item(self, item: str) -> list[Title]:
        """All titles of an item, the null title first; none if it has no titles."""
        place = self._index.find(item)
        rows = range(0) if place < 0 else range(int(self._first[place]), int(self._first[place + 1]))
        return [self._title(item, row) for row in rows]

    def _title(self, item: str, row: int) -> Title:
        values = (self.titles[name][row].as_py() for name in ("text", "log_prob", "fallback"))
        return Title(item, int(self._cluster[row]), *values)


def read_facts(path: Path) -> dict[str, Any]:
    """The facts of the committed titles in a folder, whose files are whole.

    Raises:
        ValueError: there are none, or they are damaged.
    """
    file = path / "titles" / FILE
    if not file.is_file():
        raise ValueError(f"{path}: no titles (no titles/{FILE}); write them with `hllm create`")
    with error_location(file, _REMEDY):
        facts = json.loads(file.read_text(encoding="utf-8"))
        if facts["format"] != _FORMAT:
            raise ValueError(f"its format is {facts['format']}, this version reads {_FORMAT}")
        files = {name: facts["files"][name] for name in (_TITLES, _ITEMS, _HASHES)}
        if not isinstance(facts["clusters"], str) or "\0" in facts["clusters"]:
            raise ValueError("it does not name its clusters")
        facts = {**facts, "origin": dict(facts["origin"])}
    check_files(file.parent, files, _REMEDY)
    return facts


def prepare_folder(path: Path) -> None:
    """Make a folder of titles, or check that this one is.

    Raises:
        ValueError: it holds something else.
    """
    if path.exists() and not (path / MARKER).is_file() and any(path.iterdir()):
        raise ValueError(f"--output {path}: holds something else than titles; name a new folder")
    (path / "rounds").mkdir(parents=True, exist_ok=True)
    if not (path / MARKER).is_file():
        replace_file(path / MARKER, json.dumps({"format": _FORMAT}) + "\n")


def committed(path: Path) -> pa.Table:
    """The committed titles, `SCHEMA`; none if nothing is committed."""
    if not (path / "titles" / FILE).is_file():
        return SCHEMA.empty_table()
    read_facts(path)
    return pa.table(list(read_mapped(path / "titles" / _TITLES, SCHEMA, _REMEDY).values()), schema=SCHEMA)


def written(path: Path) -> pa.Table:
    """All titles that exist, committed or not, `WRITTEN`; each key once."""
    parts = [committed(path).select(WRITTEN.names), *_rounds(path)]
    found = pa.concat_tables(parts).combine_chunks()
    keys = found["key"].to_numpy(zero_copy_only=False)
    first = np.unique(keys.astype("S"), return_index=True)[1] if keys.size else np.empty(0, np.int64)
    return found.take(pa.array(np.sort(first)))


def _rounds(path: Path) -> Iterator[pa.Table]:
    for file in sorted((path / "rounds").glob("*.parquet")):
        try:
            yield read_table(file, WRITTEN.names).cast(WRITTEN)
        except (ValueError, pa.ArrowInvalid) as error:
            raise ValueError(f"{file}: {error}; remove this file: its titles are then written again") from None


def write_round(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Keep titles, rows of `WRITTEN`, for a later commit; on the disk when it returns."""
    if not rows:
        return
    beside = path / "rounds" / f"{secrets.token_hex(8)}.part"
    pq.write_table(pa.Table.from_pylist(list(rows), WRITTEN), beside)
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    beside.rename(beside.with_suffix(".parquet"))
    sync_folder(path / "rounds")


def commit(path: Path, titles: pa.Table, facts: Mapping[str, Any]) -> None:
    """Make titles, `SCHEMA` in any order, the committed ones in one step, and remove the rounds."""
    raw_ids = pc.unique(titles["raw_item_id"]).to_pylist()
    hashes, order = hash_order(raw_ids)
    place = pa.array(np.argsort(order))  # of each unique id in the order of the hashes
    place = place.take(pc.index_in(titles["raw_item_id"], value_set=pa.array(raw_ids, pa.large_string())))
    at = np.lexsort((titles["cluster"].to_numpy(), place.to_numpy()))
    titles = titles.take(pa.array(at)).cast(SCHEMA)
    first = np.searchsorted(place.to_numpy()[at], np.arange(len(raw_ids)))
    items = pa.table([[raw_ids[i] for i in order], first], schema=_OF_ITEMS)
    with atomic_folder(path / "titles", replace=True, marker=FILE) as folder:
        write_mapped(folder / _TITLES, titles)
        write_mapped(folder / _ITEMS, items)
        np.save(folder / _HASHES, hashes)
        files = {name: hash_file(folder / name) for name in (_TITLES, _ITEMS, _HASHES)}
        text = json.dumps({**facts, "format": _FORMAT, "files": files}, indent=1)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")
    remove_folder(path / "rounds")
    (path / "rounds").mkdir()
