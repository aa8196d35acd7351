"""`Creatives`: titles of items for clusters of users, in memory-mapped files; a lookup takes microseconds.

    <output>/creatives.json       marks the folder as one of titles
    <output>/titles/titles.json   weights, clusters, options, counts, SHA-256 of the other files
    <output>/titles/titles.arrow  one row per title. The rows of an item are consecutive and sorted by cluster; the
                                  first is the null title, for all users without a title for their cluster
    <output>/titles/items.arrow   raw_item_id and first row of each item, sorted by the hash of the id
    <output>/titles/hashes.npy    the sorted hashes
    <output>/rounds/*.parquet     titles that a job has generated and not yet committed
    <output>/lock                 lock of the job that writes to the folder

A job (`generate`) saves the titles that it has generated in rounds, and at its end replaces the folder titles/ in one
atomic step. A title is identified by its key, so a killed job continues with the titles that it lacks.
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
"""Columns of a generated title. key: hash of everything that the title depends on; log_prob: log-likelihood of the
generated tokens and the end token; tokens: number of generated tokens without the end token; fallback: the text is the
item's source text, because the generated text broke the rules in reasons."""
SCHEMA = pa.schema(
    [
        pa.field("raw_item_id", pa.large_string()),
        pa.field("cluster", pa.int32()),
        pa.field("match", pa.float32()),
        *WRITTEN,
    ]
)
"""Columns of titles.arrow. cluster: -1 for the null title; match: predicted probability that users of the cluster like
the item, null if it was not predicted."""
_OF_ITEMS = pa.schema([pa.field("raw_item_id", pa.large_string()), pa.field("first", pa.int64())])


@dataclass(frozen=True)
class Title:
    """A title of an item (raw id) for the users of a cluster (-1: the null title). Other fields: see `WRITTEN`."""

    item: str
    cluster: int
    text: str
    log_prob: float
    fallback: bool


