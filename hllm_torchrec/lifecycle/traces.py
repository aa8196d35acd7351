"""Removal of forgotten ids from the files and folders that were made from a dataset: runs, stores, predictions, ...

`places` searches folders for files and folders of this library, which it recognizes by their contents. Each
`forget_in_*` removes the ids from one of them, and can be repeated.
"""

import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock

from hllm_torchrec.checkpoint.erased_rows import checkpoints_of
from hllm_torchrec.checkpoint.remote_runs import CHECKPOINTS
from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.common.atomic_files import replace_file
from hllm_torchrec.creative.clusters import FILE as CLUSTERS_FILE
from hllm_torchrec.creative.titles import MARKER as TITLES_MARKER
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.event_log import EventLog, is_event_log
from hllm_torchrec.data.forgetting import Names
from hllm_torchrec.data.manifest import MANIFEST
from hllm_torchrec.data.new_item_journal import LOCK_SECONDS
from hllm_torchrec.data.tombstones import ITEMS, USERS
from hllm_torchrec.data.validation import error_location
from hllm_torchrec.data.vocabulary import map_problems
from hllm_torchrec.evaluation.run_loader import run_config
from hllm_torchrec.inference.exposure_store import exposure_content_hashes, split_exposure_keys
from hllm_torchrec.lifecycle.night_state import NIGHTS
from hllm_torchrec.lifecycle.steps import RUNS
from hllm_torchrec.models.run_vocabulary import saved_marks
from hllm_torchrec.store.keys import plain_numbers
from hllm_torchrec.store.store import EmbeddingStore

STORE, PREDICTIONS, JOURNAL, RUN, INDEX = "store", "predictions", "journal", "run", "index"
EVENTS = "events of a service"
CLUSTERS, TITLES = "clusters of users", "titles"
_ROWS = 65_536


@dataclass(frozen=True)
class Target:
    """Ids to forget: raw ids (`names`), and their ascending numbers in a dataset (`users`, `items`).

    erase: also overwrite or remove the bytes on disk; dry_run: only count.
    """

    names: Names
    dataset: Dataset
    users: Ints
    items: Ints
    erase: bool
    dry_run: bool


@dataclass(frozen=True)
class Place:
    """A file or folder of this library. fits: whether its dense ids are those of the dataset; None: unknown."""

    kind: str
    path: Path
    fits: bool | None


@dataclass(frozen=True)
class Trace:
    """Result for one place.

    found: number of entries with the ids; left: why the place was not searched, or what the operator must do ("":
    nothing).
    """

    place: Path
    kind: str
    found: int
    left: str = ""


def places(folder: Path, dataset: Dataset, fits: bool | None = None) -> Iterator[Place]:
    """Yield a folder, or the files and folders below it, that may contain ids; links are not followed.

    All Parquet and SQLite files are among them, because other programs may have written ids into such files.

    fits: whether dense ids in files that belong to no run or night are those of `dataset`; None: unknown.
    """
    names = {entry.name for entry in os.scandir(folder)}
    if "store.json" in names and "runs" in names:
        yield Place(STORE, folder, fits)
        return
    if MANIFEST in names:  # a dataset: `hllm forget` changes only the one that --dataset names
        return
    if CLUSTERS_FILE in names:
        yield Place(CLUSTERS, folder, fits)
        return
    if TITLES_MARKER in names:
        yield Place(TITLES, folder, fits)
        return
    if "index.faiss" in names:
        yield Place(INDEX, folder, fits)
        return
    if "config.yaml" in names and names & {CHECKPOINTS, "log.jsonl"}:
        fits = _fits(folder, dataset)
        yield Place(RUN, folder, fits)
    elif "state.json" in names and folder.parent.name == NIGHTS:
        fits = _fits(folder.parent.parent / RUNS / folder.name, dataset)
    for name in sorted(names):
        path = folder / name
        if path.is_symlink():
            continue
        if path.is_dir():
            yield from places(path, dataset, fits)
        elif name.endswith(".parquet"):
            yield Place(PREDICTIONS, path, fits)
        elif name.endswith(".jsonl") and _is_journal(path):
            yield Place(JOURNAL, path, fits)
        elif _is_sqlite(path):
            yield Place(EVENTS, path, fits)


def _fits(run: Path, dataset: Dataset) -> bool:
    """True if a run's ids are a prefix of the dataset's; for a run without marks, if its configuration names the
    dataset."""
    for checkpoint in checkpoints_of(run):
        marks = saved_marks(checkpoint)
        if marks is not None:
            return not map_problems(marks, dataset, [USERS, ITEMS])
    try:
        return Path(run_config(run).data.dataset).resolve() == dataset.root.resolve()
    except (ValueError, OSError):
        return False


