"""`Dataset`: reads a prepared dataset directory.

Layout (written by `prepare`):

    manifest.json                     counts, split, features, fingerprint, sizes of the files
    items.parquet                     item_id int64 dense from 1, raw_item_id, texts, feature_<name> list<int32>;
                                      optional: created_at int64 and active bool
    users.parquet                     user_id int64 dense from 1, raw_user_id, feature_<name> list<int32>
    features/<name>.parquet           id int32 from 1, value: the vocabulary
    training_item_counts.npy          int64 [num_items], events of each item in train
    sequences/<part>/part-*.parquet   one row per user with an event in the part: user_id, target_start, and the
                                      lists item_ids, timestamps, labels, actions of the history to the part's end,
                                      and those of the columns that the source declares (`event_schema`)
    events/part-*.arrow               the same events, each once, by user; appended events are merged with these
                                      (`event_files.EventFile`)
    tokens/<fingerprint>/             token stores (`token_store.TokenStore`)

`data.versions` describes the files that later versions add. Only files in the manifest of the opened version are read.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.common.hashing import hash_texts
from hllm_torchrec.common.urls import url_of
from hllm_torchrec.data.event_files import EventFile
from hllm_torchrec.data.event_schema import EventSchema
from hllm_torchrec.data.events import Events, RowHeads, Sequences, decode_sequences
from hllm_torchrec.data.manifest import ITEM_COUNTS, chain_base, read_manifest, version_of
from hllm_torchrec.data.merged_sequences import Cuts, MergedSequences
from hllm_torchrec.data.part_reader import PartReader
from hllm_torchrec.data.remote_datasets import local_dataset
from hllm_torchrec.data.sequences import GROUPS_AT_LEAST
from hllm_torchrec.data.split import SPLITS
from hllm_torchrec.data.tombstones import ITEMS, Tombstones
from hllm_torchrec.data.validation import REMEDY, TableRows, error_location, read_sequences, read_table

ACTIVE = "active"
"""Column of `items.parquet`, bool: false for a withdrawn item. A dataset may lack it."""
_NUMBER = re.compile(r"-?\d+(\.\d+)?$")


@dataclass(frozen=True)
class FileGroup:
    """One row group of a Parquet file of a part's sequences: file, index of the row group, number of users."""

    path: Path
    index: int
    rows: int


@dataclass(frozen=True)
class UserGroup:
    """A group of rows of merged sequences: the users with the indices `first` to `first` + `rows` - 1 in a part.

    since: the indices count only users with an event of the part from this second on.
    """

    part: str
    since: int | None
    first: int
    rows: int


RowGroup = FileGroup | UserGroup
"""A group of rows, returned by `Dataset.row_groups` and read by `Dataset.sequences`."""