class Creatives:
    """Titles that `hllm create` wrote to a folder, with their clusters of users; opened by `open`.

    path: the folder; facts: contents of titles.json; clusters: those for which the titles were generated; titles:
    columns of titles.arrow.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], clusters: Clusters, titles: dict[str, pa.Array]) -> None:
        self.path, self.facts, self.clusters, self.titles = path, facts, clusters, titles
        files, self._cluster = path / "titles", titles["cluster"].to_numpy()
        items = read_mapped(files / _ITEMS, _OF_ITEMS, _REMEDY)
        hashes = read_hashes(files / _HASHES, len(items["first"]), _REMEDY)
        self._index = RawIndex(hashes, items["raw_item_id"])
        self._first = np.append(items["first"].to_numpy(), len(self._cluster))
        if self._first[0] != 0 or (np.diff(self._first) < 1).any():  # each item has at least its null title
            raise ValueError(f"{files / _ITEMS}: the rows of the items are not in order; {_REMEDY}")

    def __len__(self) -> int:
        return len(self._cluster)

    @classmethod
    def open(cls, path: Path) -> "Creatives":
        """Open the committed titles in a folder, and the clusters that they were generated for.

        Raises:
            ValueError: the folder has no titles, a file is damaged, or the clusters have been fitted again.
        """
        facts = read_facts(path)
        try:
            clusters = Clusters.open((path / facts["clusters"]).resolve())
        except ValueError as error:
            raise ValueError(f"{path}: its clusters cannot be opened: {error}") from None
        if clusters.fingerprint != facts["centers"]:
            raise ValueError(
                f"{path}: its titles are for other clusters than those in {clusters.path}, which were fitted again: "
                "write titles for them (hllm create)"
            )
        return cls(path, facts, clusters, read_mapped(path / "titles" / _TITLES, SCHEMA, _REMEDY))

    def get(self, user: str | None, item: str) -> Title:
        """Return the title of an item for a user, by raw ids.

        It is the title for the user's cluster, or the null title if the user is None, is unknown, or belongs to a
        cluster for which the item has no title.

        Raises:
            KeyError: the item has no titles.
        """
        found = self.find(user, item)
        if found is None:
            raise KeyError(f"item {item!r}: {self.path} has no titles of it")
        return found

    def find(self, user: str | None, item: str) -> Title | None:
        """Return the same as `get`, or None if the item has no titles."""
        index = self._index.find(item)
        if index < 0:
            return None
        first, end = int(self._first[index]), int(self._first[index + 1])
        cluster = NO_CLUSTER if user is None else self.clusters.of(user)
        row = bisect_left(self._cluster, cluster, first, end)
        return self._title(item, row if row < end and self._cluster[row] == cluster else first)

    def of_item(self, item: str) -> list[Title]:
        """Return all titles of an item, the null title first; an empty list if the item has no titles."""
        index = self._index.find(item)
        rows = range(0) if index < 0 else range(int(self._first[index]), int(self._first[index + 1]))
        return [self._title(item, row) for row in rows]

    def _title(self, item: str, row: int) -> Title:
        values = (self.titles[name][row].as_py() for name in ("text", "log_prob", "fallback"))
        return Title(item, int(self._cluster[row]), *values)


def read_facts(path: Path) -> dict[str, Any]:
    """Read titles.json of a folder, and verify the files that it lists.

    Raises:
        ValueError: the folder has no committed titles, or a file is damaged.
    """
    file = path / "titles" / FILE
    if not file.is_file():
        raise ValueError(f"{path}: no titles (no titles/{FILE}); write them with `hllm create`")
    with error_location(file, _REMEDY):
        facts = json.loads(file.read_text(encoding="utf-8"))
        if facts["format"] != _FORMAT:
            raise ValueError(f"its format is {facts['format']}, this version reads {_FORMAT}")
        files = {name: facts["files"][name] for name in (_TITLES, _ITEMS, _HASHES)}
        for name in ("clusters", "centers"):
            if not isinstance(facts[name], str) or "\0" in facts[name] or facts[name].startswith("/"):
                raise ValueError(f"the entry {name} is damaged")
        facts = {**facts, "origin": dict(facts["origin"])}
    check_files(file.parent, files, _REMEDY)
    return facts


def prepare_folder(path: Path) -> None:
    """Create a folder for titles, if it does not exist.

    Raises:
        ValueError: the folder exists and holds other files.
    """
    if path.exists() and not (path / MARKER).is_file() and any(path.iterdir()):
        raise ValueError(f"--output {path}: holds something else than titles; name a new folder")
    (path / "rounds").mkdir(parents=True, exist_ok=True)
    if not (path / MARKER).is_file():
        replace_file(path / MARKER, json.dumps({"format": _FORMAT}) + "\n")


def committed(path: Path) -> pa.Table:
    """Return the committed titles of a folder, a table with `SCHEMA`; it is empty if nothing was committed."""
    if not (path / "titles" / FILE).is_file():
        return SCHEMA.empty_table()
    read_facts(path)
    return pa.table(list(read_mapped(path / "titles" / _TITLES, SCHEMA, _REMEDY).values()), schema=SCHEMA)


def written(path: Path) -> pa.Table:
    """Return all titles of a folder, committed or not: a table with `WRITTEN`, with one row per key."""
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
    """Save generated titles (rows of `WRITTEN`) for a later commit, and wait until they are on the disk."""
    if not rows:
        return
    beside = path / "rounds" / f"{secrets.token_hex(8)}.part"
    pq.write_table(pa.Table.from_pylist(list(rows), WRITTEN), beside)
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    beside.rename(beside.with_suffix(".parquet"))
    sync_folder(path / "rounds")


def commit(path: Path, titles: pa.Table, facts: Mapping[str, Any]) -> None:
    """Replace the committed titles of a folder in one atomic step, and remove the rounds.

    Args:
        titles: table with `SCHEMA`, in any order.
        facts: further entries of titles.json.
    """
    raw_ids = pc.unique(titles["raw_item_id"]).to_pylist()
    hashes, order = hash_order(raw_ids)
    rank_of_id = pa.array(np.argsort(order))  # position of each of raw_ids in the order of the hashes
    ids = pc.index_in(titles["raw_item_id"], value_set=pa.array(raw_ids, pa.large_string()))
    ranks = rank_of_id.take(ids).to_numpy()
    sorting = np.lexsort((titles["cluster"].to_numpy(), ranks))
    titles = titles.take(pa.array(sorting)).cast(SCHEMA)
    first = np.searchsorted(ranks[sorting], np.arange(len(raw_ids)))
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