def _is_journal(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(64).startswith(b'{"journal":')


def _is_sqlite(path: Path) -> bool:
    if not path.is_file():  # a pipe would block
        return False
    with path.open("rb") as file:
        return file.read(16) == b"SQLite format 3\0"


# ------------------------------------------------------------------ stores


def forget_in_store(path: Path, target: Target) -> Trace:
    """Delete the vectors of the ids from a store, and with `erase` also from the disk.

    Raises:
        ValueError: the store is damaged, or another process is writing to it.
    """
    store = EmbeddingStore.open(path)
    part = store.facts.get("part")
    if part == "exposures":
        keys = _exposure_keys(store, target)
    elif part in ("users", "items", "item_features"):
        keys = _raw_keys(store, target.names.users if part == "users" else target.names.items)
    else:
        left = f"a store of {part!r}: delete the ids with `hllm store delete` if they are its keys"
        return Trace(path, STORE, 0, left)
    known = store.snapshot().content_hashes(keys)[1] if len(keys) else np.zeros(0, bool)
    if not target.dry_run and known.any():
        with store.writer() as writer:
            writer.delete(keys)
            writer.commit()
    if not target.dry_run and target.erase:
        store.compact()
    return Trace(path, f"{STORE} of {part}", int(known.sum()))


def _raw_keys(store: EmbeddingStore, raw_ids: Sequence[str]) -> pa.Array:
    if store.kind == "string":
        return pa.array(raw_ids, pa.large_string())
    return pa.array(plain_numbers(raw_ids), pa.int64())


def _exposure_keys(store: EmbeddingStore, target: Target) -> pa.Array:
    """Keys of the users' exposures; if items are forgotten, also keys whose position now has another event.

    The events of a forgotten item were removed from all sequences, so the positions of later exposures have changed.
    """
    found: list[Ints] = []
    for keys, _, hashes in store.snapshot().rows():
        users, positions = split_exposure_keys(keys.to_numpy())
        gone = np.isin(users, target.users)
        if target.items.size:
            gone |= _differs(target.dataset, users, positions, hashes)
        found.append(keys.to_numpy()[gone])
    return pa.array(np.concatenate([np.zeros(0, np.int64), *found]))


def _differs(dataset: Dataset, users: Ints, positions: Ints, hashes: np.ndarray) -> np.ndarray:
    """Mask (bool [n]) of the exposures whose item or second is not that of the dataset's event at their position."""
    distinct, place = np.unique(users, return_inverse=True)
    events, lengths = dataset.merged.events_of(distinct)
    at = (np.cumsum(lengths) - lengths)[place] + positions
    beyond = positions >= lengths[place]
    if not len(events):
        return beyond
    at = np.where(beyond, 0, at)
    return beyond | (exposure_content_hashes(events.item_ids[at], events.timestamps[at]) != hashes)


# ------------------------------------------------------------------ files


def forget_in_predictions(place: Place, target: Target) -> Trace:
    """Rewrite a file of predictions without the rows of the ids.

    Files of `hllm evaluate` contain dense ids of a dataset; files of other programs are searched for the raw ids.
    """
    with error_location(place.path):
        file = pq.ParquetFile(place.path)
    columns = {"user_id", "item_id"} & set(file.schema_arrow.names)
    is_own = {"user_id", "item_id", "position"} <= set(file.schema_arrow.names)
    if is_own and not place.fits:
        unknown = (
            "it is not known which dataset these ids belong to: if to this one, name the folder with --predictions"
        )
        left = "" if place.fits is False else unknown
        return Trace(place.path, f"{PREDICTIONS} of another dataset", 0, left)
    found = 0
    beside = place.path.with_name(f".{place.path.name}.forgetting")
    with pq.ParquetWriter(beside, file.schema_arrow, compression="zstd") as writer:
        for batch in file.iter_batches(_ROWS):
            gone = np.zeros(len(batch), bool)
            for column in columns:
                gone |= _names_id(batch[column], column, target, is_own)
            found += int(gone.sum())
            writer.write_batch(batch.filter(pa.array(~gone)))
    if found and not target.dry_run:
        beside.replace(place.path)
    beside.unlink(missing_ok=True)
    return Trace(place.path, PREDICTIONS, found)


def _names_id(values: pa.Array, column: str, target: Target, is_own: bool) -> np.ndarray:
    numbers, raw = (target.users, target.names.users) if column == "user_id" else (target.items, target.names.items)
    if is_own:
        return np.isin(values.to_numpy(), numbers)
    if pa.types.is_integer(values.type):
        return np.isin(values.to_numpy(zero_copy_only=False), plain_numbers(raw))
    return pc.is_in(values.cast(pa.string()), pa.array(raw, pa.string())).to_numpy(zero_copy_only=False)


def forget_in_journal(path: Path, target: Target) -> Trace:
    """Blank the lines of the items in a journal of new items.

    The file keeps its length, because readers continue at a byte offset.
    """
    if not path.is_file():
        return Trace(path, JOURNAL, 0)
    with FileLock(path.with_suffix(".lock"), timeout=LOCK_SECONDS):
        lines, found = path.read_text(encoding="utf-8").split("\n"), 0
        for number, line in enumerate(lines[:-1]):
            if number and line.strip() and json.loads(line).get("id") in target.names.items:
                lines[number] = " " * len(line.encode())
                found += 1
        if found and not target.dry_run:
            replace_file(path, "\n".join(lines))
    return Trace(path, JOURNAL, found)


def forget_in_events(place: Place, target: Target) -> Trace:
    """Delete the users' and items' events from the event log of a service. A user who returns has an empty history."""
    path = place.path
    if place.fits is False:
        return Trace(path, f"{EVENTS} on another dataset", 0)
    try:
        if not is_event_log(path):
            return Trace(path, "a database of another program", 0)
        with closing(EventLog(path)) as log:
            users, items = dict.fromkeys(target.names.users), dict.fromkeys(target.names.items)
            if target.dry_run:
                return Trace(path, EVENTS, log.number_of(users, items))
            found = log.forget_items([*items])
            return Trace(path, EVENTS, found + sum(log.forget(user) for user in users))
    except (ValueError, sqlite3.Error) as error:
        is_open = "locked" in str(error)
        left = f"look into it: {error}"
        if is_open:
            left = (
                "a service has the file open: reload the service (POST /v1/reload), which deletes the events; or stop "
                "the service and run this command again"
            )
        return Trace(path, EVENTS, 0, left)