class Dataset:
    """Reads one version of a dataset directory with the layout in the module docstring; see `Dataset.open`."""

    def __init__(self, root: Path, manifest: dict[str, Any]) -> None:
        self.root = root
        self.manifest = manifest
        self._readers: dict[tuple[str, int | None], PartReader] = {}

    @classmethod
    def open(cls, path: str | Path, version: int | None = None) -> "Dataset":
        """Open a version (None: the newest) of the dataset at `path`, which may be a URL.

        Raises:
            ValueError: `path` is not a dataset, lacks this version, has another schema version, or has damaged files.
        """
        url = url_of(path)
        if url is not None:
            root = local_dataset(url, version)  # a copy of this version
            return cls(root, read_manifest(root))
        return cls(Path(path), read_manifest(Path(path), version))

    @property
    def version(self) -> int:
        """Number of the opened version, from 1 on."""
        return version_of(self.manifest)

    @property
    def name(self) -> str:
        """The source's name."""
        return str(self.manifest["name"])

    @property
    def fingerprint(self) -> str:
        """Hash of the names and contents of the files in the manifest's `files`."""
        return str(self.manifest["fingerprint"])

    @property
    def num_items(self) -> int:
        """Rows of an item table: the largest item id + 1, the unknown item 0 included."""
        return int(self.manifest["counts"]["items"]) + 1

    @property
    def num_table_items(self) -> int:
        """Rows of an ID table; larger ids (of `inference.new_items`) use the row of the unknown item."""
        return self.num_items

    @property
    def num_users(self) -> int:
        """Rows of a user table: the largest user id + 1, the unknown user 0 included."""
        return int(self.manifest["counts"]["users"]) + 1

    @property
    def num_actions(self) -> int:
        """Rows of an action table, the unknown action 0 included."""
        return int(self.manifest["actions"]["number"])

    @cached_property
    def action_values(self) -> np.ndarray:
        """float64 [num_actions] number at the end of each action's name ("rating 4": 4), NaN without one ("view")."""
        values = np.full(self.num_actions, np.nan)
        for action, name in self.manifest["actions"]["names"].items():
            number = _NUMBER.search(name)
            values[int(action)] = float(number[0]) if number else np.nan
        return values

    @cached_property
    def schema(self) -> EventSchema:
        """The declared columns of events."""
        return EventSchema.from_manifest(self.manifest)

    @property
    def visibility(self) -> Literal["second", "position"]:
        """Visibility rule of exposures: earlier seconds (ranking), or earlier positions (leave-one-out retrieval)."""
        return "position" if self.manifest["split"]["rule"] == "leave_one_out" else "second"

    @cached_property
    def items(self) -> pa.Table:
        """The columns of `items.parquet`; row i is item i + 1."""
        return self._rows_by_id("items.parquet", "item_id", self.num_items)

    @cached_property
    def users(self) -> pa.Table:
        """The columns of `users.parquet`; row i is user i + 1."""
        return self._rows_by_id("users.parquet", "user_id", self.num_users)

    @cached_property
    def tombstones(self) -> Tombstones:
        """The forgotten ids; their rows in `items` and `users` are empty, and no event refers to them."""
        return Tombstones.read(self.root, self.manifest)

    @cached_property
    def excluded_items(self) -> Ints:
        """Ascending ids of the items that are neither candidates nor negatives: forgotten and withdrawn ones."""
        forgotten, items = self.tombstones.numbers(ITEMS), self.items
        if ACTIVE not in items.column_names or not pa.types.is_boolean(items[ACTIVE].type):  # then it is a text column
            return forgotten
        withdrawn = pc.invert(items[ACTIVE].fill_null(True)).to_numpy()
        return np.union1d(forgotten, 1 + np.flatnonzero(withdrawn))

    @property
    def items_fingerprint(self) -> str:
        """Hash of the files with the items' rows; it changes if any text changes."""
        names = [path.relative_to(self.root).as_posix() for path in self._files("items.parquet")]
        hashes = [str(self.manifest["files"][name]["sha256"]) for name in names]
        # A compacted base has the same texts as the version before, so it keeps that version's fingerprint.
        hashes[0] = self.manifest.get("base", {}).get("items_fingerprint", hashes[0])
        return hashes[0] if len(hashes) == 1 else hash_texts(hashes)

    def _files(self, name: str) -> list[Path]:
        """Paths of the file `name` in the base and in each append that has this file."""
        parts = (self.manifest.get("base", {"folder": ""}), *self.manifest.get("appends", ()))
        names = [f"{one['folder']}/{name}".lstrip("/") for one in parts]
        return [self.root / one for number, one in enumerate(names) if number == 0 or one in self.manifest["files"]]

    def _rows_by_id(self, name: str, key: str, rows: int, columns: Sequence[str] | None = None) -> pa.Table:
        """A table whose row i is the newest row of id i + 1. Raises ValueError that names the file and row if an id is
        wrong.
        """
        paths = self._files(name)
        base, size = paths[0], rows - 1
        wanted = None if columns is None else [key, *columns]
        table = read_table(base, wanted)
        with error_location(base):
            ids = table[key].to_numpy()
        # Readers index rows by id - 1 without looking at the id column, so a permuted file would give wrong texts.
        wrong = np.flatnonzero(ids != np.arange(1, ids.size + 1))
        if wrong.size:
            raise ValueError(f"{base}, row {wrong[0]}: {key} is {ids[wrong[0]]}, it must be {wrong[0] + 1}; {REMEDY}")
        if len(paths) > 1:
            table = _newest_rows([table, *(read_table(path, wanted) for path in paths[1:])], key, size, paths)
        if len(table) != size:
            raise ValueError(f"{base} has {len(table)} rows, the manifest says {size}; {REMEDY}")
        return table if columns is None else table.select(list(columns))

    def text(self, columns: Sequence[str]) -> pa.Table:
        """The named text columns, one row per item from id 1 on; missing text is "".

        Raises:
            ValueError: a name is not a text column of this dataset.
        """
        known = self.manifest["text_columns"]
        unknown = [name for name in columns if name not in known]
        if unknown:
            raise ValueError(f"{self.root}: no text column {', '.join(unknown)}; it has {', '.join(known)}")
        return self._rows_by_id("items.parquet", "item_id", self.num_items, columns)

    def sequence_files(self, split: str) -> list[Path]:
        """The files of a part ("train", "valid" or "test"), in order.

        Raises:
            ValueError: `split` is not one of the three parts.
        """
        if split not in SPLITS:
            raise ValueError(f"part {split!r} is not one of {', '.join(SPLITS)}")
        return [
            self.root / name for name in sorted(self.manifest["files"]) if name.startswith(f"sequences/{split}/part-")
        ]

    def row_groups(self, split: str, since: int | None = None) -> list[RowGroup]:
        """All row groups of a part, in order of file and of position in it.

        since: leave out users without an event of the part from this second on. Only merged sequences support this;
            for sequences in Parquet files, all groups are returned.
        """
        if self._is_merged:
            return list(self._user_groups(split, since))
        groups: list[RowGroup] = []
        for path in self.sequence_files(split):
            with error_location(path):
                facts = pq.ParquetFile(path).metadata
                groups += [FileGroup(path, i, facts.row_group(i).num_rows) for i in range(facts.num_row_groups)]
        return groups

    def _user_groups(self, split: str, since: int | None) -> Iterator[UserGroup]:
        if split not in SPLITS:
            raise ValueError(f"part {split!r} is not one of {', '.join(SPLITS)}")
        count = self._reader(split, since).users.size
        # As in the files of `prepare`: small datasets get smaller groups, so that every rank has at least one to read.
        size = max(1, min(self.manifest["request"]["users_per_row_group"], -(-count // GROUPS_AT_LEAST)))
        for first in range(0, count, size):
            yield UserGroup(split, since, first, min(size, count - first))

    def _reader(self, split: str, since: int | None) -> PartReader:
        if (split, since) not in self._readers:
            self._readers[split, since] = PartReader(self.merged, split, since)
        return self._readers[split, since]

    @property
    def _is_merged(self) -> bool:
        """False if the sequences of the parts are read from Parquet files, as in a new dataset."""
        return "base" in self.manifest

    @cached_property
    def merged(self) -> MergedSequences:
        """Sequences by user.

        Raises:
            ValueError: the dataset is from an earlier release without event files, or an event file is damaged.
        """
        rows, split, base = self.table_rows, self.manifest["split"], chain_base(self.manifest)
        if base is None:
            raise ValueError(f"{self.root}: it has no event files; append events to it, which writes them")
        files = [
            [EventFile.open(self.root / name, rows, one.get("seconds")) for name in one["event_files"]]
            for one in (base, *self.manifest.get("appends", ()))
        ]
        seconds, orders = split.get("cut_timestamps", []), split.get("cut_orders", [])
        cuts = Cuts(split["rule"], split.get("fractions"), seconds, [seconds, orders] == base["cuts"])
        return MergedSequences(files[0], [file for one in files[1:] for file in one], cuts, rows)

    @property
    def table_rows(self) -> TableRows:
        """Number of rows of the tables, and the declared columns; used to check the values of event files."""
        return TableRows(self.num_items, self.num_users, self.num_actions, self.schema)

    def read_row_group(self, path: Path, index: int, columns: Sequence[str] | None = None) -> pa.Table:
        """The validated sequences (`events.sequence_schema`, or its named columns) of one row group.

        Raises ValueError naming file, row group, row and field: see `validation.read_sequences`.
        """
        return read_sequences(path, index, columns, self.table_rows)

    def sequences(self, groups: Sequence[RowGroup], columns: Sequence[str] | None = None) -> Sequences:
        """The decoded rows of the row groups (no groups: no rows). Columns not in `columns` are filled with "unknown".

        Raises ValueError like `read_row_group`.
        """
        if not self._is_merged or not groups:
            return decode_sequences(
                [self.read_row_group(one.path, one.index, columns) for one in groups if isinstance(one, FileGroup)]
            )
        kept = [one for one in groups if isinstance(one, UserGroup)]
        split = kept[0].part
        assert len(kept) == len(groups) and {one.part for one in kept} == {split}, "groups of this dataset and one part"
        names = columns or self._columns
        if len(kept) == 1:
            return self._reader(split, kept[0].since).read(kept[0].first, kept[0].rows, names)
        users = [self._reader(split, one.since).users[one.first : one.first + one.rows] for one in kept]
        return self.merged.read(np.concatenate(users), split, names)

    @property
    def _columns(self) -> list[str]:
        return [column.name for column in self.schema.columns]

    def heads(self, group: RowGroup, since: int = 0) -> RowHeads:
        """Users, lengths and `target_start` of a group's rows, without events; reads one event column of Parquet files.

        since: second UTC before which `RowHeads.before` counts events; 0: `before` is 0.
        """
        if isinstance(group, UserGroup):
            users = self._reader(group.part, group.since).users[group.first : group.first + group.rows]
            return self.merged.heads(users, group.part, since)
        # Only the lengths of the lists are needed, so read the smallest column, the actions, unless `since` needs the
        # times.
        rows = self.sequences([group], ["user_id", "target_start", "timestamps" if since else "actions"])
        before = rows.events_before(since) if since else np.zeros_like(rows.target_start)
        return RowHeads(rows.user_ids, rows.lengths, rows.target_start, before)

    def tails(self, group: RowGroup, skipped: Ints, columns: Sequence[str] | None = None) -> Sequences:
        """A group's rows without the first `skipped` [R] events of each user; Parquet files ignore `skipped`."""
        if not isinstance(group, UserGroup):
            return self.sequences([group], columns)
        users = self._reader(group.part, group.since).users[group.first : group.first + group.rows]
        return self.merged.read(users, group.part, columns or self._columns, skipped)

    def recent(self, split: str, since: int, columns: Sequence[str]) -> Iterator[Events]:
        """Yield the events of a part's rows by group, from second `since` on (0: all; else needs "timestamps")."""
        for group in self.row_groups(split, since) if since else self.row_groups(split):
            rows = (
                self.tails(group, self.heads(group, since).before, columns)
                if since
                else self.sequences([group], columns)
            )
            yield rows[rows.timestamps >= since] if since else rows

    def user_events(self, user_id: int) -> Events:
        """All events of one user, sorted by time; none for a user without events."""
        if chain_base(self.manifest) is not None:
            return self.merged.events_of(np.array([user_id]))[0]
        for split in reversed(SPLITS):  # a row holds the history up to the end of its part
            for path in self.sequence_files(split):
                with error_location(path):
                    rows = pq.read_table(path, filters=[("user_id", "=", user_id)])
                if len(rows):
                    return decode_sequences([rows])[:]
        return Events.at([])

    def training_item_counts(self) -> np.ndarray:
        """Events of each item in train, int64 [num_items]; 0 marks a cold item."""
        if self._is_merged:
            return self.merged.item_counts("train")
        path = self.root / ITEM_COUNTS
        with error_location(path):
            counts = np.load(path, allow_pickle=False)
        if counts.shape != (self.num_items,) or counts.dtype != np.int64 or counts.min() < 0:
            raise ValueError(f"{path} must be int64 [{self.num_items}], no number below 0; {REMEDY}")
        return counts

    def feature_size(self, kind: str, name: str) -> int:
        """Number of ids of a feature, the unknown id 0 included; `kind` is "item" or "user"."""
        self._check_feature(kind, name)
        return int(self.manifest[f"{kind}_features"][name]["size"])

    def feature_ids(self, kind: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """All bags of a feature: (values int64 [total], offsets int64 [rows + 1]), rows = num_items or num_users.

        The bag of id i is values[offsets[i] : offsets[i + 1]]; the unknown id 0 has an empty bag.
        Raises ValueError for a feature that this dataset does not have.
        """
        self._check_feature(kind, name)
        table = self.items if kind == "item" else self.users
        path, column, size = self.root / f"{kind}s.parquet", f"feature_{name}", self.feature_size(kind, name)
        with error_location(path):
            lists = table[column].combine_chunks()
            values = lists.flatten().to_numpy().astype(np.int64)
        if lists.null_count or (values.size and not 0 <= values.min() <= values.max() < size):
            raise ValueError(f"{path}: {column} must hold ids of 0..{size - 1} and no null; {REMEDY}")
        # The second 0 is the empty bag of id 0: the table's rows start at id 1.
        lengths = np.diff(lists.offsets.to_numpy())
        return values, np.concatenate([[0, 0], np.cumsum(lengths)]).astype(np.int64)

    @property
    def all_features(self) -> dict[str, Any]:
        """Name -> manifest entry of all categorical features: of items, users and requests."""
        manifest = self.manifest
        return {**manifest["item_features"], **manifest["user_features"], **manifest.get("context_features", {})}

    def feature_values(self, name: str) -> pa.ChunkedArray:
        """The values of a categorical feature in the order of their ids, from id 1 on.

        Raises ValueError for a feature that this dataset does not have.
        """
        known = self.all_features
        if name not in known:
            raise ValueError(
                f"{self.root}: no item, user or context feature {name!r}; it has {', '.join(known) or 'none'}"
            )
        tables = [read_table(path, ["value"]) for path in self._files(f"features/{name}.parquet")]
        return pa.concat_tables(tables)["value"]

    def _check_feature(self, kind: str, name: str) -> None:
        if kind not in ("item", "user"):
            raise ValueError(f"kind {kind!r} is not one of item, user")
        known = self.manifest[f"{kind}_features"]
        if name not in known:
            raise ValueError(f"{self.root}: no {kind} feature {name!r}; it has {', '.join(known) or 'none'}")


def _newest_rows(tables: list[pa.Table], key: str, size: int, paths: Sequence[Path]) -> pa.Table:
    """One row for each id 1..size, from the last table that has this id.

    Raises:
        ValueError: an id is missing or above `size`; the message names the last of `paths`.
    """
    base, added = len(tables[0]), np.concatenate([table[key].to_numpy() for table in tables[1:]])
    # If the appends only add new rows in order, concatenating the tables is enough.
    if np.array_equal(added, np.arange(base + 1, size + 1)):
        return pa.concat_tables(tables, promote_options="default")  # a source may have no creation times
    if added.size and not 1 <= added.min() <= added.max() <= size:
        raise ValueError(f"{paths[-1]}: {key} must lie in 1..{size}; {REMEDY}")
    row = np.full(size, -1, np.int64)
    row[:base] = np.arange(base)
    row[added - 1] = base + np.arange(added.size)  # an id that is repeated in the table gets its last row
    if (row < 0).any():
        raise ValueError(f"{paths[-1]}: {key} {int((row < 0).argmax()) + 1} is missing; {REMEDY}")
    return pa.concat_tables(tables, promote_options="default").take(pa.array(row))


def base_rate(dataset: Dataset, since: int = 0) -> float:
    """Share of positive labels among training exposures from second `since` on; 0.5 if there are not both labels."""
    total = positive = 0.0
    for events in dataset.recent("train", since, ["labels", "timestamps"] if since else ["labels"]):
        total += np.count_nonzero(~np.isnan(events.labels))
        positive += np.nansum(events.labels, dtype=np.float64)
    rate = positive / total if total else 0.5
    return rate if 0 < rate < 1 else 0.5
