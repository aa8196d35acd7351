"""Rewriting of a version's files without some users and items, for `data.forgetting`.

If a part of a version (its base or an append) has an event or a row of one of these ids, the part moves to a new
folder: files with such events or rows are written again without them, the part's other files are hard-linked. No number
changes; the row of a forgotten id remains, without raw id, texts and features.
"""

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.common.hashing import hash_file
from hllm_torchrec.data.base_events import write_base_events
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.event_files import EventFile, write_event_file
from hllm_torchrec.data.manifest import EVENTS, SCHEMA_VERSION_CHAIN, chain_base, files_of_chain
from hllm_torchrec.data.tombstones import FILE, FORGOTTEN, ITEMS, USERS, Tombstones
from hllm_torchrec.data.validation import TableRows, read_table

TABLES = {USERS: ("user_id", "raw_user_id"), ITEMS: ("item_id", "raw_item_id")}
"""Table -> (column of the numbers, column of the raw ids)."""
Numbers = Mapping[str, Ints]
"""Table ("users" or "items") -> numbers of the ids to leave out."""
Part = dict[str, Any]
"""Entry of a base or an append in a manifest."""


class Rewriting:
    """Rewrites versions of the dataset in `root` into `folder`, which will be the folder `name` of the dataset.

    facts: size and hash of every new file; removed: kind -> number of removed rows and events over all versions, each
    file counted once.
    """

    def __init__(self, root: Path, folder: Path, name: str) -> None:
        self._root, self._folder, self.name = root, folder, name
        self.facts: dict[str, dict[str, Any]] = {}
        self.removed: Counter[str] = Counter()
        self._parts: dict[tuple[str, ...], tuple[Part, Counter[str]]] = {}

    def without(self, dataset: Dataset, numbers: Numbers) -> dict[str, Any] | None:
        """Rewrite a version without the ids; returns its new manifest, None if no file has one of the ids."""
        manifest = self.as_chain(dataset)
        rows, removed, parts = dataset.table_rows, Counter[str](), []
        for old in (manifest["base"], *manifest["appends"]):
            key = old["folder"], *old["event_files"]
            if key not in self._parts:
                self._parts[key] = self._moved(old, manifest, numbers, rows)
                self.removed.update(self._parts[key][1])
            parts.append(self._parts[key][0])
            removed.update(self._parts[key][1])
        if parts == [manifest["base"], *manifest["appends"]]:
            return None
        counts = {name: value - removed[name] if removed[name] else value for name, value in manifest["counts"].items()}
        found = {**manifest, "base": parts[0], "appends": parts[1:], "counts": counts, "parts": {}}
        seconds = [second for part in parts for second in part.get("seconds") or ()]
        if seconds and all("seconds" in part for part in parts):
            found["seconds"] = [min(seconds), max(seconds)]
        return {**found, "files": self._files_of(manifest, parts)}

    def as_chain(self, dataset: Dataset) -> dict[str, Any]:
        """The manifest of a version, converted to the form with a base and appends."""
        manifest = {name: value for name, value in dataset.manifest.items() if name != "event_files"}
        if "base" in manifest:
            return manifest
        files, base = files_of_chain(dataset.manifest), chain_base(dataset.manifest)
        if base is None:  # earlier release without event files
            written = write_base_events(dataset, self._folder / "first")
            names = [f"{self.name}/first/{name}" for name in written["event_files"]]
            files |= {name: self._fact(name) for name in names}
            split = manifest["split"]
            cuts = [split.get("cut_timestamps", []), split.get("cut_orders", [])]
            base = {"folder": "", "event_files": names, "cuts": cuts, "seconds": written["seconds"]}
        chain = {"schema_version": SCHEMA_VERSION_CHAIN, "version": dataset.version, "parent": None, "base": base}
        return {**manifest, **chain, "appends": [], "files": files, "seconds": base["seconds"]}

    def with_tombstones(self, manifest: dict[str, Any], version: int, tombstones: Tombstones) -> dict[str, Any]:
        """Write the tombstones of a version to a file; returns its manifest with this file."""
        name = f"{self.name}/{FILE.format(version)}"
        tombstones.write(self._folder / FILE.format(version))
        files = {one: facts for one, facts in manifest["files"].items() if one != manifest.get(FORGOTTEN)}
        return {**manifest, FORGOTTEN: name, "files": {**files, name: self._fact(name)}}

    def _files_of(self, manifest: dict[str, Any], parts: list[Part]) -> dict[str, dict[str, Any]]:
        """The files of a manifest, with the files of rewritten parts replaced by those of `parts`."""
        pairs = zip((manifest["base"], *manifest["appends"]), parts, strict=True)
        moved = [(old, new) for old, new in pairs if old != new]

        def belongs(name: str, which: int) -> bool:
            folder = _folder_of_table(name)
            return any(folder == pair[which]["folder"] or name in pair[which]["event_files"] for pair in moved)

        kept = {name: facts for name, facts in manifest["files"].items() if not belongs(name, 0)}
        return kept | {name: facts for name, facts in self.facts.items() if belongs(name, 1)}

    def _moved(self, old: Part, manifest: dict[str, Any], numbers: Numbers, rows: TableRows) -> tuple[Part, Counter]:
        """(part without the ids, counts of removed rows and events); the same part if it has none of the ids."""
        removed: Counter[str] = Counter()
        tables = {}
        for name in TABLES:
            file = f"{old['folder']}/{name}.parquet".lstrip("/")
            if file in manifest["files"]:
                tables[file] = _table_without(self._root / file, name, numbers[name], removed)
        files = {name: EventFile.open(self._path(name), rows) for name in old["event_files"]}
        keep = {name: _kept(file, numbers) for name, file in files.items()}
        if all(one is None for one in (*tables.values(), *keep.values())):
            return old, removed
        folder = old["folder"].replace("/", "-") or "base"
        for name in manifest["files"]:
            if _folder_of_table(name) == old["folder"]:
                relative = name.removeprefix(old["folder"]).lstrip("/")
                self._write(name, f"{folder}/{relative}", tables.get(name), manifest)
        events = []
        for number, (name, opened) in enumerate(files.items()):
            new, mask = f"{folder}/{EVENTS}/part-{number:05d}.arrow", keep[name]
            if mask is None:
                self._write(name, new, None, manifest)
            elif not _write_kept(self._folder / new, opened, mask, removed):
                continue
            else:
                self._fact(f"{self.name}/{new}")
            events.append(f"{self.name}/{new}")
        part = {**old, "folder": f"{self.name}/{folder}", "event_files": events}
        if "seconds" in old:
            part["seconds"] = _bounds(
                file.events.timestamps[slice(None) if mask is None else mask]
                for file, mask in zip(files.values(), keep.values(), strict=True)
            )
        if any(name.endswith("items.parquet") and table is not None for name, table in tables.items()):
            part.pop("items_fingerprint", None)  # the texts have changed
        return part | ({"events": old["events"] - removed["events"]} if "events" in old else {}), removed

    def _write(self, old: str, new: str, table: pa.Table | None, manifest: dict[str, Any]) -> None:
        """Write `table` as the file `new` of the folder; if it is None, link the dataset's file `old` there."""
        path = self._folder / new
        path.parent.mkdir(parents=True, exist_ok=True)
        if table is not None:
            pq.write_table(table, path, compression="zstd")
            self._fact(f"{self.name}/{new}")
            return
        try:
            os.link(self._path(old), path)
        except OSError:  # a file system without hard links
            shutil.copyfile(self._path(old), path)
        self.facts[f"{self.name}/{new}"] = manifest["files"][old]

    def _path(self, name: str) -> Path:
        """Path of a file by its name in the dataset; the file may be in the new folder."""
        own = name.removeprefix(f"{self.name}/")
        return self._root / name if own == name else self._folder / own

    def remove_unlisted(self, manifests: Iterable[dict[str, Any]]) -> None:
        """Remove the files of the folder that none of the manifests lists."""
        listed = {name for manifest in manifests for name in manifest["files"]}
        for path in [path for path in self._folder.rglob("*") if path.is_file()]:
            if f"{self.name}/{path.relative_to(self._folder).as_posix()}" not in listed:
                path.unlink()

    def _fact(self, name: str) -> dict[str, Any]:
        """Record and return the size and hash of a file that was written."""
        path = self._path(name)
        self.facts[name] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
        return self.facts[name]


