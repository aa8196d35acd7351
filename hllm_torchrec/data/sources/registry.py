"""Registry of the sources of `hllm prepare --source NAME`; a new source is a module in this folder and an entry of
`SOURCES`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hllm_torchrec.data.quickstart_files import fetch_movielens_100k
from hllm_torchrec.data.sources.amazon import amazon
from hllm_torchrec.data.sources.base import Source
from hllm_torchrec.data.sources.kuairec import kuairec
from hllm_torchrec.data.sources.movielens import movielens_1m, movielens_100k
from hllm_torchrec.data.sources.pixelrec import pixelrec
from hllm_torchrec.data.sources.table_mapping import table


@dataclass(frozen=True)
class SourceKind:
    """An entry of the registry: the function that builds the source, and the texts for the command line."""

    build: Callable[..., Source]
    """Called with `path`, `items` if given, and the given ones of the keywords time_unit, html, append and stars."""
    path: str
    """Meaning of --path, for the help text."""
    example: str
    """Arguments of an example, without --source."""
    items: str | None = None
    """Meaning of --items, for the help text; None: the source does not accept it."""
    takes_time_unit: bool = False
    """True if the source accepts --time-unit."""
    takes_event_files: bool = False
    """True if the source accepts the keyword `append`: event files of new data."""
    takes_html: bool = False
    """True if the source accepts --html."""
    takes_stars: bool = False
    """True if the source accepts --stars."""
    fetch: Callable[[Path | None], Path] | None = None
    """Downloads the files into the given cache folder and returns their path; used if --path is not given."""


SOURCES: dict[str, SourceKind] = {
    "ml-100k": SourceKind(
        movielens_100k, "folder", "--output data/ml-100k", takes_stars=True, fetch=fetch_movielens_100k
    ),
    "ml-1m": SourceKind(
        movielens_1m, "folder", "--path ml-1m --split leave_one_out --output data/ml-1m", takes_stars=True
    ),
    "pixelrec": SourceKind(
        pixelrec,
        "interaction CSV",
        "--path Pixel200K.csv --items item_info.csv --split leave_one_out --output data/pixel",
        items="item information CSV",
        takes_time_unit=True,
    ),
    "kuairec": SourceKind(
        kuairec, "big_matrix.csv or small_matrix.csv", "--path data/big_matrix.csv --output data/kuairec"
    ),
    "amazon": SourceKind(
        amazon,
        "ratings or reviews",
        "--path ratings_Books.csv --items meta_Books.json.gz --split leave_one_out --core published \\\n"
        "      --output data/books",
        items="metadata JSON lines",
        takes_html=True,
    ),
    "table": SourceKind(
        table,
        "mapping YAML",
        "--path my_shop.yaml --bad-rows bad_time=drop --output data/shop",
        takes_event_files=True,
    ),
}
"""Sources by their name in `--source`."""


def build_source(
    name: str,
    path: Path | None,
    items: Path | None = None,
    time_unit: str | None = None,
    cache_dir: Path | None = None,
    append: Sequence[Path] | None = None,
    html: str | None = None,
    stars: bool = False,
) -> Source:
    """Build the source `name` from the command line's arguments.

    append: event files with only new data, which replace the event files of the mapping; an empty list keeps those of
        the mapping; None: the source is not for an append.

    Raises:
        ValueError: an argument is missing or belongs to another source, or a file is missing.
    """
    kind = SOURCES[name]
    if time_unit is not None and not kind.takes_time_unit:
        others = " and ".join(other for other, entry in SOURCES.items() if entry.takes_time_unit)
        raise ValueError(f"--time-unit belongs to {others}, not to {name} (table: set it in the mapping)")
    if html is not None and not kind.takes_html:
        others = " and ".join(other for other, entry in SOURCES.items() if entry.takes_html)
        raise ValueError(f"--html belongs to {others}, not to {name} (table: set items.html in the mapping)")
    if stars and not kind.takes_stars:
        others = " and ".join(other for other, entry in SOURCES.items() if entry.takes_stars)
        raise ValueError(f"--stars belongs to {others}, not to {name} (table: declare an ordinal label)")
    if items is not None and kind.items is None:
        others = " and ".join(other for other, entry in SOURCES.items() if entry.items)
        raise ValueError(f"--items belongs to {others}, not to {name}")
    if append and not kind.takes_event_files:
        raise ValueError(
            f"--append {append[0]}: {name} has its events in --path; give the new events there, and --append without "
            "files"
        )
    if path is None and kind.fetch is not None:
        path = kind.fetch(cache_dir)
    if path is None:
        raise ValueError(f"--path is missing: {name} cannot be fetched; see --help for what --path names")
    if items is None and kind.items is not None:
        raise ValueError(f"--items is missing: {name} needs the file with the items' texts")
    files = append if kind.takes_event_files else None
    given = (("time_unit", time_unit), ("html", html), ("append", files), ("stars", stars or None))
    options: dict[str, Any] = {key: value for key, value in given if value is not None}
    return kind.build(path, *([items] if items else []), **options)
