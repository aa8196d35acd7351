"""Search of all files below folders for raw ids: proof that nothing is left of erased ones.

Text is searched for the id as a word, Parquet and Arrow files by their texts, other files for the bytes of ids that are
too long to occur by chance.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

LONG = 6
"""Number of bytes from which an id is searched for in files that are not text."""
_BLOCK = 1 << 24
_HEAD = 4096


def files_with(folders: Sequence[Path], raw_ids: Sequence[str]) -> Iterator[Path]:
    """The files below `folders`, links not followed, in which one of the ids occurs."""
    patterns = [(raw.encode(), re.compile(rb"(?<![\w-])" + re.escape(raw.encode()) + rb"(?![\w-])")) for raw in raw_ids]
    texts = pa.array(raw_ids, pa.string())
    seen: set[Path] = set()
    for path in (path for folder in folders for path in sorted(folder.rglob("*"))):
        if path.is_symlink() or not path.is_file() or path in seen:
            continue
        seen.add(path)
        if _table_has(path, texts) or _bytes_have(path, patterns):
            yield path


def _bytes_have(path: Path, patterns: list[tuple[bytes, re.Pattern[bytes]]]) -> bool:
    overlap = max((len(raw) for raw, _ in patterns), default=0) + 1
    with path.open("rb") as file:
        is_text = b"\0" not in file.read(_HEAD)
        file.seek(0)
        before = b""
        while block := file.read(_BLOCK):
            data = before + block
            if any((is_text or len(raw) >= LONG) and raw in data and word.search(data) for raw, word in patterns):
                return True
            before = data[-overlap:]
    return False


def _table_has(path: Path, texts: pa.Array) -> bool:
    """True if a text column of a Parquet or Arrow file has one of the texts."""
    try:
        if path.suffix == ".parquet":
            batches: Iterator[pa.RecordBatch] = pq.ParquetFile(path).iter_batches()
        elif path.suffix == ".arrow":
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            return False
        return any(_batch_has(batch, texts) for batch in batches)
    except (pa.ArrowInvalid, OSError):  # damaged, or of another format: searched as bytes
        return False


def _batch_has(batch: pa.RecordBatch, texts: pa.Array) -> bool:
    for column in batch.columns:
        while pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            column = column.flatten()
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            if pc.any(pc.is_in(column.cast(pa.string()), texts)).as_py():
                return True
    return False
