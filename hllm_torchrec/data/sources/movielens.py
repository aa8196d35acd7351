"""MovieLens-100k (RecBole's atomic files or GroupLens' own folder) and MovieLens-1M (`::` files).

Label: rating >= 4. Action: the rating, 1..5. Text: title, year, genres. A rating outside 1..5 is a NaN label. With
`stars`, the rating is an additional ordinal label.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from hllm_torchrec.data.event_schema import EventSchema, LabelColumn
from hllm_torchrec.data.sources.base import (
    Chunk,
    Source,
    event_table,
    require_files,
)
from hllm_torchrec.data.sources.values import parse_seconds, rating_labels

LICENSE_NOTE = (
    "MovieLens data (c) GroupLens, University of Minnesota: for research use; not to be redistributed "
    "without permission, nor used commercially; cite Harper and Konstan, doi:10.1145/2827872."
)
_GENRES_100K = (
    "unknown Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy Film-Noir Horror "
    "Musical Mystery Romance Sci-Fi Thriller War Western"
).split()
_AGE_BUCKETS = (1, 18, 25, 35, 45, 50, 56)
_YEAR_SUFFIX = re.compile(r"^(?P<title>.*?)\s*\((?P<year>\d{4})\)\s*$")
_ROWS_PER_CHUNK = 65_536

WITH_STARS = EventSchema((LabelColumn("liked"), LabelColumn("stars", "ordinal", values=(1, 2, 3, 4, 5))))

Rows = list[list[str]]


def movielens_100k(path: str | Path, *, stars: bool = False) -> Source:
    """MovieLens-100k in the folder `path`: `ml-100k.inter/.item/.user` (RecBole) or `u.data/u.item/u.user`.

    stars: add the rating as an ordinal label.

    Raises ValueError if the folder has neither set of files.
    """
    folder = Path(path)
    if (folder / "ml-100k.inter").is_file():
        names = ("ml-100k.inter", "ml-100k.item", "ml-100k.user")
        files = tuple(folder / name for name in names)
        require_files(files, "MovieLens-100k (RecBole layout)")
        read = partial(read_rows, delimiter="\t", encoding="utf-8")
        items = partial(_chunks, files[1], partial(read, columns=4, header="item_id:token"), _recbole_items)
        users = partial(_chunks, files[2], partial(read, columns=5, header="user_id:token"), _users_100k)
        events = partial(_chunks, files[0], partial(read, columns=4, header="user_id:token"), _events)
        return _source("ml-100k", files, events, items, users, stars)
    files = tuple(folder / name for name in ("u.data", "u.item", "u.user"))
    require_files(files, "MovieLens-100k (neither ml-100k.inter nor GroupLens' own layout)")
    read = partial(read_rows, delimiter="|", encoding="latin-1")
    events = partial(_chunks, files[0], partial(read_rows, delimiter="\t", encoding="latin-1", columns=4), _events)
    items = partial(_chunks, files[1], partial(read, columns=5 + len(_GENRES_100K)), _grouplens_items)
    users = partial(_chunks, files[2], partial(read, columns=5), _users_100k)
    return _source("ml-100k", files, events, items, users, stars)


def movielens_1m(path: str | Path, *, stars: bool = False) -> Source:
    """MovieLens-1M in the folder `path`: `ratings.dat`, `movies.dat`, `users.dat` (`::`, latin-1).

    stars: see `movielens_100k`.

    Raises ValueError if a file is missing.
    """
    files = tuple(Path(path) / name for name in ("ratings.dat", "movies.dat", "users.dat"))
    require_files(files, "MovieLens-1M")
    read = partial(read_rows, delimiter="::", encoding="latin-1")
    events = partial(_chunks, files[0], partial(read, columns=4), _events)
    items = partial(_chunks, files[1], partial(read, columns=3), _items_1m)
    users = partial(_chunks, files[2], partial(read, columns=5), _users_1m)
    return _source("ml-1m", files, events, items, users, stars)


def _source(
    name: str,
    files: tuple[Path, ...],
    events: Callable[[], Iterator[Chunk]],
    items: Callable[[], Iterator[Chunk]],
    users: Callable[[], Iterator[Chunk]],
    stars: bool,
) -> Source:
    return Source(
        name=name,
        event_files=files[:1],
        other_files=files[1:],
        events=partial(_with_stars, events) if stars else events,
        items=items,
        users=users,
        text_columns=("title", "year", "genres"),
        item_features=("genres", "release_year"),
        user_features=("gender", "occupation", "age"),
        label_rule="rating >= 4",
        action_names={rating: f"rating {rating}" for rating in range(1, 6)},
        license_note=LICENSE_NOTE,
        schema=WITH_STARS if stars else EventSchema(),
        options={"stars": True} if stars else {},
    )


def read_rows(
    path: Path, *, delimiter: str, encoding: str, columns: int, header: str | None = None
) -> Iterator[tuple[np.ndarray, Rows, int]]:
    """Yield (row numbers int64 from 1, the split rows, bytes read) of a small text file, in order.

    `header` is the required beginning of the first line, which is skipped. Blank lines are skipped. Raises ValueError
    naming file and row for a wrong header, a wrong number of columns, or bytes that are invalid in the encoding.
    """
    numbers: list[int] = []
    rows: Rows = []
    size = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            size += len(line)
            text = _decoded(line, encoding, path, number).rstrip("\r\n")
            if number == 1 and header is not None:
                if not text.startswith(header):
                    raise ValueError(f"{path}, row 1: the header begins {text[:40]!r}, expected {header!r}")
                continue
            if not text:
                continue
            numbers.append(number)
            rows.append(_cells(text, delimiter, columns, path, number))
            if len(rows) == _ROWS_PER_CHUNK:
                yield np.array(numbers, np.int64), rows, size
                numbers, rows, size = [], [], 0
    if rows:
        yield np.array(numbers, np.int64), rows, size


def _decoded(line: bytes, encoding: str, path: Path, number: int) -> str:
    try:
        return line.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, row {number}: not {encoding} ({error}); fetch it again") from error


def _cells(text: str, delimiter: str, columns: int, path: Path, number: int) -> list[str]:
    cells = text.split(delimiter)
    if len(cells) != columns:
        raise ValueError(
            f"{path}, row {number}: {len(cells)} columns separated by {delimiter!r}, expected {columns}. The "
            "file is damaged or in another format: fetch it again"
        )
    return cells


def _chunks(
    path: Path,
    read: Callable[[Path], Iterator[tuple[np.ndarray, Rows, int]]],
    build: Callable[[np.ndarray, Rows], pa.Table],
) -> Iterator[Chunk]:
    for numbers, rows, size in read(path):
        yield Chunk(path, build(numbers, rows), size)


def _events(numbers: np.ndarray, rows: Rows) -> pa.Table:
    user, item, rating_text, time_text = (pa.array(column, pa.string()) for column in zip(*rows, strict=True))
    label, action = rating_labels(rating_text)
    return event_table(numbers, user, item, parse_seconds(time_text, "seconds"), time_text, label, action)


def _with_stars(events: Callable[[], Iterator[Chunk]]) -> Iterator[Chunk]:
    """Yield the chunks with the rating as an ordinal label: index of the value 1..5, NaN for other ratings."""
    for chunk in events():
        action = chunk.table["action"].to_numpy()
        index = pa.array(np.where(action > 0, action - 1, np.nan).astype(np.float32))
        yield replace(chunk, table=chunk.table.append_column(WITH_STARS.labels[1].column, index))


def split_title(title: str) -> tuple[str, str]:
    """Split "Toy Story (1995)" into ("Toy Story", "1995"); the year is "" if there is none."""
    match = _YEAR_SUFFIX.match(title)
    return (match["title"], match["year"]) if match else (title.strip(), "")


def _item_table(numbers: np.ndarray, items: list[tuple[str, str, str, list[str]]]) -> pa.Table:
    """The item table of `Chunk` from (raw id, title, year or "", genres) of each item."""
    ids, titles, years, genres = zip(*items, strict=True)
    return pa.table(
        {
            "raw_item_id": pa.array(ids, pa.string()),
            "title": pa.array(titles, pa.string()),
            "year": pa.array(years, pa.string()),
            "genres": pa.array([", ".join(g) for g in genres], pa.string()),
            "feature_genres": pa.array(genres, pa.list_(pa.string())),
            "feature_release_year": pa.array([[y] if y else [] for y in years], pa.list_(pa.string())),
            "row": numbers,
        }
    )


def _recbole_items(numbers: np.ndarray, rows: Rows) -> pa.Table:
    items = []
    for raw_id, title, year, genres in rows:
        # One item of RecBole's file has "(1995)" in its title, and the year "V".
        plain, year_of_title = split_title(title)
        items.append((raw_id, plain, year if re.fullmatch(r"\d{4}", year) else year_of_title, genres.split()))
    return _item_table(numbers, items)


def _grouplens_items(numbers: np.ndarray, rows: Rows) -> pa.Table:
    items = []
    for cells in rows:
        title, year = split_title(cells[1])
        genres = [name for name, flag in zip(_GENRES_100K, cells[5:], strict=True) if flag.strip() == "1"]
        items.append((cells[0], title, year, genres))
    return _item_table(numbers, items)


def _items_1m(numbers: np.ndarray, rows: Rows) -> pa.Table:
    return _item_table(numbers, [(cells[0], *split_title(cells[1]), cells[2].split("|")) for cells in rows])


def _users_100k(numbers: np.ndarray, rows: Rows) -> pa.Table:
    ages = [[age_bucket(cells[1])] if cells[1].strip().isdigit() else [] for cells in rows]
    return _user_table(numbers, rows, ages, gender=2, occupation=3)


def age_bucket(age: str) -> str:
    """The MovieLens-1M age code (lower bound of the bucket: 1, 18, 25, 35, 45, 50, 56) of an age in years."""
    return str(max((bound for bound in _AGE_BUCKETS if bound <= int(age)), default=_AGE_BUCKETS[0]))


def _users_1m(numbers: np.ndarray, rows: Rows) -> pa.Table:
    return _user_table(numbers, rows, [[cells[2]] for cells in rows], gender=1, occupation=3)


def _user_table(numbers: np.ndarray, rows: Rows, ages: list[list[str]], gender: int, occupation: int) -> pa.Table:
    strings = pa.list_(pa.string())
    return pa.table(
        {
            "raw_user_id": pa.array([cells[0] for cells in rows], pa.string()),
            "feature_gender": pa.array([[cells[gender]] for cells in rows], strings),
            "feature_occupation": pa.array([[cells[occupation]] for cells in rows], strings),
            "feature_age": pa.array(ages, strings),
            "row": numbers,
        }
    )
