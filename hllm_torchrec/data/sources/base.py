"""`Source` and `Chunk`: the interface between the sources and `prepare`.

A source is a value, not a base class: the static facts of a published dataset and three functions that stream it in
chunks. Reading does not raise for a bad *value* (a null or NaN is passed on, and `prepare` applies the policy of
`hllm_torchrec.data.bad_rows`); it raises ValueError for a file that is not in its format.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hllm_torchrec.data.bad_rows import BadRows

TIME_UNITS = {"seconds": 1, "milliseconds": 1_000, "microseconds": 1_000_000, "iso8601": 0}
_NUMBER = r"^\s*[-+]?\d+(\.\d*)?([eE][-+]?\d+)?\s*$"


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one file.

    `table` has, by kind of file:

    - events: `raw_user_id`, `raw_item_id` string (null or empty: missing); `timestamp` int64, seconds UTC (null:
      unparsable, or no timestamps in this source); `time_text` string, the value in the file; `label` float32 (null:
      not an exposure; NaN: unreadable); `action` int32 (0: unknown); `row` int64;
    - items: `raw_item_id`, the source's text columns (string), optional `created_at` int64 seconds, its features
      (list<string>), `row`;
    - users: `raw_user_id`, its features (list<string>), `row`.

    `row` counts from 1, a header line included, so that it is the line number in a file without line breaks inside a
    cell. `size` is the number of bytes of the file that this chunk covers (for the progress bar).
    """

    path: Path
    table: pa.Table
    size: int = 0


def _nothing() -> Iterator[Chunk]:
    return iter(())


@dataclass(frozen=True)
class Source:
    """A dataset to prepare: static facts, and three functions that stream its chunks from the start at each call."""

    name: str
    """Short name, written to the manifest."""
    event_files: tuple[Path, ...]
    """Files that hold the events, in reading order."""
    other_files: tuple[Path, ...]
    """Files that hold items and users (part of the fingerprint)."""
    events: Callable[[], Iterator[Chunk]]
    items: Callable[[], Iterator[Chunk]]
    text_columns: tuple[str, ...]
    label_rule: str
    """In words, e.g. "rating >= 4"."""
    action_names: dict[int, str]
    """Name of each action number from 1 on; 0 is always unknown."""
    users: Callable[[], Iterator[Chunk]] = _nothing
    item_features: tuple[str, ...] = ()
    user_features: tuple[str, ...] = ()
    has_timestamps: bool = True
    """False: the row order is used as time (see `prepare`)."""
    keep_items_without_events: bool = True
    """False for a catalogue that is far larger than the set of items with events."""
    min_events: int = 0
    """k of the k-core filter that belongs to the published protocol; 0: no filter."""
    policy: BadRows = field(default_factory=BadRows)
    """Default policy, chosen for the published files of this source; a policy of the user replaces it."""
    options: dict[str, object] = field(default_factory=dict)
    """Reader options that change the result (part of the fingerprint); JSON values."""
    license_note: str = ""


def event_table(
    rows: np.ndarray,
    user: pa.Array,
    item: pa.Array,
    timestamp: pa.Array | None,
    time_text: pa.Array | None,
    label: np.ndarray | pa.Array,
    action: np.ndarray,
) -> pa.Table:
    """The events of one chunk in the layout of `Chunk`; without `timestamp` it is null for every row."""
    n = len(rows)
    return pa.table(
        {
            "raw_user_id": as_id_strings(user, "user"),
            "raw_item_id": as_id_strings(item, "item"),
            "timestamp": pa.nulls(n, pa.int64()) if timestamp is None else timestamp,
            "time_text": pa.nulls(n, pa.string()) if time_text is None else time_text.cast(pa.string()),
            "label": pa.array(label, pa.float32()) if isinstance(label, np.ndarray) else label,
            "action": pa.array(action.astype(np.int32)),
            "row": pa.array(rows, pa.int64()),
        }
    )


def as_id_strings(values: pa.Array | pa.ChunkedArray, what: str) -> pa.Array:
    """Raw ids as strings. Raises ValueError for a type without an exact text form (float, list, ...)."""
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(
            f"the {what} id column has type {kind}; ids must be strings or integers, because a {kind} has no "
            "exact text. Convert the column first"
        )
    return values.cast(pa.string())


def parse_float(values: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """float64 values; NaN for nulls and for strings that are not numbers."""
    # Arrow's cast fails for the complete column at the first bad string, so those become null first.
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        is_number = pc.match_substring_regex(values, _NUMBER)
        values = pc.if_else(is_number, pc.utf8_trim_whitespace(values), pa.scalar(None, values.type))
    return values.cast(pa.float64()).to_numpy(zero_copy_only=False).astype(np.float64, copy=False)


def rating_labels(ratings: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Labels (float32, rating >= 4; NaN outside 1..5) and actions (int32, the rating; 0 outside)."""
    rating = parse_float(ratings)
    valid = np.isin(rating, [1, 2, 3, 4, 5])
    label = np.where(valid, rating >= 4, np.nan).astype(np.float32)
    return label, np.where(valid, rating, 0).astype(np.int32)


def parse_seconds(values: pa.Array | pa.ChunkedArray, unit: str) -> pa.Array:
    """Times as int64 seconds UTC (fractions rounded down); null for values that are not times.

    `unit` is one of `TIME_UNITS`; "iso8601" reads "2015-03-01 12:00:00" or "2015-03-01T12:00:00+01:00", and a
    text without a zone is UTC. Arrow timestamp and date columns are read as such, whatever the unit.
    """
    assert unit in TIME_UNITS, unit
    if pa.types.is_temporal(values.type):
        whole = values.cast(pa.timestamp("us"), safe=False)
        return pa.array(_floor_seconds(whole.cast(pa.int64()), 1_000_000))
    if unit == "iso8601":
        return pa.array([_iso_seconds(v) for v in values.cast(pa.string()).to_pylist()], pa.int64())
    number = parse_float(values)
    # Above 2^53 float64 cannot represent every integer: such values are treated as unparsable.
    exact = np.where(np.abs(number) < 2**53, number, np.nan)
    seconds = np.floor(exact / TIME_UNITS[unit])
    return pa.array(np.nan_to_num(seconds).astype(np.int64), mask=np.isnan(seconds))


def _floor_seconds(ticks: pa.Array | pa.ChunkedArray, per_second: int) -> np.ma.MaskedArray:
    missing = pc.is_null(ticks).to_numpy(zero_copy_only=False)
    whole = pc.fill_null(ticks, 0).to_numpy(zero_copy_only=False) // per_second
    return np.ma.masked_array(whole, mask=missing)


def _iso_seconds(text: str | None) -> int | None:
    try:
        moment = datetime.fromisoformat((text or "").strip())
    except ValueError:
        return None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() // 1)


def require_time_unit(unit: str) -> None:
    """Raise ValueError for a unit that is not in `TIME_UNITS`."""
    if unit not in TIME_UNITS:
        raise ValueError(f"time_unit={unit!r} is not one of {', '.join(TIME_UNITS)}; choose one of them")


def require_files(paths: Sequence[Path], what: str) -> None:
    """Raise ValueError with the missing files of `paths`; `what` names their dataset."""
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise ValueError(f"{what}: file not found: {', '.join(missing)}. Give the folder that holds it as the path")
