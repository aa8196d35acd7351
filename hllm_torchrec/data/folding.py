"""Folding of appends, so that reading a base with a year of daily appends costs little more than reading one base.

Two appends of the same level are merged into one of the next level. When the appends together are large compared to
their base, they are merged with it into a new base. So each event is copied only a few times, without parsing text or
looking up ids. The manifest of the new version lists the merged files instead of the original ones; earlier versions
continue to list the original files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hllm_torchrec.data.event_files import EventFile, write_event_file
from hllm_torchrec.data.events import Events
from hllm_torchrec.data.manifest import EVENTS
from hllm_torchrec.data.merging import UserEvents
from hllm_torchrec.data.validation import TableRows, read_table

FACTOR = 2
"""Number of appends of one level that are merged into an append of the next level."""
MOST_EVENTS = 20_000_000
"""Maximum number of events merged in memory. Larger appends, which are few, are not folded."""
OUTGROWN, LEAST_EVENTS = 0.05, 50_000
"""Appends are merged with the base if together they have more than the share OUTGROWN of the base's events, and more
than LEAST_EVENTS events."""


@dataclass(frozen=True)
class Append:
    """Files of an append or of several folded ones: `event_files` in `folder`; other files have fixed names."""

    folder: Path
    event_files: Sequence[str]


def appends_to_fold(appends: Sequence[dict[str, Any]], events: int) -> tuple[int, int]:
    """(number of the newest `appends` to fold with a new append of `events` events, level of the result)."""
    level = taken = 0
    while True:
        same = 0
        while taken + same < len(appends) and appends[-1 - taken - same]["level"] == level:
            same += 1
        more = sum(one["events"] for one in appends[len(appends) - taken - same : len(appends) - taken])
        if same + 1 < FACTOR or events + more > MOST_EVENTS:
            return taken, level
        taken, level, events = taken + same, level + 1, events + more


def is_outgrown(manifest: Mapping[str, Any]) -> bool:
    """True if a version's appends should be folded with its base into a new one."""
    total, appended = manifest["counts"]["events"], sum(one["events"] for one in manifest.get("appends", ()))
    return total <= MOST_EVENTS and appended > max(LEAST_EVENTS, OUTGROWN * (total - appended))


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
    users = np.unique(np.concatenate([file.user_ids for file in files]))
    lengths = np.zeros(users.size, np.int64)
    for file in files:
        lengths[np.searchsorted(users, file.user_ids)] += file.lengths
    names = [column.name for column in rows.schema.columns]
    columns = UserEvents(files, users, rows, in_order=False).read(names, np.zeros_like(lengths), lengths)
    write_event_file(folder / EVENTS / "part-00000.arrow", users, lengths, Events.of_columns(columns))
    return [f"{EVENTS}/part-00000.arrow"]


def _tables(parts: Sequence[Append], name: str) -> list[pa.Table]:
    return [read_table(part.folder / name) for part in parts if (part.folder / name).is_file()]


def _newest(tables: list[pa.Table], key: str) -> pa.Table:
    """The last row of each id, sorted by id."""
    rows = pa.concat_tables(tables, promote_options="default")
    ids = rows[key].to_numpy()
    order = np.argsort(ids, kind="stable")
    last = np.append(np.diff(ids[order]) > 0, True)
    return rows.take(pa.array(order[last]))