def table_of(name: str) -> str | None:
    """The table ("users" or "items") that a file is a part of; None for other files."""
    folder, _, file = name.rpartition("/")
    stem = file.removesuffix(".parquet")
    return stem if stem in TABLES and stem != file and folder.rpartition("/")[2] != "features" else None


def _folder_of_table(name: str) -> str | None:
    """Folder of the part to which a file of rows or of values of features belongs; None for other files."""
    folder = name.rpartition("/")[0]
    if table_of(name) is not None:
        return folder
    parent, _, last = folder.rpartition("/")
    return parent if last == "features" else None


def _table_without(path: Path, name: str, numbers: Ints, removed: Counter[str]) -> pa.Table | None:
    """Read a table and empty the rows of `numbers` except for the number itself; None if all are already empty."""
    key, raw = TABLES[name]
    table = read_table(path)
    gone = np.isin(table[key].to_numpy(), numbers) & table[raw].is_valid().to_numpy()
    if not gone.any():
        return None
    removed[f"rows of {name}"] += int(gone.sum())
    columns = {}
    for column in table.schema:
        values = table[column.name].combine_chunks()
        columns[column.name] = values if column.name == key else _emptied(values, gone, column.name == raw)
    return pa.table(columns)


def _emptied(values: pa.Array, gone: np.ndarray, is_raw: bool) -> pa.Array:
    """A column with null (raw ids, numbers), "" (texts) or an empty list (features) where `gone` is True."""
    if pa.types.is_list(values.type):
        empty = pa.array([[]], values.type)
    elif pa.types.is_string(values.type) and not is_raw:
        empty = pa.array([""], values.type)
    else:
        empty = pa.nulls(1, values.type)
    index = np.where(gone, len(values), np.arange(len(values)))
    return pa.concat_arrays([values, empty]).take(pa.array(index))


