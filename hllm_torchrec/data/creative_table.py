"""`CreativeTable`: a table of personalized texts (creatives) of a dataset; a row is (user, second, item, text).

    <dataset>/creatives/<name>/manifest.json                     counts, writer, marks of the ids, hashes of the files
    <dataset>/creatives/<name>/{train,valid,test}/part-0.parquet rows in the order of their writer
    <dataset>/creatives/<name>/dropped.parquet                   rows that were left out, with reasons
    <dataset>/creatives/.answers/<name>/*.jsonl                  answers of the language model that wrote the rows

Rows contain raw ids. A table can be used with each version of the dataset that has the ids with which the table was
made, with or without further ids.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hllm_torchrec.common.arrays import Floats, Ints
from hllm_torchrec.common.atomic_files import atomic_folder, remove_folder, replace_file
from hllm_torchrec.common.errors import did_you_mean
from hllm_torchrec.common.hashing import hash_file, hash_json
from hllm_torchrec.common.locks import hold_lock, lock_wait
from hllm_torchrec.common.yaml_files import abbreviate
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.split import SPLITS
from hllm_torchrec.data.validation import error_location, read_table
from hllm_torchrec.data.vocabulary import IdMark, dataset_marks, map_problems

FOLDER, MANIFEST, DROPPED, ANSWERS = "creatives", "manifest.json", "dropped.parquet", ".answers"
NAME = re.compile(r"[\w-][\w.-]*")
"""Names of tables."""
_FORMAT = 1
_REMEDY = "build the table again (`hllm creatives`)"

SCHEMA = pa.schema(
    [
        pa.field("raw_user_id", pa.string()),
        pa.field("raw_item_id", pa.string()),
        pa.field("timestamp", pa.int64()),
        pa.field("response", pa.string()),
        pa.field("source", pa.string()),
        pa.field("description", pa.string()),
        pa.field("profile", pa.string()),
        pa.field("weight", pa.float32()),
        pa.field("origin", pa.string()),
    ]
)
"""Columns of a table. timestamp: second (UTC); the user vector reads events of strictly earlier seconds (null: all
events); source, description, profile: texts that a prompt may name (null: the dataset's text column of this name, if it
has one); origin: writer of the text, such as template, llm:MODEL or import:SOURCE."""
CHECKS = pa.field("checks", pa.map_(pa.string(), pa.float32()))
"""Optional column: name -> value of each filter that computes one."""
TEXTS = ("source", "description", "profile")
"""Columns of a table that a prompt may name, in addition to the dataset's text columns."""
NEEDED = ("raw_user_id", "raw_item_id", "response")
"""Columns that the rows for `write_table` must have; other missing columns become null."""


@dataclass(frozen=True)
class CreativeRows:
    """Rows of a part of a table, sorted by user and second.

    user_ids, item_ids: int64 [N] dense ids; timestamps: int64 [N] seconds, or `WHOLE_HISTORY` if the row sees all
    events; weights: float32 [N]; rows: the stored columns of the table, in the same order.
    """

    user_ids: Ints
    item_ids: Ints
    timestamps: Ints
    weights: Floats
    rows: pa.Table

    def __len__(self) -> int:
        return int(self.user_ids.size)


WHOLE_HISTORY = 1 << 40
"""Timestamp of a row that sees all events of its user."""


