"""PixelRec (Pixel200K, Pixel1M, Pixel8M): an interaction CSV file and the item information CSV file.

Interactions: `item_id,user_id,timestamp`. Item information: `item_id`, counters that are not read, `title`,
`tag`, `description`. The data is implicit: every event is an exposure with label 1 and action 1. The item
file covers all of PixelRec, so only items with an event are kept.

The timestamps are seconds UTC, as in HLLM's Algorithm 1. For a copy in milliseconds set `time_unit` (if milliseconds
are read as seconds, an error suggests this).
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from hllm_torchrec.data.sources.base import (
    Chunk,
    Source,
    event_table,
    require_files,
)
from hllm_torchrec.data.sources.columnar import read_csv
from hllm_torchrec.data.sources.values import as_id_strings, parse_seconds, require_time_unit

TEXT_COLUMNS = ("title", "tag", "description")


def pixelrec(interactions: str | Path, items: str | Path, *, time_unit: str = "seconds") -> Source:
    """PixelRec from its interaction file, which also names the dataset, and its item information file."""
    event_file, item_file = Path(interactions), Path(items)
    require_files([event_file, item_file], "PixelRec")
    require_time_unit(time_unit)
    return Source(
        name=event_file.stem.lower(),
        event_files=(event_file,),
        other_files=(item_file,),
        events=partial(_events, event_file, time_unit),
        items=partial(_items, item_file),
        text_columns=TEXT_COLUMNS,
        item_features=("tag",),
        label_rule="every event is positive (implicit feedback)",
        action_names={1: "interaction"},
        is_labelled=False,
        keep_items_without_events=False,
        options={"time_unit": time_unit},
        license_note="PixelRec (c) Westlake University: for research; terms: its repository.",
    )


def _events(path: Path, time_unit: str) -> Iterator[Chunk]:
    for rows, table, size, dialect in read_csv(path, ["item_id", "user_id", "timestamp"]):
        time = table["timestamp"].combine_chunks()
        ones = np.ones(len(rows))
        users, items = table["user_id"], table["item_id"]
        seconds = parse_seconds(time, time_unit)
        events = event_table(rows, users, items, seconds, time, ones.astype(np.float32), ones)
        yield Chunk(path, events, size, dialect)


def _items(path: Path) -> Iterator[Chunk]:
    for rows, table, size, dialect in read_csv(path, ["item_id", *TEXT_COLUMNS]):
        columns = {"raw_item_id": as_id_strings(table["item_id"], "item")}
        columns |= {name: table[name] for name in TEXT_COLUMNS}
        tags = [[tag.strip()] if tag and tag.strip() else [] for tag in table["tag"].to_pylist()]
        columns["feature_tag"] = pa.array(tags, pa.list_(pa.string()))
        yield Chunk(path, pa.table({**columns, "row": rows}), size, dialect)
