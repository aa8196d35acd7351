"""Writes small datasets in the exact formats of the published ones, for tests."""

import csv
import gzip
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.sources.base import Chunk, Source, event_table

Event = tuple[str, str, int, int]
"""(raw user id, raw item id, rating, second)"""

MOVIES = [
    ("1", "Toy Story", "1995", ["Animation", "Children's", "Comedy"]),
    ("2", "Misérables, Les", "1995", ["Drama", "Musical"]),
    ("7", "GoldenEye", "1995", ["Action", "Adventure", "Thriller"]),
    ("9", "Contempt (Mépris, Le)", "1963", ["Drama"]),
]
PEOPLE = [
    ("5", 24, "M", "technician", "85711"),
    ("3", 53, "F", "other", "94043"),
    ("8", 7, "F", "student", "X1"),
]
RATINGS: list[Event] = [
    ("5", "1", 5, 880000000),
    ("3", "2", 3, 880000000),
    ("5", "7", 4, 879999999),
    ("8", "9", 1, 880000001),
    ("3", "1", 4, 880000002),
    ("8", "1", 5, 880000002),
    ("5", "2", 2, 880000002),
    ("3", "9", 5, 880000003),
    ("8", "2", 4, 880000009),
    ("5", "9", 3, 880000010),
]
GENRES = (
    "unknown Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy Film-Noir Horror "
    "Musical Mystery Romance Sci-Fi Thriller War Western"
).split()


def write_lines(path: Path, lines: Sequence[str], encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(f"{line}\n" for line in lines).encode(encoding))
    return path


