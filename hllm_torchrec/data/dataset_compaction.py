"""`compact`: merges the appends of a dataset into a new base, so that reading is as fast as without appends."""

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.event_files import write_event_file
from hllm_torchrec.data.jagged_arrays import offsets_from_lengths
from hllm_torchrec.data.manifest import EVENTS
from hllm_torchrec.data.tombstones import FORGOTTEN
from hllm_torchrec.data.versions import (
    BASES,
    commit_version,
    draft_folder,
    folder_facts,
    version_name,
    write_lock,
)

logger = logging.getLogger(__name__)
EVENTS_AT_ONCE = 8_000_000
"""Maximum number of events per file, and so in memory at once (more only if a single user has more)."""


def compact(root: Path) -> int | None:
    """Write a version whose base holds all data; returns its number, or None if there are no appends.

    Sequences, ids, texts and parts are the same as in the version before. The files of earlier versions remain until
    `prune`.

    Raises:
        ValueError: the dataset is damaged, or another process is writing to it.
    """
    with write_lock(root):
        dataset = Dataset.open(root)
        return write_base(dataset) if dataset.manifest.get("appends") else None


def write_base(dataset: Dataset) -> int:
    """`compact` for a writer that holds the lock."""
    root, version = dataset.root, dataset.version + 1
    name = f"{BASES}/{version_name(version)}"
    with draft_folder(root, BASES, version) as folder:
        _write_tables(dataset, folder)
        events = _write_events(dataset, folder)
        files = folder_facts(folder, name)
        if FORGOTTEN in dataset.manifest:
            files[dataset.manifest[FORGOTTEN]] = dataset.manifest["files"][dataset.manifest[FORGOTTEN]]
    split = dataset.manifest["split"]
    base = {
        "folder": name,
        "event_files": [f"{name}/{one}" for one in events],
        "cuts": [split.get("cut_timestamps", []), split.get("cut_orders", [])],
        "seconds": dataset.manifest["seconds"],
        "items_fingerprint": dataset.items_fingerprint,
    }
    old = {key: value for key, value in dataset.manifest.items() if key != "added"}
    commit_version(root, version, {**old, "base": base, "appends": [], "files": files})
    logger.info("%s: version %d holds everything in one base", root, version)
    return version


def _write_tables(dataset: Dataset, folder: Path) -> None:
    """Write items, users and the values of each feature, one complete file each."""
    pq.write_table(dataset.items, folder / "items.parquet", compression="zstd")
    pq.write_table(dataset.users, folder / "users.parquet", compression="zstd")
    (folder / "features").mkdir()
    for name in dataset.all_features:
        values = dataset.feature_values(name)
        ids = pa.array(np.arange(1, len(values) + 1), pa.int32())
        pq.write_table(pa.table({"id": ids, "value": values}), folder / "features" / f"{name}.parquet")


def _write_events(dataset: Dataset, folder: Path) -> list[str]:
    """Write the event files, users in ascending order of their ids; returns the files' names."""
    merged = dataset.merged
    names: list[str] = []
    users, lengths, starts = merged.layout()
    for chunk in _chunks(lengths):
        events, _ = merged.events_of(users[chunk])
        names.append(f"{EVENTS}/part-{len(names):05d}.arrow")
        write_event_file(folder / names[-1], users[chunk], lengths[chunk], events, starts[chunk])
    return names


def _chunks(lengths: Ints) -> list[slice]:
    """Slices of consecutive rows with at most EVENTS_AT_ONCE events in total, or of a single longer row."""
    ends, first, found = offsets_from_lengths(lengths), 0, []
    while first < lengths.size:
        last = max(first + 1, int(np.searchsorted(ends, ends[first] + EVENTS_AT_ONCE, side="right")) - 1)
        found.append(slice(first, last))
        first = last
    return found
