"""`Source` and `Chunk`: the interface between the sources and `prepare`.

A source is a dataclass instance, not a subclass: the static facts of a published dataset and three functions that
stream it in chunks. For a bad *value*, reading raises no error but passes on null or NaN, to which `prepare` applies
the policy of `hllm_torchrec.data.bad_rows`. For a file that is not in its format, reading raises ValueError.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from hllm_torchrec.common.hashing import hash_files, hash_texts
from hllm_torchrec.data.bad_rows import BadRows
from hllm_torchrec.data.event_schema import EventSchema
from hllm_torchrec.data.sources.dialect import NULL_WORDS
from hllm_torchrec.data.sources.values import as_id_strings


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one file.

    `table` has, by kind of file:

    - events: `raw_user_id`, `raw_item_id` string (null or empty: missing); `timestamp` int64, seconds UTC (null:
      unparsable, or the source has no timestamps); `time_text` string, the value in the file; `label` float32 (null:
      not an exposure; NaN: unreadable); `text_of_label` string, the label in the file; `action` int32 (0: unknown);
      `row` int64; and the columns of the source's schema: numbers as float32 (null: not defined or unknown; NaN:
      unreadable), categorical context as string;
    - items: `raw_item_id`, the source's text columns (string), optional `created_at` int64 seconds and `active`
      bool, its features (list<string>), `row`;
    - users: `raw_user_id`, its features (list<string>), `row`.

    `row` counts from 1 and includes a header line, so it is the line number if no cell contains a line break. `size` is
    the number of bytes of the file that this chunk covers (for the progress bar), `dialect` describes how the file is
    read (for the summary).
    """

    path: Path
    table: pa.Table
    size: int = 0
    dialect: str = ""


@dataclass(frozen=True)
class Source:
    """A dataset to prepare: static facts, and three functions; each call of one streams its chunks from the start."""

    name: str
    """Short name, written to the manifest."""
    event_files: tuple[Path, ...]
    """Files that hold the events, in reading order."""
    other_files: tuple[Path, ...]
    """Files that hold items and users."""
    events: Callable[[], Iterator[Chunk]]
    items: Callable[[], Iterator[Chunk]]
    text_columns: tuple[str, ...]
    label_rule: str
    """Rule of the label in words, e.g. "rating >= 4"."""
    action_names: dict[int, str]
    """Name of each action number from 1 on; 0 is always unknown."""
    users: Callable[[], Iterator[Chunk]] = partial(iter, ())
    item_features: tuple[str, ...] = ()
    user_features: tuple[str, ...] = ()
    schema: EventSchema = field(default_factory=EventSchema)
    """Labels of several kinds, weight, sampling rate and context; by default one binary label."""
    is_labelled: bool = True
    """False: every event is positive."""
    has_timestamps: bool = True
    """False: the row order is used as time (see `prepare`)."""
    keep_items_without_events: bool = True
    """False: items without an event are dropped; for a catalogue far larger than the set of items with events."""
    min_events: int = 0
    """k of the k-core filter in the published protocol; 0: no filter."""
    policy: BadRows = field(default_factory=BadRows)
    """Default policy, chosen for the published files of this source; the argument `policy` of `prepare` replaces it."""
    options: dict[str, object] = field(default_factory=dict)
    """Reader options that change the result (`prepare` stores them in the manifest's `request`); JSON values."""
    license_note: str = ""

    def fingerprint(self) -> str:
        """Hash of the names and contents of all files."""
        hashes = hash_files([*self.event_files, *self.other_files], "checking files")
        return hash_texts(f"{path.name} {sha256}" for path, sha256 in hashes.items())


def event_table(
    rows: np.ndarray,
    user: pa.Array,
    item: pa.Array,
    timestamp: pa.Array | None,
    time_text: pa.Array | None,
    label: np.ndarray | pa.Array,
    action: np.ndarray,
    label_text: pa.Array | None = None,
    nulls: tuple[str, ...] = NULL_WORDS,
) -> pa.Table:
    """The events of one chunk in the layout of `Chunk`. If `timestamp` is None, the column is null in every row.

    nulls: words that stand for a missing id.
    """
    n = len(rows)
    return pa.table(
        {
            "raw_user_id": as_id_strings(user, "user", nulls),
            "raw_item_id": as_id_strings(item, "item", nulls),
            "timestamp": pa.nulls(n, pa.int64()) if timestamp is None else timestamp,
            "time_text": pa.nulls(n, pa.string()) if time_text is None else time_text.cast(pa.string()),
            "label": pa.array(label, pa.float32()) if isinstance(label, np.ndarray) else label,
            "text_of_label": pa.nulls(n, pa.string()) if label_text is None else label_text.cast(pa.string()),
            "action": pa.array(action.astype(np.int32)),
            "row": pa.array(rows, pa.int64()),
        }
    )


def require_files(paths: Sequence[Path], what: str) -> None:
    """Raise ValueError that lists the missing files of `paths`; `what` is the name of their dataset."""
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise ValueError(f"{what}: file not found: {', '.join(missing)}. Correct the path")
