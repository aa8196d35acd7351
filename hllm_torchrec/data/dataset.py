"""`Dataset`: reads a prepared dataset directory.

Layout (written by `prepare`):

    manifest.json                     counts, split, features, fingerprint, sizes of the files
    items.parquet                     item_id int64 dense from 1, raw_item_id, texts, feature_<name> list<int32>
    users.parquet                     user_id int64 dense from 1, raw_user_id, feature_<name> list<int32>
    features/<name>.parquet           id int32 from 1, value: the vocabulary
    training_item_counts.npy          int64 [num_items], events of each item in train
    sequences/<part>/part-*.parquet   one row per user with an event in the part: user_id, target_start, and the
                                      lists item_ids, timestamps, labels, actions of the history to the part's end
    tokens/<fingerprint>/             token stores (`token_store.TokenStore`)
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hllm_torchrec.common.urls import url_of
from hllm_torchrec.data.events import Sequences, decode_sequences
from hllm_torchrec.data.manifest import ITEM_COUNTS, read_manifest
from hllm_torchrec.data.remote_datasets import local_dataset
from hllm_torchrec.data.split import SPLITS
from hllm_torchrec.data.validation import REMEDY, TableRows, error_location, read_sequences, read_table

_NUMBER = re.compile(r"-?\d+(\.\d+)?$")


@dataclass(frozen=True)
class RowGroup:
    """A unit of reading of a part's sequences: file, index of the row group in it, its number of rows (users)."""

    path: Path
    index: int
    rows: int


class Dataset:
    """Reads a dataset directory with the layout in the module docstring. Create one with `Dataset.open`."""

    def __init__(self, root: Path, manifest: dict[str, Any]) -> None:
        self.root = root
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path) -> "Dataset":
        """Open `path`, which may be a URL.

        Raises:
            ValueError: `path` is not a dataset, has another schema version, or has damaged files.
        """
        url = url_of(path)
        root = Path(path) if url is None else local_dataset(url)
        return cls(root, read_manifest(root))

    @property
    def name(self) -> str:
        """The source's name."""
        return str(self.manifest["name"])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the contents of all data files."""
        return str(self.manifest["fingerprint"])

    @property
    def num_items(self) -> int:
        """Rows of an item table: the largest item id + 1, the unknown item 0 included."""
        return int(self.manifest["counts"]["items"]) + 1

    @property
    def num_table_items(self) -> int:
        """Rows of an ID table; ids from there on (`inference.new_items`) read the row of the unknown item."""
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
        """float64 [num_actions] numbers in the actions' names ("rating 4": 4), NaN for names without one ("view")."""
        values = np.full(self.num_actions, np.nan)
        for action, name in self.manifest["actions"]["names"].items():
            number = _NUMBER.search(name)
            values[int(action)] = float(number[0]) if number else np.nan
        return values

    @property
    def visibility(self) -> Literal["second", "position"]:
        """Visibility rule of exposures: earlier seconds (ranking), or earlier positions (leave-one-out retrieval)."""
        return "position" if self.manifest["split"]["rule"] == "leave_one_out" else "second"

    @cached_property
    def items(self) -> pa.Table:
        """`items.parquet`; row i is item i + 1."""
        return self._rows_by_id("items.parquet", "item_id", self.num_items)

    @cached_property
    def users(self) -> pa.Table:
        """`users.parquet`; row i is user i + 1."""
        return self._rows_by_id("users.parquet", "user_id", self.num_users)

    def _rows_by_id(self, name: str, key: str, rows: int) -> pa.Table:
        """A table whose row i has id i + 1; raises ValueError naming the file and the row if it does not."""
        path = self.root / name
        table = read_table(path)
        with error_location(path):
            ids = table[key].to_numpy()
        # Readers index rows by id - 1 without looking at the id column, so a permuted file would give wrong texts.
        wrong = np.flatnonzero(ids != np.arange(1, ids.size + 1))
        if wrong.size:
            raise ValueError(f"{path}, row {wrong[0]}: {key} is {ids[wrong[0]]}, it must be {wrong[0] + 1}; {REMEDY}")
        if ids.size != rows - 1:
            raise ValueError(f"{path} has {ids.size} rows, the manifest says {rows - 1}; {REMEDY}")
        return table

    def text(self, columns: Sequence[str]) -> pa.Table:
        """The named text columns, one row per item from id 1 on; missing text is "".

        Raises:
            ValueError: a name is not a text column of this dataset.
        """
        known = self.manifest["text_columns"]
        unknown = [name for name in columns if name not in known]
        if unknown:
            raise ValueError(f"{self.root}: no text column {', '.join(unknown)}; it has {', '.join(known)}")
        return read_table(self.root / "items.parquet", columns)

    def sequence_files(self, split: str) -> list[Path]:
        """The files of a part ("train", "valid" or "test"), in order.

        Raises:
            ValueError: `split` is not one of the three parts.
        """
        if split not in SPLITS:
            raise ValueError(f"part {split!r} is not one of {', '.join(SPLITS)}")
        return sorted((self.root / "sequences" / split).glob("part-*.parquet"))

    def row_groups(self, split: str) -> list[RowGroup]:
        """All row groups of a part, in order of file and of position in it."""
        groups = []
        for path in self.sequence_files(split):
            with error_location(path):
                facts = pq.ParquetFile(path).metadata
                groups += [RowGroup(path, i, facts.row_group(i).num_rows) for i in range(facts.num_row_groups)]
        return groups

    def read_row_group(self, path: Path, index: int, columns: Sequence[str] | None = None) -> pa.Table:
        """The validated sequences (`events.SEQUENCE_SCHEMA`, or its named columns) of one row group.

        Raises ValueError naming file, row group, row and field: see `validation.read_sequences`.
        """
        return read_sequences(path, index, columns, TableRows(self.num_items, self.num_users, self.num_actions))

    def sequences(self, groups: Sequence[RowGroup], columns: Sequence[str] | None = None) -> Sequences:
        """The decoded rows of the row groups (no groups: no rows); columns that are not named hold "unknown".

        Raises ValueError like `read_row_group`.
        """
        return decode_sequences([self.read_row_group(group.path, group.index, columns) for group in groups])

    def training_item_counts(self) -> np.ndarray:
        """Events of each item in train, int64 [num_items]; 0 marks a cold item."""
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

    def _check_feature(self, kind: str, name: str) -> None:
        if kind not in ("item", "user"):
            raise ValueError(f"kind {kind!r} is not one of item, user")
        known = self.manifest[f"{kind}_features"]
        if name not in known:
            raise ValueError(f"{self.root}: no {kind} feature {name!r}; it has {', '.join(known) or 'none'}")


def base_rate(dataset: Dataset) -> float:
    """Share of positive labels among the training exposures; 0.5 if there is only one class."""
    total = positive = 0.0
    for group in dataset.row_groups("train"):
        labels = dataset.sequences([group], ["labels"]).labels
        total += np.count_nonzero(~np.isnan(labels))
        positive += np.nansum(labels, dtype=np.float64)
    rate = positive / total if total else 0.5
    return rate if 0 < rate < 1 else 0.5
