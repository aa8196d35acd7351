"""Folding of appends: of every eight appends of a level one of the next is made, so that a year has a dozen, not 365.

A version's manifest lists the folded files in the place of those that they hold; earlier versions keep their own. What
it costs falls on every eighth append, and is a copy of columns: no text is parsed and no id looked up.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hllm_torchrec.data.event_files import EventFile, consolidate, write_event_file
from hllm_torchrec.data.manifest import EVENTS
from hllm_torchrec.data.validation import TableRows, read_table

FACTOR = 8
"""Number of appends of a level that one of the next level holds."""
MOST_EVENTS = 20_000_000
"""Largest number of events of a folded append; larger ones are few, and folding is done in memory."""


@dataclass(frozen=True)
class Append:
    """Files that an append, or several folded ones, added: `event_files` below `folder`; others by their names."""

    folder: Path
    event_files: Sequence[str]


def appends_to_fold(appends: Sequence[dict[str, Any]], events: int) -> tuple[int, int]:
    """(number of the last entries of `appends` to fold with a new one of so many events, level of the result)."""
    level = taken = 0
    while True:
        same = 0
        while taken + same < len(appends) and appends[-1 - taken - same]["level"] == level:
            same += 1
        more = sum(one["events"] for one in appends[len(appends) - taken - same : len(appends) - taken])
        if same + 1 < FACTOR or events + more > MOST_EVENTS:
            return taken, level
        taken, level, events = taken + same, level + 1, events + more


def fold_appends(parts: Sequence[Append], folder: Path, rows: TableRows) -> list[str]:
    """Write one append with the contents of `parts`, in the order of the versions, into the empty `folder`.

    Returns the names of its event files.

    Raises:
        ValueError: a file is damaged.
    """
    for name, key in (("items", "item_id"), ("users", "user_id")):
        tables = _tables(parts, f"{name}.parquet")
        if tables:
            pq.write_table(_newest(tables, key), folder / f"{name}.parquet", compression="zstd")
    features = sorted({path.name for part in parts for path in (part.folder / "features").glob("*.parquet")})
    for name in features:
        (folder / "features").mkdir(exist_ok=True)
        pq.write_table(pa.concat_tables(_tables(parts, f"features/{name}")), folder / "features" / name)
    files = [EventFile.open(part.folder / name, rows) for part in parts for name in part.event_files]
    if not files:
        return []
    every = consolidate(files, rows)
    write_event_file(folder / EVENTS / "part-00000.arrow", every.user_ids, every.lengths, every.events)
    return [f"{EVENTS}/part-00000.arrow"]


def _tables(parts: Sequence[Append], name: str) -> list[pa.Table]:
    return [read_table(part.folder / name) for part in parts if (part.folder / name).is_file()]


def _newest(tables: list[pa.Table], key: str) -> pa.Table:
    """The last row of each id, by id."""
    whole = pa.concat_tables(tables, promote_options="default")
    ids = whole[key].to_numpy()
    order = np.argsort(ids, kind="stable")
    last = np.append(np.diff(ids[order]) > 0, True)
    return whole.take(pa.array(order[last]))
