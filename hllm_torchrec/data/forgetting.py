"""`forget`: removes users and items from every version of a dataset; their numbers remain reserved as tombstones.

Files of a version are never changed. Each file with an event or a row of a forgotten id is written again without it,
into `bases/<version>` of a new version, and the manifests of all versions with a forgotten id are replaced by manifests
that name the new files (`data.rewriting`). So no reader of any version finds the events, and all other ids keep their
numbers. `prune` removes the old files later; with `erase` they are removed at once.

If the process is killed, each version either still has all the ids or none of them; the same call completes the work.
"""

import logging
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.common.atomic_files import remove_folder
from hllm_torchrec.common.urls import cache_folder
from hllm_torchrec.data.creative_table import forget_in_tables
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.rewriting import TABLES, Rewriting, table_of
from hllm_torchrec.data.tombstones import FORGOTTEN, ITEMS, USERS, Row, Tombstones
from hllm_torchrec.data.validation import read_table
from hllm_torchrec.data.versions import (
    BASES,
    commit_version,
    draft_folder,
    finish_replacements,
    kept_versions,
    newest_version,
    plan_replacements,
    remove_superseded,
    superseded_fingerprints,
    version_name,
    write_lock,
)
from hllm_torchrec.data.vocabulary import id_digest, row_digests

logger = logging.getLogger(__name__)
TOKENS, VECTORS = "tokens", "vectors"


@dataclass(frozen=True)
class Names:
    """Raw ids of users and items to forget."""

    users: Sequence[str] = ()
    items: Sequence[str] = ()

    def of(self, name: str) -> Sequence[str]:
        """The raw ids for one table, "users" or "items"."""
        return self.users if name == USERS else self.items


@dataclass
class DatasetReport:
    """Result of `forget`, or of its dry run.

    numbers: table -> raw id -> number (0: the newest version does not have the id); found: kind -> number of changed
    versions, of removed rows, of removed events, ...; version: the new version, None if none was written; freed: bytes
    of removed files.
    """

    numbers: dict[str, dict[str, int]] = field(default_factory=dict)
    found: Counter[str] = field(default_factory=Counter)
    version: int | None = None
    freed: int = 0

    def ids(self, name: str) -> Ints:
        """Ascending numbers of the ids of a table that the dataset has."""
        return np.array(sorted({number for number in self.numbers[name].values() if number}), np.int64)


def forget(root: Path, names: Names, *, erase: bool = False, dry_run: bool = False) -> DatasetReport:
    """Forget ids in every version of the dataset in `root`; unknown ids are recorded too, to be left out of later
    sources.

    Args:
        erase: also remove the old files and, if items are forgotten, all token stores, and set the items' rows of
            vectors to 0, so that no byte of the ids is left.
        dry_run: only report what would be done.

    Raises:
        ValueError: `root` is not the folder of a dataset, the dataset is damaged, or another process is writing to it.
    """
    with write_lock(root):
        dataset = Dataset.open(root)
        finder = _NumberFinder(root, names)
        report = DatasetReport(finder.numbers(dataset.manifest))
        _rewrite(dataset, finder, names, report, erase, dry_run)
        if creatives := forget_in_tables(root, names.users, names.items, dry_run):
            report.found["creatives"] += creatives
        if erase:
            _erase(root, report, dry_run)
    return report


class _NumberFinder:
    """Finds the numbers of raw ids in versions of a dataset; a file that several versions share is read once."""

    def __init__(self, root: Path, names: Names) -> None:
        self._root = root
        self._wanted = {name: list(dict.fromkeys(names.of(name))) for name in TABLES}
        self._in_file: dict[str, dict[str, int]] = {}
        self._tombstones: dict[str, Tombstones] = {}

    def numbers(self, manifest: dict[str, Any]) -> dict[str, dict[str, int]]:
        """Table -> raw id -> number in a version, also of forgotten ids; 0 if the version does not have the id."""
        found, tombstones = {}, self.tombstones(manifest)
        for name, wanted in self._wanted.items():
            numbers = {raw: tombstones.find(name, raw) or 0 for raw in wanted}
            for file in manifest["files"] if wanted else ():
                if table_of(file) == name:
                    numbers |= self._numbers_in(file, name)
            found[name] = numbers
        return found

    def tombstones(self, manifest: dict[str, Any]) -> Tombstones:
        """The tombstones of a version."""
        file = manifest.get(FORGOTTEN, "")
        if file not in self._tombstones:
            self._tombstones[file] = Tombstones.read(self._root, manifest)
        return self._tombstones[file]

    def _numbers_in(self, file: str, name: str) -> dict[str, int]:
        if file not in self._in_file:
            key, raw = TABLES[name]
            table, wanted = read_table(self._root / file, [key, raw]), pa.array(self._wanted[name], pa.string())
            rows = table.filter(pc.is_in(table[raw].cast(pa.string()), wanted))
            self._in_file[file] = dict(zip(rows[raw].to_pylist(), rows[key].to_pylist(), strict=True))
        return self._in_file[file]


