"""`import_samples`: a dataset with a table of creatives, from personalized texts that come with the users' histories.

Tables of events and items are written, from which `prepare` makes the dataset. The events are the items of the
histories in their order. The items are those of the histories, and those that the texts were written for.
"""

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from hllm_torchrec.common.hashing import hash_texts
from hllm_torchrec.data.creative_table import SCHEMA, split_by_user, table_path, write_table
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.sources.table_mapping import table
from hllm_torchrec.data.split import SPLITS

_AT_ONCE = 4096
_EVENTS = pa.schema([("user", pa.string()), ("item", pa.string())])
_ITEMS = pa.schema([("item", pa.string()), ("title", pa.string()), ("description", pa.string())])
NO_HISTORY, NO_RESPONSE, NO_TEXT = "no history", "no text", "the item has no text"


def text_of(value: Any) -> str:
    """A JSON value as text, "" for null; "?" replaces lone surrogates, which JSON can spell and UTF-8 cannot."""
    return "" if value is None else str(value).encode("utf-8", "replace").decode()


@dataclass(frozen=True)
class Item:
    """An item of a history, or the item that a text was written for."""

    id: str
    title: str
    description: str = ""


@dataclass(frozen=True)
class Sample:
    """A personalized text for a user and an item.

    history: items of the user, oldest first; profile: text about the user's interests; part: train, valid or test, or
    None if the part is drawn by a hash of the user.
    """

    history: tuple[Item, ...]
    item: Item
    response: str
    profile: str | None = None
    part: str | None = None

    @property
    def user(self) -> str:
        """Id of the user, which is a hash of the history's items because the formats have no user ids."""
        return f"u-{hash_texts(item.id for item in self.history)[:20]}"

    def problems(self) -> list[str]:
        """Return the reasons to leave the sample out."""
        found = {
            NO_HISTORY: not self.history,
            NO_RESPONSE: not self.response.strip(),
            NO_TEXT: not (self.item.title.strip() or self.item.description.strip()),
        }
        return [reason for reason, is_so in found.items() if is_so]


@dataclass(frozen=True)
class Imported:
    """Result of an import.

    path: folder of the table; counts: number of rows of each part; left_out: number of left-out samples by reason;
    conflicts: number of occurrences of an item with another title than at its first occurrence, which is the one used.
    """

    path: Path
    counts: dict[str, int]
    left_out: dict[str, int]
    conflicts: int


def import_samples(
    samples: Iterable[Sample], root: Path, name: str, split: str, fractions: tuple[float, float, float], origin: str
) -> Imported:
    """Make the dataset `root` and its table `name`.

    Args:
        split: rule by which `prepare` divides the events of the dataset. The table is divided by user.
        fractions: shares of the users in train, valid and test, for samples without a part. If some samples have a part
            (the test part is given), the other samples are divided into train and valid in the ratio of their shares.
        origin: column `origin` of the table.

    Raises:
        ValueError: a sample is damaged, no sample is left, `root` has another dataset, or the table exists.
    """
    left_out: Counter[str] = Counter()
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-import-", dir=root.parent) as scratch:
        source = _Source(Path(scratch))
        rows = list(source.write(samples, left_out))
        if not rows:
            raise ValueError(f"no sample has a history and a text ({dict(left_out)}); check the files")
        try:
            prepare(table(source.mapping(root.name)), root, split=split)
        except ValueError as error:
            if not (root / "manifest.json").is_file():
                raise
            raise ValueError(f"--dataset {root}: holds another dataset than this import; name a new folder") from error
    dataset = Dataset.open(root)
    if table_path(dataset, name).exists():
        raise ValueError(f"--name {name}: {table_path(dataset, name)} exists; choose another, or remove it")
    parts = _parts(rows, fractions, origin)
    reasons = dict(sorted(left_out.items()))
    facts = {"writer": origin, "left_out": reasons, "fractions": list(fractions)}
    path = write_table(dataset, name, parts, facts=facts)
    return Imported(path, {split: len(part) for split, part in parts.items()}, reasons, source.conflicts)


class _Source:
    """Writer of tables of events and items, from which `prepare` makes a dataset."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._users: set[str] = set()
        self._titles: dict[str, int] = {}
        self.conflicts = 0
        """Number of occurrences of an item with another title than at its first occurrence."""

    def write(self, samples: Iterable[Sample], left_out: Counter[str]) -> Iterator[dict[str, Any]]:
        """Write the events and items of the valid samples, and yield a row of the table of texts for each sample."""
        with (
            pq.ParquetWriter(self.folder / "events.parquet", _EVENTS) as events,
            pq.ParquetWriter(self.folder / "items.parquet", _ITEMS) as items,
        ):
            rest = iter(samples)
            while some := list(islice(rest, _AT_ONCE)):
                reasons = [sample.problems() for sample in some]
                left_out.update(reason for one in reasons for reason in one)
                kept = [sample for sample, one in zip(some, reasons, strict=True) if not one]
                events.write_table(pa.Table.from_pylist(list(self._new_events(kept)), _EVENTS))
                items.write_table(pa.Table.from_pylist(list(self._new_items(kept)), _ITEMS))
                yield from map(_row, kept)

    def _new_events(self, samples: Iterable[Sample]) -> Iterator[dict[str, str]]:
        for sample in samples:
            if sample.user not in self._users:
                self._users.add(sample.user)
                yield from ({"user": sample.user, "item": item.id} for item in sample.history)

    def _new_items(self, samples: Iterable[Sample]) -> Iterator[dict[str, str]]:
        for item in (item for sample in samples for item in (*sample.history, sample.item)):
            if item.id in self._titles:
                self.conflicts += self._titles[item.id] != hash(item.title)
            else:
                self._titles[item.id] = hash(item.title)
                yield {"item": item.id, "title": item.title, "description": item.description}

    def mapping(self, name: str) -> Path:
        """Write the mapping file of the tables: the order of the rows is the time, and every event is positive."""
        path = self.folder / "mapping.yaml"
        facts = {
            "name": name,
            "events": {"path": "events.parquet", "user": "user", "item": "item"},
            "items": {"path": "items.parquet", "item": "item", "text": ["title", "description"]},
        }
        path.write_text(yaml.safe_dump(facts), encoding="utf-8")
        return path


def _row(sample: Sample) -> dict[str, Any]:
    return {
        "raw_user_id": sample.user,
        "raw_item_id": sample.item.id,
        "response": " ".join(sample.response.split()),
        "source": sample.item.title or None,
        "description": sample.item.description or None,
        "profile": sample.profile,
        "part": sample.part,
    }


def _parts(rows: list[dict[str, Any]], fractions: tuple[float, float, float], origin: str) -> dict[str, pa.Table]:
    if any(row["part"] for row in rows):  # only the test part can be given
        both = fractions[0] + fractions[1]
        fractions = (fractions[0] / both, fractions[1] / both, 0.0)
    drawn = split_by_user([row["raw_user_id"] for row in rows], fractions)
    parts: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for row, by_user in zip(rows, drawn, strict=True):
        parts[row.pop("part") or by_user].append(row | {"origin": origin})
    return {split: pa.Table.from_pylist(some, SCHEMA) for split, some in parts.items()}
