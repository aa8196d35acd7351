"""Journal of items that were added after the dataset was prepared: one JSON line per item, read by every process.

The file is `<dataset>/new_items.jsonl`. Its first line has a unique name of the journal, each other line an item:

    {"journal": "5f0e1c..."}
    {"id": "s41", "text": {"title": "..."}, "features": {"genres": ["drama"]}}

Lines are appended under a lock. A later line of the same item replaces its text and features. `hllm forget` replaces
the line of an item by blanks. If an item is also in the dataset, its line is ignored; the file may be deleted when all
its items are in the dataset.
"""

import json
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hllm_torchrec.common.errors import UnavailableError, did_you_mean
from hllm_torchrec.common.yaml_files import abbreviate
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.tombstones import ITEMS

JOURNAL = "new_items.jsonl"
"""Name of the journal in a dataset's folder."""

LOCK_SECONDS = 60


@dataclass(frozen=True)
class NewItem:
    """An item that is not in the dataset. text: text column -> text; features: feature -> values."""

    id: str
    text: dict[str, str] = field(default_factory=dict)
    features: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class JournalLines:
    """Items read from a journal.

    name: name of the journal ("" if its first line was not read); end: offset of the first byte that was not read.
    """

    name: str
    items: list[NewItem]
    end: int


class NewItemJournal:
    """Appends items to a journal file and reads them; the file need not exist."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, items: Sequence[NewItem]) -> None:
        """Append items; they are on the disk, and visible to other processes, when this returns.

        Raises:
            UnavailableError: the file cannot be written, or another process holds its lock.
        """
        try:
            with FileLock(self.path.with_suffix(".lock"), timeout=LOCK_SECONDS):
                self._append(items)
        except Timeout:
            raise UnavailableError(
                f"{self.path}: another process has held its lock for {LOCK_SECONDS} s: wait for it, or stop it"
            ) from None
        except OSError as error:
            raise UnavailableError(
                f"{self.path}: cannot be written ({error.strerror}): name a journal in a folder that all processes "
                "can write to"
            ) from None

    def _append(self, items: Sequence[NewItem]) -> None:
        with self.path.open("ab+") as file:
            # A process that was killed while appending leaves an incomplete line, which no reader has used: remove it.
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            complete = file.read().rfind(b"\n") + 1
            if complete < size:
                file.truncate(complete)
            lines: list[Any] = [] if complete else [{"journal": uuid.uuid4().hex}]
            lines += [asdict(item) for item in items]
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())

    def read(self, start: int = 0) -> JournalLines:
        """Read the complete lines from byte `start` on (0, or the `end` of an earlier call).

        Raises:
            ValueError: a line does not have the format in the module docstring, or the file is shorter than `start`.
        """
        data, size = b"", 0
        if self.path.is_file():  # also False for a pipe, which would block
            with self.path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(start)
                data = file.read()
        if start > size:
            raise ValueError(f"{self.path}: it was deleted or cut while in use: start this process again")
        data = data[: data.rfind(b"\n") + 1]
        name, items = "", []
        for number, line in enumerate(data.splitlines(), 1):
            if not line.strip():  # a forgotten item's line: as many blanks, so that byte offsets remain valid
                continue
            value = self._parsed(line, number, start)
            if isinstance(value, NewItem):
                items.append(value)
            else:
                name = value
        return JournalLines(name, items, start + len(data))

    def _parsed(self, line: bytes, number: int, start: int) -> NewItem | str:
        """Parse one line: an item, or, in the first line of the file, the journal's name."""
        try:
            value = json.loads(line)
            if start == 0 and number == 1:
                return str(value["journal"])
            item = NewItem(**value)
        except (ValueError, TypeError, KeyError):
            item = NewItem("")
        if not item.id or item_problem(item):
            place = f"line {number}" if start == 0 else f"line {number} after byte {start}"
            raise ValueError(f"{self.path}, {place}: {line[:100]!r} is no item: remove the line")
        return item


def new_items(
    dataset: Dataset,
    raw_ids: Sequence[str],
    texts: Mapping[str, Sequence[str]],
    features: Mapping[str, Sequence[str | Sequence[str]]] | None = None,
) -> list[NewItem]:
    """Check and assemble new items from columns, each with one entry per item.

    Args:
        raw_ids: [n].
        texts: text column -> [n] texts; a text column that is not given is empty.
        features: item feature -> [n] entries, each a text or a list of texts.

    Raises:
        ValueError: an id is given twice, is blank or was forgotten; an id, text or value is not a str; a column or
            feature is unknown; or a column does not have n entries.
    """
    features = features or {}
    for kind, given, known in (
        ("texts", texts, dataset.manifest["text_columns"]),
        ("features", features, dataset.manifest["item_features"]),
    ):
        for name, column in given.items():
            if name not in known:
                had = ", ".join(known) or "none"
                raise ValueError(f"{kind}.{name}: unknown{did_you_mean(name, known)}; the dataset has {had}")
            if isinstance(column, str) or len(column) != len(raw_ids):
                raise ValueError(f"{kind}.{name}: must have one entry for each of the {len(raw_ids)} ids")
    items = [
        NewItem(
            raw,
            {name: column[row] for name, column in texts.items()},
            {name: _values(column[row]) for name, column in features.items()},
        )
        for row, raw in enumerate(raw_ids)
    ]
    seen: set[str] = set()
    for row, item in enumerate(items):
        problem = item_problem(item) or ("it is given twice" if item.id in seen else "")
        if not problem and dataset.tombstones.find(ITEMS, item.id) is not None:
            problem = "it was forgotten (hllm forget)"
        if problem:
            raise ValueError(f"raw_ids, entry {row}: {abbreviate(item.id)}: {problem}")
        seen.add(item.id)
    return items


def item_problem(item: NewItem) -> str:
    """The reason why an item cannot be used, or an empty text."""
    if not isinstance(item.id, str) or not item.id.strip():
        return "an id must be a text that is not blank"
    if not isinstance(item.text, dict) or not _all_texts([*item.text, *item.text.values()]):
        return "a text must be a str"
    if not isinstance(item.features, dict) or not _all_texts(item.features):
        return "a feature's name must be a str"
    if not all(isinstance(values, list) and _all_texts(values) for values in item.features.values()):
        return "a feature's values must be a list of str"
    return ""


def _values(given: str | Sequence[str]) -> list[str]:
    return [given] if isinstance(given, str) else list(given)


def _all_texts(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)