def _rewrite(
    dataset: Dataset, finder: _NumberFinder, names: Names, report: DatasetReport, erase: bool, dry_run: bool
) -> None:
    """Commit a version without the ids, then replace the manifests of all other versions that have them."""
    root, version, changed = dataset.root, newest_version(dataset.root) + 1, {}
    vectors = list(_vector_tombstones(dataset, report)) if erase else []
    with draft_folder(root, BASES, version) as folder:
        rewriting = Rewriting(root, folder, f"{BASES}/{version_name(version)}")
        for number, own_manifest in sorted(kept_versions(root).items(), reverse=True):
            one = Dataset(root, own_manifest)
            # Found per version, because an older version may be of another dataset (`--overwrite`) with other numbers.
            numbers, before = finder.numbers(own_manifest), finder.tombstones(own_manifest)
            rows = [(name, n, id_digest(raw)) for name, own in numbers.items() for raw, n in own.items()]
            tombstones = before.with_rows(rows + vectors)
            is_newest, has_any = number == dataset.version, any(n for own in numbers.values() for n in own.values())
            found = rewriting.without(one, {name: np.array([*own.values()], np.int64) for name, own in numbers.items()})
            report.found["versions"] += found is not None
            # No event or row changes, but the tombstones do: they must be in the manifest of the newest version and of
            # each version that has one of the ids.
            if found is None and (is_newest or has_any) and tombstones != before:
                found = rewriting.as_chain(one)
            if found is not None:
                changed[number] = rewriting.with_tombstones(_without_notes(found, names), number, tombstones)
        report.found += rewriting.removed
        if dry_run or not changed:
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            return
        newest = changed.get(dataset.version) or rewriting.with_tombstones(
            rewriting.as_chain(dataset), dataset.version, dataset.tombstones
        )
        rewriting.remove_unlisted((newest, *changed.values()))
    plan_replacements(root, version, changed)
    commit_version(root, version, {name: value for name, value in newest.items() if name != "added"})
    finish_replacements(root)
    report.version = version
    logger.info("%s: version %d", root, version)


def _vector_tombstones(dataset: Dataset, report: DatasetReport) -> Iterator[Row]:
    """Yield the tombstones of the forgotten items' rows in the files of item vectors."""
    for path, vectors in _vector_files(dataset.root):
        erased = dataset.tombstones.digests(f"{VECTORS}/{path.stem}")
        for number in report.ids(ITEMS).tolist():
            if number < len(vectors) and number not in erased:
                yield f"{VECTORS}/{path.stem}", number, next(row_digests(vectors, number, number + 1))


def _without_notes(manifest: dict[str, Any], names: Names) -> dict[str, Any]:
    """The manifest without the notes that contain one of the raw ids."""
    words = [re.compile(rf"(?<![\w-]){re.escape(raw)}(?![\w-])") for raw in (*names.users, *names.items)]
    notes = [note for note in manifest.get("notes", ()) if not any(word.search(str(note)) for word in words)]
    return {**manifest, "notes": notes} if "notes" in manifest else manifest


def _vector_files(root: Path) -> Iterator[tuple[Path, np.ndarray]]:
    """Yield the path and the memory-mapped array of each file of item vectors in the dataset's folder."""
    for path in sorted((root / VECTORS).glob("*.npy")):
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
        if vectors.ndim == 2:
            yield path, vectors


def _erase(root: Path, report: DatasetReport, dry_run: bool) -> None:
    """Remove old files, tokens, cached files, and rows of vectors."""
    items = report.ids(ITEMS)
    for path, vectors in _vector_files(root):
        rows = [row for row in items[items < len(vectors)].tolist() if np.asarray(vectors[row]).any()]
        report.found["rows of vectors"] += len(rows)
        if rows and not dry_run:
            erased = np.array(vectors)
            erased[rows] = 0
            temporary = path.with_name(f"{path.name}.erasing")
            with temporary.open("wb") as file:
                np.save(file, erased)
            temporary.replace(path)
    if items.size and (root / TOKENS).is_dir():
        report.found["token stores"] += len(list((root / TOKENS).iterdir()))
        if not dry_run:
            remove_folder(root / TOKENS)
    if not dry_run:
        for fingerprint in superseded_fingerprints(root):
            remove_folder(cache_folder(f"derived from {fingerprint}"))
        report.freed = remove_superseded(root)