def _bounds(seconds: Iterable[Ints]) -> list[int] | None:
    """The first and the last of all seconds; None if there are none."""
    found = [(int(one.min()), int(one.max())) for one in seconds if one.size]
    return [min(first for first, _ in found), max(last for _, last in found)] if found else None


def _kept(file: EventFile, numbers: Numbers) -> np.ndarray | None:
    """Mask (bool [T]) of the events without any of the ids; None if no event of the file has one."""
    of_user = np.repeat(np.isin(file.user_ids, numbers[USERS]), file.lengths)
    kept = ~(of_user | np.isin(file.events.item_ids, numbers[ITEMS]))
    return None if kept.all() else kept


def _write_kept(path: Path, file: EventFile, kept: np.ndarray, removed: Counter[str]) -> bool:
    """Write the events where `kept` is True as an event file, and count the others; False if no event is left."""
    labels = file.events.labels[~kept]
    removed["events"] += labels.size
    removed["exposures"] += int((~np.isnan(labels)).sum())
    removed["positives"] += int((labels > 0.5).sum())
    before = np.concatenate([[0], np.cumsum(kept)])
    lengths = before[file.offsets[1:]] - before[file.offsets[:-1]]
    # A start is the number of the user's events before a cut; the new start counts only the kept events.
    starts = before[file.offsets[:-1, None] + file.starts] - before[file.offsets[:-1], None]
    rows = lengths > 0
    if rows.any():
        write_event_file(path, file.user_ids[rows], lengths[rows], file.events[kept], starts[rows])
    return bool(rows.any())
