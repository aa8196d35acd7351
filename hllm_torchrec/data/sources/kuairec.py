"""KuaiRec 2.0: a matrix of video views with several signals (Gao et al., CIKM 2022).

`big_matrix.csv` or `small_matrix.csv`: `user_id,video_id,play_duration,video_duration,time,date,timestamp,watch_ratio`
with durations in milliseconds, timestamp in seconds UTC (float), and watch_ratio = play_duration / video_duration. In
the same folder: `item_categories.csv` (`video_id,feat`, a list of tags), `kuairec_caption_category.csv` (published
later: texts and three levels of categories) and `user_features.csv`.

Labels: `like` is watch_ratio > 2, as the authors propose because the data has no explicit likes; `complete` is
watch_ratio >= 1; `watch_ratio` (with the loss on log(1 + y)) and `watch_seconds` are regression labels. Every view is
an exposure.
"""

import csv
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from hllm_torchrec.data.bad_rows import BadRows
from hllm_torchrec.data.event_schema import EventSchema, LabelColumn
from hllm_torchrec.data.sources.base import Chunk, Source, event_table
from hllm_torchrec.data.sources.columnar import read_csv
from hllm_torchrec.data.sources.values import as_id_strings, as_lists, parse_float, parse_seconds

SCHEMA = EventSchema(
    (
        LabelColumn("like"),
        LabelColumn("complete"),
        LabelColumn("watch_ratio", "regression", "log1p"),
        LabelColumn("watch_seconds", "regression"),
    )
)
LIKED, COMPLETE = 2.0, 1.0
"""A view is liked if its watch ratio is above LIKED, and complete if it is at least COMPLETE."""
TEXTS = {
    "caption": "caption",
    "cover": "manual_cover_text",
    "topics": "topic_tag",
    "category": "first_level_category_name",
    "subcategory": "second_level_category_name",
}
"""Text column of the dataset -> column of the captions file."""
USER_FEATURES = (
    "user_active_degree",
    "is_live_streamer",
    "is_video_author",
    "follow_user_num_range",
    "fans_user_num_range",
    "friend_user_num_range",
    "register_days_range",
)
_MATRIX_COLUMNS = ["user_id", "video_id", "play_duration", "timestamp", "watch_ratio"]
_NO_TEXT = ("", "UNKNOWN", "[]")


def kuairec(matrix: str | Path) -> Source:
    """KuaiRec from `big_matrix.csv` or `small_matrix.csv`, which also names the dataset, and the files beside it."""
    event_file = Path(matrix)
    names = ("item_categories.csv", "kuairec_caption_category.csv", "user_features.csv")
    tags, captions, users = others = tuple(event_file.parent / name for name in names)
    missing = [str(path) for path in (event_file, *others) if not path.is_file()]
    if missing:
        raise ValueError(
            f"KuaiRec 2.0: file not found: {', '.join(missing)}. Put all files beside the matrix; the captions are a "
            "download of their own"
        )
    return Source(
        name=f"kuairec-{event_file.stem.removesuffix('_matrix')}",
        event_files=(event_file,),
        other_files=others,
        events=partial(_events, event_file),
        items=partial(_items, tags, captions),
        users=partial(_users, users),
        text_columns=tuple(TEXTS),
        item_features=("tags", "category"),
        user_features=USER_FEATURES,
        schema=SCHEMA,
        label_rule=f"watch_ratio > {LIKED:g}",
        action_names={1: "view"},
        keep_items_without_events=False,
        # In the published files some views are logged twice, and some rows of the small matrix have no time.
        policy=BadRows(bad_time="drop", duplicate_event="drop"),
        license_note="KuaiRec (c) its authors: CC BY-SA 4.0; cite Gao et al., doi:10.1145/3511808.3557220.",
    )


def _events(path: Path) -> Iterator[Chunk]:
    for rows, table, size, dialect in read_csv(path, _MATRIX_COLUMNS):
        ratio, played = parse_float(table["watch_ratio"]), parse_float(table["play_duration"])
        time, known = table["timestamp"].combine_chunks(), ~np.isnan(ratio)
        liked = np.where(known, ratio > LIKED, np.nan).astype(np.float32)
        events = event_table(
            rows,
            table["user_id"],
            table["video_id"],
            parse_seconds(time, "seconds"),
            time,
            liked,
            np.ones(len(rows)),
            table["watch_ratio"],
        )
        extra = {
            "complete": np.where(known, ratio >= COMPLETE, np.nan),
            "watch_ratio": ratio,
            "watch_seconds": played / 1000,
        }
        for label in SCHEMA.labels[1:]:
            events = events.append_column(label.column, pa.array(extra[label.name].astype(np.float32)))
        yield Chunk(path, events, size, dialect)


def _items(tags: Path, captions: Path) -> Iterator[Chunk]:
    """All videos; `tags` lists each of them, `captions` has their texts."""
    texts = _read_captions(captions)
    for rows, table, size, dialect in read_csv(tags, ["video_id", "feat"]):
        ids = as_id_strings(table["video_id"], "item")
        found = [texts.get(video or "", {}) for video in ids.to_pylist()]
        columns = {name: pa.array([text.get(name, "") for text in found], pa.string()) for name in TEXTS}
        categories = [[text["category"]] if text.get("category") else [] for text in found]
        features = {
            "feature_tags": as_lists(table["feat"], None),
            "feature_category": pa.array(categories, pa.list_(pa.string())),
        }
        yield Chunk(tags, pa.table({"raw_item_id": ids, **columns, **features, "row": rows}), size, dialect)


def _read_captions(path: Path) -> dict[str, dict[str, str]]:
    """Video -> text column -> text; "UNKNOWN" and empty lists become "".

    Some published captions have line breaks outside of quotes. The fragments of such a row are skipped, so the video
    remains without text and counts as `item_without_text`.
    """
    found: dict[str, dict[str, str]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        try:
            reader = csv.DictReader(file)
            missing = [column for column in ("video_id", *TEXTS.values()) if column not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f"{path}: no column {missing[0]}; it has {', '.join(reader.fieldnames or ())}")
            for row in reader:
                video = (row["video_id"] or "").strip()
                if video.isdigit() and None not in row and None not in row.values():
                    found.setdefault(video, {name: _text(row[column]) for name, column in TEXTS.items()})
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a CSV file in UTF-8 ({error}); fetch it again") from error
    return found


def _text(cell: str) -> str:
    """A cell as text; a list `[a,b]` as "a, b"."""
    text = cell.strip()
    if text in _NO_TEXT:
        return ""
    if text[0] == "[" and text[-1] == "]":
        return ", ".join(part.strip() for part in text[1:-1].split(","))
    return text


def _users(path: Path) -> Iterator[Chunk]:
    for rows, table, size, dialect in read_csv(path, ["user_id", *USER_FEATURES]):
        features = {f"feature_{name}": as_lists(table[name], None) for name in USER_FEATURES}
        ids = as_id_strings(table["user_id"], "user")
        yield Chunk(path, pa.table({"raw_user_id": ids, **features, "row": rows}), size, dialect)
