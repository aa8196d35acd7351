"""The sources of `hllm prepare --source NAME`: a new one is a module beside this file and an entry of `SOURCES`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hllm_torchrec.data.quickstart_files import fetch_movielens_100k
from hllm_torchrec.data.sources.amazon import amazon
from hllm_torchrec.data.sources.base import Source
from hllm_torchrec.data.sources.movielens import movielens_1m, movielens_100k
from hllm_torchrec.data.sources.pixelrec import pixelrec
from hllm_torchrec.data.sources.table_mapping import table


@dataclass(frozen=True)
class SourceKind:
    """A kind of source: how it is built, and what the command line says of it."""

    build: Callable[..., Source]
    """Called with `path`, then `items` where there are any, then `time_unit` (a keyword) where it is given."""
    path: str
    """What --path names."""
    example: str
    """Arguments of an example besides --source."""
    items: str | None = None
    """What --items names; None: it takes none."""
    takes_time_unit: bool = False
    """Whether it takes --time-unit."""
    fetch: Callable[[Path | None], Path] | None = None
    """Makes a path from the cache folder, where none is given."""


SOURCES: dict[str, SourceKind] = {
    "ml-100k": SourceKind(movielens_100k, "folder", "--output data/ml-100k", fetch=fetch_movielens_100k),
    "ml-1m": SourceKind(movielens_1m, "folder", "--path ml-1m --split leave_one_out --output data/ml-1m"),
    "pixelrec": SourceKind(
        pixelrec,
        "interaction CSV",
        "--path Pixel200K.csv --items item_info.csv --split leave_one_out --output data/pixel",
        items="item information CSV",
        takes_time_unit=True,
    ),
    "amazon": SourceKind(
        amazon,
        "rating CSV",
        "--path ratings_Books.csv --items meta_Books.json.gz --split leave_one_out --core published \\\n"
        "      --output data/books",
        items="metadata JSON lines",
    ),
    "table": SourceKind(table, "mapping YAML", "--path my_shop.yaml --bad-rows bad_time=drop --output data/shop"),
}
"""`--source` -> what it is."""


def build_source(
    name: str,
    path: Path | None,
    items: Path | None = None,
    time_unit: str | None = None,
    cache_dir: Path | None = None,
) -> Source:
    """The source that the arguments name.

    Raises:
        ValueError: an argument is missing or belongs to another source, or a file is missing.
    """
    kind = SOURCES[name]
    if time_unit is not None and not kind.takes_time_unit:
        others = " and ".join(other for other, entry in SOURCES.items() if entry.takes_time_unit)
        raise ValueError(f"--time-unit belongs to {others}, not to {name} (table: set it in the mapping)")
    if items is not None and kind.items is None:
        others = " and ".join(other for other, entry in SOURCES.items() if entry.items)
        raise ValueError(f"--items belongs to {others}, not to {name}")
    if path is None and kind.fetch is not None:
        path = kind.fetch(cache_dir)
    if path is None:
        raise ValueError(f"--path is missing: {name} cannot be fetched; see --help for what it names")
    if items is None and kind.items is not None:
        raise ValueError(f"--items is missing: {name} needs the file with the items' texts")
    return kind.build(path, *([items] if items else []), **({"time_unit": time_unit} if time_unit else {}))