def write_csv(path: Path, rows: Sequence[Sequence[object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def recbole_100k(folder: Path, ratings: Sequence[Event] = RATINGS) -> Path:
    """RecBole's layout of MovieLens-100k: tab-separated UTF-8 with typed headers."""
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    write_lines(folder / "ml-100k.inter", [header, *("\t".join(map(str, r)) for r in ratings)])
    header = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"
    movies = [f"{i}\t{title}\t{year}\t{' '.join(genres)}" for i, title, year, genres in MOVIES]
    write_lines(folder / "ml-100k.item", [header, *movies])
    header = "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token"
    write_lines(folder / "ml-100k.user", [header, *("\t".join(map(str, p)) for p in PEOPLE)])
    return folder


def grouplens_100k(folder: Path, ratings: Sequence[Event] = RATINGS) -> Path:
    """GroupLens' own folder: u.data with tabs; u.item and u.user with bars, in Latin-1."""
    write_lines(folder / "u.data", ["\t".join(map(str, r)) for r in ratings])
    movies = []
    for i, title, year, genres in MOVIES:
        flags = "|".join("1" if name in genres else "0" for name in GENRES)
        movies.append(f"{i}|{title} ({year})|01-Jan-{year}||http://us.imdb.com/{i}|{flags}")
    write_lines(folder / "u.item", movies, "latin-1")
    write_lines(folder / "u.user", ["|".join(map(str, p)) for p in PEOPLE], "latin-1")
    return folder


def movielens_1m_files(folder: Path, ratings: Sequence[Event] = RATINGS) -> Path:
    """ML-1M: `::` between the cells, Latin-1, coded ages and occupations."""
    write_lines(folder / "ratings.dat", ["::".join(map(str, r)) for r in ratings])
    movies = [f"{i}::{title} ({year})::{'|'.join(genres)}" for i, title, year, genres in MOVIES]
    write_lines(folder / "movies.dat", movies, "latin-1")
    write_lines(folder / "users.dat", ["5::M::25::12::85711", "3::F::50::0::94043", "8::F::1::10::48067"])
    return folder


def pixelrec_files(folder: Path) -> tuple[Path, Path]:
    """Pixel200K.csv and item_info.csv; the item file has an item without event and texts with quotes."""
    events = [(f"i{item}", f"u{user}", second) for user, item, _, second in RATINGS]
    interactions = write_csv(folder / "Pixel200K.csv", [("item_id", "user_id", "timestamp"), *events])
    counters = ["view_number", "comment_number", "thumbup_number", "share_number", "coin_number"]
    header = ["item_id", *counters, "favorite_number", "barrage_number", "title", "tag", "description"]
    rows = [[f"i{i}", *range(7), title, "film", f'line 1, "quoted"\nline 2 of {i}'] for i, title, _, _ in MOVIES]
    rows.insert(1, ["i404", *range(7), "never seen", "game", ""])
    return interactions, write_csv(folder / "item_info.csv", [header, *rows])


VIEWS: list[tuple[int, int, int, int, str]] = [
    (0, 3649, 13838, 10867, "1593878903.438"),
    (0, 9598, 13665, 10984, "1593879221.297"),
    (0, 10, 31000, 15000, "1593879366.687"),
    (0, 10, 31000, 15000, "1593879366.687"),
    (1, 10, 0, 15000, "1593880000.0"),
    (1, 3649, 5000, 10867, ""),
    (1, 9598, 21968, 10984, "1593965303.438"),
]
"""(user, video, milliseconds played, milliseconds of the video, second)"""


def kuairec_files(folder: Path) -> Path:
    """KuaiRec 2.0 as published: a view logged twice, one without a time, and a caption with a bare line break."""
    head = "user_id,video_id,play_duration,video_duration,time,date,timestamp,watch_ratio"
    rows = [
        f"{user},{video},{played},{full},{'2020-07-05 00:08:23.438' * bool(second)},20200705,{second},{played / full}"
        for user, video, played, full, second in VIEWS
    ]
    write_lines(folder / "big_matrix.csv", [head, *rows])
    tags = ["video_id,feat", "10,[8]", '3649,"[27, 9]"', "9598,[6]", "11,[1]"]
    write_lines(folder / "item_categories.csv", tags)
    levels = [f"{level}_level_category_{part}" for level in ("first", "second", "third") for part in ("id", "name")]
    captions = [
        ",".join(["video_id", "manual_cover_text", "caption", "topic_tag", *levels]),
        "10,UNKNOWN,精神小伙,[],8,颜值,673,颜值随拍,-124,UNKNOWN",
        '3649,UNKNOWN,"搞笑, #hi","[五爱街,爆款]",27,高新数码,-124,UNKNOWN,-124,UNKNOWN',
        "9598,UNKNOWN,first line",
        "second line,[],6,x,1,y,2,z",
    ]
    write_lines(folder / "kuairec_caption_category.csv", captions)
    numbers = [f"{kind}_user_num{end}" for kind in ("follow", "fans", "friend") for end in ("", "_range")]
    names = ["user_id", "user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author", *numbers]
    names += ["register_days", "register_days_range", *(f"onehot_feat{i}" for i in range(18))]
    people = [
        [user, "full_active", 0, 0, 1, 5, '"(0,10]"', 0, '"[0,1)"', 0, "0", 107, "61-90", *[1] * 18] for user in (0, 1)
    ]
    write_lines(folder / "user_features.csv", [",".join(names), *(",".join(map(str, person)) for person in people)])
    return folder / "big_matrix.csv"


def amazon_files(folder: Path, ratings: Sequence[Event], python_literals: bool = True) -> tuple[Path, Path]:
    """ratings_Books.csv (no header) and meta_Books.json.gz a product a line, the most rated item left out."""
    rating_file = write_csv(folder / "ratings_Books.csv", [(u, i, f"{r}.0", t) for u, i, r, t in ratings])
    counts = Counter(item for _, item, _, _ in ratings)
    known = sorted(counts)
    known.remove(counts.most_common(1)[0][0])
    records = [
        {
            "asin": i,
            "title": f"It's book {i}",
            "description": f"About {i}",
            "categories": [["Books", f"C{i}"]],
        }
        for i in [*known, "B000"]
    ]
    lines = [repr(r) if python_literals else json.dumps(r) for r in records]
    meta = folder / "meta_Books.json.gz"
    meta.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode()))
    return rating_file, meta


def memory_source(folder: Path, events: Sequence[tuple], items: Sequence[str | tuple], /, **changes: object) -> Source:
    """A source of given events (label: rating >= 4; a rating None: no label) for tests of `prepare` itself.

    `items` are raw ids (their text is "title <id>") or pairs of raw id and text.
    """
    pairs = [(item, f"title {item}") if isinstance(item, str) else item for item in items]
    event_file, item_file = write_csv(folder / "events.csv", events), write_csv(folder / "items.csv", pairs)

    def event_chunks() -> Iterator[Chunk]:
        for start in range(0, len(events), 7):  # several chunks
            users, raw_items, ratings, seconds = zip(*events[start : start + 7], strict=True)
            rows = np.arange(start + 1, start + 1 + len(users))
            label = [r if r is None or np.isnan(r) else r >= 4 for r in ratings]
            action = np.array([r if r is not None and r == r else 0 for r in ratings])
            time = pa.array(seconds, pa.int64())
            label = pa.array([None if value is None else float(value) for value in label], pa.float32())
            yield Chunk(event_file, event_table(rows, pa.array(users), pa.array(raw_items), time, time, label, action))

    def item_chunks() -> Iterator[Chunk]:
        ids, titles = zip(*pairs, strict=True) if pairs else ((), ())
        rows = np.arange(1, len(ids) + 1)
        yield Chunk(
            item_file,
            pa.table({"raw_item_id": pa.array(ids, pa.string()), "title": pa.array(titles, pa.string()), "row": rows}),
        )

    facts: dict[str, object] = {
        "name": "memory",
        "event_files": (event_file,),
        "other_files": (item_file,),
        "events": event_chunks,
        "items": item_chunks,
        "text_columns": ("title",),
        "label_rule": "rating >= 4",
        "action_names": {i: f"rating {i}" for i in range(1, 6)},
    }
    return Source(**{**facts, **changes})


def sequences(dataset: Dataset, part: str) -> dict[str, tuple[int, list[tuple]]]:
    """Raw user id → (target_start, [(raw item id, second, label, action)]) of a part, from the files."""
    items = dict(zip(dataset.items["item_id"].to_pylist(), dataset.items["raw_item_id"].to_pylist(), strict=True))
    users = dict(zip(dataset.users["user_id"].to_pylist(), dataset.users["raw_user_id"].to_pylist(), strict=True))
    found = {}
    for group in dataset.row_groups(part):
        for row in dataset.sequences([group]).pieces():
            labels = [None if np.isnan(label) else label for label in row.labels.tolist()]
            columns = (row.timestamps.tolist(), labels, row.actions.tolist())
            history = [(items[i], *rest) for i, *rest in zip(row.item_ids.tolist(), *columns, strict=True)]
            assert users[row.user_id] not in found, "one row a user and part"
            found[users[row.user_id]] = (row.first_target, history)
    return found


PARTS = ("train", "valid", "test")


def random_events(count=400, users=25, items=15, seconds=40, seed=0):
    """Many ties: few seconds, in no order."""
    rng = np.random.default_rng(seed)
    return [
        (
            f"u{rng.integers(users)}",
            f"i{rng.integers(items)}",
            int(rng.integers(1, 6)),
            int(rng.integers(seconds)),
        )
        for _ in range(count)
    ]


ITEMS = [f"i{n}" for n in range(15)]


def oracle(events, rule, fractions=(0.8, 0.1, 0.1)):
    """Part → user → (target_start, history) by plain loops over the definition."""
    ordered = sorted(range(len(events)), key=lambda n: (events[n][3], n))
    users = {}
    for position, n in enumerate(ordered):
        users.setdefault(events[n][0], []).append((position, n))
    first, second = round(len(events) * fractions[0]), round(len(events) * (fractions[0] + fractions[1]))
    found = {part: {} for part in PARTS}
    for user, own in users.items():
        size = len(own)
        if rule == "time":
            part_of = [(position >= first) + (position >= second) for position, _ in own]
        elif size < 3:
            part_of = [0] * size
        elif rule == "leave_one_out":
            part_of = [0] * (size - 2) + [1, 2]
        else:
            valid, test = (max(round(size * f), 1) for f in fractions[1:])
            part_of = [0] * (size - valid - test) + [1] * valid + [2] * test
        history = [(e[1], e[3], float(e[2] >= 4), e[2]) for e in (events[n] for _, n in own)]
        for p, part in enumerate(PARTS):
            if p in part_of:
                found[part][user] = (part_of.index(p), history[: size - part_of[::-1].index(p)])
    return found