class CreativeTable:
    """A table of creatives, opened by `open`."""

    def __init__(self, path: Path, manifest: Mapping[str, Any], dataset: Dataset) -> None:
        self.path, self.manifest, self.dataset = path, manifest, dataset

    @classmethod
    def open(cls, dataset: Dataset, name: str) -> "CreativeTable":
        """Open a table of a dataset.

        Raises:
            ValueError: no table has this name, or it is damaged, or it was made with other ids than the dataset's.
        """
        path = table_path(dataset, name)
        file = path / MANIFEST
        if not file.is_file():
            known = sorted(one.parent.name for one in path.parent.glob(f"*/{MANIFEST}"))
            raise ValueError(
                f"{path}: no table of creatives{did_you_mean(name, known)}; there are {', '.join(known) or 'none'}: "
                "make one with `hllm creatives build`"
            )
        with error_location(file, _REMEDY):
            manifest = json.loads(file.read_text(encoding="utf-8"))
            if manifest["format"] != _FORMAT:
                raise ValueError(f"its format is {manifest['format']}, this version reads {_FORMAT}")
            marks = {kind: IdMark.from_json(manifest["vocabulary"][kind]) for kind in ("items", "users")}
            hashes = {str(one): str(manifest["files"][one]) for one in manifest["files"]}
        if problems := map_problems(marks, dataset, marks):
            raise ValueError(
                f"{path}: made with other ids than those of {dataset.root}: {'; '.join(problems)}; {_REMEDY}"
            )
        for one, digest in hashes.items():
            if not (path / one).is_file() or hash_file(path / one) != digest:
                raise ValueError(f"{path / one}: missing or changed since the table was written; {_REMEDY}")
        return cls(path, manifest, dataset)

    @property
    def fingerprint(self) -> str:
        """Hash of the contents of all files of rows, also of those that were left out."""
        return hash_json(self.manifest["files"])

    def part(self, split: str) -> CreativeRows:
        """Read the rows of a part (train, valid or test), which may be empty.

        Raises:
            ValueError: the file is damaged, or a row has an unknown id, an empty text or a bad weight.
        """
        path = self.path / split / "part-0.parquet"
        rows = read_table(path, SCHEMA.names).cast(SCHEMA) if path.is_file() else SCHEMA.empty_table()
        users, items = (dense_ids(rows[f"raw_{kind}_id"], self.dataset, kind, path) for kind in ("user", "item"))
        for row, text in enumerate(rows["response"].to_pylist()):
            if not (text or "").strip():
                raise ValueError(f"{path}, row {row}: response is empty; {_REMEDY}")
        times = pc.fill_null(rows["timestamp"], WHOLE_HISTORY).to_numpy().astype(np.int64)
        order = np.lexsort((np.arange(users.size), times, users))
        weights = pc.fill_null(rows["weight"], 1.0).to_numpy().astype(np.float32)
        if not np.all(np.isfinite(weights) & (weights >= 0)):
            raise ValueError(f"{path}: a weight is negative or not finite; {_REMEDY}")
        return CreativeRows(users[order], items[order], times[order], weights[order], rows.take(pa.array(order)))

    def dropped(self) -> pa.Table:
        """Read the rows that were left out: raw_user_id, raw_item_id, response, reasons (a list).

        Raises:
            ValueError: the file is damaged.
        """
        names = ["raw_user_id", "raw_item_id", "response", "reasons"]
        path = self.path / DROPPED
        return read_table(path, names) if path.is_file() else pa.table({name: [] for name in names})


def table_path(dataset: Dataset, name: str) -> Path:
    """Return the folder of a table."""
    return dataset.root / FOLDER / name


def check_name(name: str) -> None:
    """Raise ValueError for a name that `NAME` does not allow, such as one with a slash."""
    if not NAME.fullmatch(name):
        raise ValueError(f"--name {name!r}: must consist of letters, digits, '-', '_' and '.', and not begin with '.'")


def check_fractions(fractions: Sequence[float]) -> None:
    """Raise ValueError if a share is negative, the shares do not sum to 1, or the share of train is 0."""
    if not (min(fractions) >= 0 and abs(sum(fractions) - 1) <= 1e-6 and fractions[0]):  # NaN fails every comparison
        raise ValueError(
            f"--fractions {fractions}: give three shares that sum to 1, none negative, the share of train above 0"
        )


