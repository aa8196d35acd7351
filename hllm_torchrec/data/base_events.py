"""Conversion of a dataset of an earlier release: writes event files from the Parquet files of its parts."""

from pathlib import Path
from typing import Any

import numpy as np

from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.event_files import write_event_file
from hllm_torchrec.data.events import Events, Sequences
from hllm_torchrec.data.jagged_arrays import concat_ranges
from hllm_torchrec.data.manifest import EVENTS
from hllm_torchrec.data.split import SPLITS

_EVENTS_AT_ONCE = 4_000_000


def write_base_events(dataset: Dataset, folder: Path) -> dict[str, Any]:
    """Write event files below `folder` for a dataset that has none; returns their names and [first, last] second."""
    seen, valid_start = np.zeros(dataset.num_users, bool), np.full(dataset.num_users, -1, np.int64)
    for group in dataset.row_groups("valid"):
        heads = dataset.sequences([group], ["user_id", "target_start", "actions"])
        valid_start[heads.user_ids] = heads.target_start
    names: list[str] = []
    first, last, kept, size = 2**62, 0, [], 0
    for part in reversed(SPLITS):  # the latest part with a row of a user has all of the user's events
        groups = dataset.row_groups(part)
        for number, group in enumerate(groups):
            rows = dataset.sequences([group])
            own = np.flatnonzero(~seen[rows.user_ids])
            seen[rows.user_ids] = True
            if own.size:
                kept.append(_chosen(rows, own, part, valid_start))
                size += len(kept[-1][2])
            if kept and (size > _EVENTS_AT_ONCE or number + 1 == len(groups)):
                users, lengths, starts = (np.concatenate([one[k] for one in kept]) for k in (0, 1, 3))
                events = Events.concat([one[2] for one in kept])
                names.append(f"{EVENTS}/part-{len(names):05d}.arrow")
                write_event_file(folder / names[-1], users, lengths, events, starts)
                first, last = min(first, int(events.timestamps.min())), max(last, int(events.timestamps.max()))
                kept, size = [], 0
    return {"event_files": names, "seconds": [first, last]}


def _chosen(rows: Sequences, own: np.ndarray, part: str, valid_start: np.ndarray) -> tuple:
    """(user ids, lengths, events, starts [R, 2] of valid and test) of the rows with the indices `own` of a part."""
    users, lengths = rows.user_ids[own], rows.lengths[own]
    test = rows.target_start[own] if part == "test" else lengths
    valid = np.where(valid_start[users] >= 0, valid_start[users], test)
    return users, lengths, rows[concat_ranges(rows.offsets[own], lengths)], np.stack([valid, test], axis=1)
