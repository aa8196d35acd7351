"""Search of all files below folders for raw ids, to check that nothing is left of erased ids.

Text files are searched for the id as a word (an id that is a number: as a quoted value, because unquoted numbers are
too frequent). Files that are not text are searched in the same way, but not for short words, which occur by chance. In
Parquet and Arrow files, text columns are compared with the ids, too.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hllm_torchrec.data.manifest import MANIFEST, VERSIONS

LONG = 6
"""Minimum number of bytes of a word that is searched for in files that are not text."""
_BLOCK = 1 << 24
_HEAD = 4096
_WORD = re.compile(rb"[\w-]+")
_NUMBER = re.compile(rb"[\"'](-?[0-9]+)[\"'](?!\s*:)")
"""A quoted number that is not a key of a JSON object."""


def files_with(
    folders: Sequence[Path], raw_ids: Sequence[str], kinds: Mapping[str, Sequence[str]] | None = None
) -> Iterator[Path]:
    """Yield the files below `folders` in which one of the ids occurs; links are not followed.

    kinds: name of a column with users or items -> the ids of this kind (the item "1" is not the user "1"). If given,
    ids that are numbers are searched for in these columns only, and as quoted values in all files except manifests,
    whose quoted numbers are actions and values of features.
    """
    words, named = _Words(raw_ids), _Words([raw for raw in raw_ids if not _is_number(raw)])
    others = raw_ids if kinds is None else [raw for raw in raw_ids if not _is_number(raw)]
    texts = {name: pa.array(ids, pa.string()) for name, ids in (kinds or {}).items()}
    texts[""] = pa.array(others, pa.string())
    seen: set[Path] = set()
    for path in (path for folder in folders for path in sorted(folder.rglob("*"))):
        if path.is_symlink() or not path.is_file() or path in seen:
            continue
        seen.add(path)
        is_manifest = kinds is not None and (path.name == MANIFEST or path.parent.name == VERSIONS)
        if _table_has(path, texts) or (named if is_manifest else words).are_in(path):
            yield path


def _is_number(raw: str) -> bool:
    return _NUMBER.fullmatch(f'"{raw}"'.encode()) is not None


class _Words:
    """Finds ids in bytes: words and numbers by look-up in a set, in one pass for all of them; other ids one by one."""

    def __init__(self, raw_ids: Sequence[str]) -> None:
        ids = {raw.encode() for raw in raw_ids}
        self._numbers = {raw for raw in ids if _NUMBER.fullmatch(b'"' + raw + b'"')}
        self._plain = {raw for raw in ids if _WORD.fullmatch(raw)} - self._numbers
        others = ids - self._plain - self._numbers
        self._others = [re.compile(rb"(?<![\w-])" + re.escape(raw) + rb"(?![\w-])") for raw in others]
        self._long = {raw for raw in self._plain if len(raw) >= LONG}
        self._overlap = max(map(len, ids), default=0) + 4

    def are_in(self, path: Path) -> bool:
        """True if one of the ids is in a file; in a file that is not text, words shorter than LONG are ignored."""
        with path.open("rb") as file:
            is_text = b"\0" not in file.read(_HEAD)
            file.seek(0)
            before, wanted = b"", self._plain if is_text else self._long
            while block := file.read(_BLOCK):
                data = before + block
                if self._has(data, bool(before), wanted):
                    return True
                before = data[-self._overlap :]
        return False

    def _has(self, data: bytes, is_later: bool, plain: set[bytes]) -> bool:
        """True if one of the ids is in a block. is_later: the block starts with the end of the previous block."""
        if plain and any(one[0] in plain for one in _matches(_WORD, data, is_later)):
            return True
        if self._numbers and any(one[1] in self._numbers for one in _matches(_NUMBER, data, is_later)):
            return True
        return any(True for word in self._others for _ in _matches(word, data, is_later))


def _matches(pattern: re.Pattern[bytes], data: bytes, is_later: bool) -> Iterator[re.Match[bytes]]:
    """Yield the matches, except one at the start of a later block, which may be the end of a longer word."""
    return (match for match in pattern.finditer(data) if match.start() or not is_later)


def _table_has(path: Path, texts: Mapping[str, pa.Array]) -> bool:
    """True if a text column of a Parquet or Arrow file has one of its ids. texts: column -> ids; "": other columns."""
    try:
        if path.suffix == ".parquet":
            batches: Iterator[pa.RecordBatch] = pq.ParquetFile(path).iter_batches()
        elif path.suffix == ".arrow":
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            return False
        return any(_batch_has(batch, texts) for batch in batches)
    except (pa.ArrowInvalid, OSError):  # damaged or in another format; the caller searches the bytes
        return False


def _batch_has(batch: pa.RecordBatch, texts: Mapping[str, pa.Array]) -> bool:
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        wanted = texts.get(name, texts[""])
        while pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            column = column.flatten()
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        if is_text and pc.any(pc.is_in(column.cast(pa.string()), wanted)).as_py():
            return True
    return False