def dense_ids(raw: pa.ChunkedArray, dataset: Dataset, kind: str, where: object) -> Ints:
    """Return the dense ids, int64 [N], of raw user or item ids.

    Raises:
        ValueError: a raw id is unknown; names the first such row, in `where`.
    """
    known = (dataset.users if kind == "user" else dataset.items)[f"raw_{kind}_id"]
    found = pc.index_in(raw.combine_chunks().cast(known.type), value_set=known.combine_chunks())
    missing = np.flatnonzero(pc.is_null(found).to_numpy(zero_copy_only=False))
    if missing.size:
        wrong = raw[int(missing[0])].as_py()
        hint = "" if wrong is None else did_you_mean(wrong, [text for text in known.to_pylist() if text])
        what = f"{where}, row {missing[0]}: raw_{kind}_id {abbreviate(wrong)}"
        raise ValueError(f"{what}: not in {dataset.root}{hint}; correct the id, or remove the row")
    return found.to_numpy(zero_copy_only=False).astype(np.int64) + 1


def write_table(
    dataset: Dataset,
    name: str,
    parts: Mapping[str, pa.Table],
    dropped: pa.Table | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write a table in one atomic step; returns its folder.

    Args:
        parts: rows of each part, with at least the columns `NEEDED`.
        dropped: rows that were left out, with a column `reasons`.
        facts: further entries of the manifest.

    Raises:
        ValueError: a table of this name exists, a needed column is missing, a user is in two parts, or an id is
            unknown.
    """
    path = table_path(dataset, name)
    complete = {split: _complete(parts[split], split) for split in SPLITS if split in parts}
    _check_users(complete, path)
    path.parent.mkdir(exist_ok=True)
    # Without the lock, two processes could both find no table and write one; the second's would be lost silently.
    with hold_lock(path.parent / ".lock", f"{path}: another process is writing a table", wait=lock_wait()):
        if path.exists():
            raise ValueError(f"{path}: exists; choose another --name, or remove it")
        _write_files(dataset, path, complete, dropped, facts or {})
    return path


def _write_files(
    dataset: Dataset, path: Path, parts: Mapping[str, pa.Table], dropped: pa.Table | None, facts: Mapping[str, Any]
) -> None:
    marks = dataset_marks(dataset)
    with atomic_folder(path, marker=MANIFEST) as folder:
        files = {}
        for split, rows in parts.items():
            for kind in ("user", "item"):
                dense_ids(rows[f"raw_{kind}_id"], dataset, kind, f"{path.name}, {split}")
            (folder / split).mkdir(parents=True)
            pq.write_table(rows, folder / split / "part-0.parquet")
            files[f"{split}/part-0.parquet"] = hash_file(folder / split / "part-0.parquet")
        if dropped is not None and len(dropped):
            pq.write_table(dropped, folder / DROPPED)
            files[DROPPED] = hash_file(folder / DROPPED)
        manifest = {
            "format": _FORMAT,
            "name": path.name,
            "counts": {split: len(rows) for split, rows in parts.items()},
            "users": {split: pc.count_distinct(rows["raw_user_id"]).as_py() for split, rows in parts.items()},
            "dataset": {"version": dataset.version, "fingerprint": dataset.fingerprint},
            "vocabulary": {kind: marks[kind].to_json() for kind in ("items", "users")},
            "files": files,
            **facts,
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def forget_in_tables(root: Path, users: Sequence[str], items: Sequence[str], dry_run: bool = False) -> int:
    """Remove the rows of users and items (raw ids) from all tables of the dataset in `root`.

    If a table changes, the tokens of all tables are removed as well, because tokens contain the same texts. The answers
    of writers about these users and items are removed, too. Returns the number of rows and answers; dry_run: only
    count them.

    Raises:
        ValueError: a table is damaged.
    """
    found = sum(_forget_answers(folder, users, items, dry_run) for folder in (root / FOLDER / ANSWERS).glob("*/"))
    for file in sorted((root / FOLDER).glob(f"*/{MANIFEST}")):
        with error_location(file, _REMEDY):
            manifest = json.loads(file.read_text(encoding="utf-8"))
            names = list(manifest["files"])
        kept, before = {}, found
        for name in names:
            rows = read_table(file.parent / name)
            gone = pc.or_(
                *(
                    pc.is_in(rows[f"raw_{kind}_id"], value_set=pa.array(ids, pa.string()))
                    for kind, ids in (("user", users), ("item", items))
                )
            )
            kept[name] = rows.filter(pc.invert(gone))
            found += len(rows) - len(kept[name])
        if dry_run or found == before:
            continue
        _replace(file.parent, manifest, kept)
        for folder in (root / "tokens").glob("creatives-*"):
            remove_folder(folder)
    return found


def answers_lock(folder: Path) -> AbstractContextManager[None]:
    """Context manager that holds the lock of a folder of answers. Raises Locked if another process holds it."""
    return hold_lock(folder / ".lock", f"{folder}: another process is building this table")


def _forget_answers(folder: Path, users: Sequence[str], items: Sequence[str], dry_run: bool) -> int:
    """Remove the answers about users and items from the files in a folder; return their number."""
    found, forgotten_users, forgotten_items = 0, set(users), set(items)
    with answers_lock(folder):  # even if there is no answer yet: a running build would write one about a forgotten user
        for file in sorted(folder.glob("*.jsonl")):
            with error_location(file, "remove the file (its answers are then asked for again)"):
                # A killed build may leave an incomplete last line, which has no newline; it is dropped.
                lines = file.read_bytes().split(b"\n")[:-1]
                facts = [(one["user"], one["item"]) for one in map(json.loads, lines)]
                gone = [user in forgotten_users or item in forgotten_items for user, item in facts]
                kept = [f"{line.decode()}\n" for line, is_gone in zip(lines, gone, strict=True) if not is_gone]
            if any(gone) and not dry_run:
                replace_file(file, "".join(kept))
            found += sum(gone)
    return found


def _replace(path: Path, manifest: dict[str, Any], files: Mapping[str, pa.Table]) -> None:
    with atomic_folder(path, replace=True, marker=MANIFEST) as folder:
        for name, rows in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(rows, folder / name)
            manifest["files"][name] = hash_file(folder / name)
            if (split := name.partition("/")[0]) in manifest["counts"]:
                manifest["counts"][split] = len(rows)
                manifest["users"][split] = pc.count_distinct(rows["raw_user_id"]).as_py()
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _complete(rows: pa.Table, split: str) -> pa.Table:
    """Return the rows with the columns `SCHEMA`, and `CHECKS` if `rows` has it; missing columns are null."""
    for name in NEEDED:
        if name not in rows.column_names:
            raise ValueError(f"creatives of {split}: no column {name!r}; the rows need {', '.join(NEEDED)}")
    columns = [
        rows[field.name].cast(field.type) if field.name in rows.column_names else pa.nulls(len(rows), field.type)
        for field in SCHEMA
    ]
    complete = pa.table(columns, schema=SCHEMA)
    if CHECKS.name in rows.column_names:
        complete = complete.append_column(CHECKS, rows[CHECKS.name].cast(CHECKS.type))
    return complete


def _check_users(parts: Mapping[str, pa.Table], path: Path) -> None:
    """Raise ValueError if a user is in two parts: a model would be tested on users that it was trained on."""
    seen: dict[str, str] = {}
    for split, rows in parts.items():
        for user in pc.unique(rows["raw_user_id"]).to_pylist():
            if seen.setdefault(user, split) != split:
                raise ValueError(
                    f"{path}: user {abbreviate(user)} is in {seen[user]} and {split}: all rows of a user "
                    "go into one part"
                )


def split_by_user(raw_user_ids: Sequence[str], fractions: Sequence[float]) -> Iterator[str]:
    """Yield the part of each row, drawn by a hash of the row's user, so that all rows of a user are in one part."""
    bounds = np.cumsum(fractions)
    for user in raw_user_ids:
        place = int(hash_json([0, user])[:13], 16) / 2**52
        yield SPLITS[int(np.searchsorted(bounds[:2], place, side="right"))]
