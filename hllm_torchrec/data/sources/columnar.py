"""Streaming of columns of large tables: text, Parquet, Arrow and JSON lines; errors name file and row."""

import ast
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from hllm_torchrec.common.errors import did_you_mean
from hllm_torchrec.common.text_files import Utf8File
from hllm_torchrec.common.yaml_files import abbreviate
from hllm_torchrec.data.sources.dialect import MAX_ROW_BYTES, Dialect, Format, UnclearTableError, detect_dialect
from hllm_torchrec.data.sources.row_stream import RowStream
from hllm_torchrec.data.sources.values import as_texts
from hllm_torchrec.data.validation import error_location

_ROWS_PER_BATCH = 131_072
_DAMAGED = "the file is damaged: fetch or write it again"
_FOREIGN = {
    b"Obj\x01": "an Avro file",
    b"SQLite format 3\0": "an SQLite database",
    b"\xd0\xcf\x11\xe0": "an Excel workbook",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"\x89HDF": "an HDF5 file",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
}
"""First bytes, which no text begins with, of files that are often given instead of tables -> their kind."""


class ColumnChunk(NamedTuple):
    """Consecutive rows: row numbers (int64 from 1, counting a header), columns, and about how many bytes of the file
    they take (for the progress bar; of an Arrow file, their bytes in memory)."""

    rows: np.ndarray
    table: pa.Table
    size: int
    dialect: str = ""
    """Description of how the file is read, for the summary."""


def read_columns(path: Path, columns: Sequence[str], given: Format | None = None) -> Iterator[ColumnChunk]:
    """Stream `columns` of a Parquet, Arrow (Feather), JSON lines or text file; its first bytes decide which.

    If `given` has settings, the file is not read as JSON lines. Columns that only the names of the file's folders have
    (`day=2024-01-31/part-0.parquet`) are read from there.
    """
    folders = {name: value for name, value in _values_of_folders(path).items() if name in columns}
    outside = [name for name in folders if not _has_column(path, name, given)]
    for chunk in _read(path, [name for name in columns if name not in outside], given):
        table = chunk.table
        for name, value in folders.items():
            if name in outside:
                table = table.append_column(name, pa.array([value] * len(table), pa.string()))
            else:
                _require_folder_value(path, name, value, table[name])
        yield chunk._replace(table=table.select(list(dict.fromkeys(columns))))


def _values_of_folders(path: Path) -> dict[str, str | None]:
    """Column -> value in the names of the file's folders, `column=value`, as Spark, Hive and Arrow write them."""
    found = [re.fullmatch(r"([^=]+)=(.*)", part) for part in path.parent.parts]
    # Characters that file systems reserve are escaped as in URLs.
    return {unquote(m[1]): None if m[2] == "__HIVE_DEFAULT_PARTITION__" else unquote(m[2]) for m in found if m}


def _has_column(path: Path, name: str, given: Format | None) -> bool:
    try:
        next(_read(path, [name], given), None)
    except ValueError:  # another problem of the file is raised when its other columns are read
        return False
    return True


def _require_folder_value(path: Path, name: str, value: str | None, values: pa.ChunkedArray) -> None:
    """Raise ValueError if a column of the file differs from the value in the name of a folder (Iceberg writes both)."""
    for found in as_texts(values).unique().to_pylist():
        if found != value:
            raise ValueError(
                f"{path}: column {name} has {abbreviate(found)}, and the name of its folder says {name}={value}; "
                "rename the column or the folder"
            )


def _read(path: Path, columns: Sequence[str], given: Format | None) -> Iterator[ColumnChunk]:
    with path.open("rb") as file:
        head = file.read(16)
    if head[:4] == b"PAR1":
        return read_parquet(path, columns)
    if head[:6] == b"ARROW1":
        return _read_arrow(path, columns)
    if kind := next((kind for magic, kind in _FOREIGN.items() if head.startswith(magic)), None):
        raise ValueError(f"{path} is {kind}, which is not read; write it as CSV, Parquet or JSON lines")
    if path.suffix in (".parquet", ".feather", ".arrow"):
        raise ValueError(f"{path} is not a {path.suffix[1:]} file by its first bytes; {_DAMAGED}")
    if given is None or given == Format():
        with Utf8File(path) as text:
            start = text.read(4096).lstrip()
        if start[:1] == b"{":
            return read_json_lines(path, columns)
        if b"\0" in start.partition(b"\n")[0]:
            raise ValueError(f"{path} is not a table: its first line has a zero byte; write it as CSV or Parquet")
        if re.match(rb"\[\s*\{", start):
            raise ValueError(f"{path} is one JSON array; write one object per line, without commas between them")
    return read_csv(path, columns, given)


def read_csv(path: Path, columns: Sequence[str], given: Format | None = None) -> Iterator[ColumnChunk]:
    """Stream `columns` of a text table as strings; a missing value is null, and an empty quoted cell is "".

    Raises ValueError naming the file and, if known, the row for a missing column, a wrong number of cells, a quotation
    mark that is not closed, or bytes that are not text.
    """
    dialect = detect_dialect(path, columns, given)
    wanted = list(dict.fromkeys(columns))
    words = ["", *dialect.nulls] if given and given.nulls is not None else ["", "\\N", *dialect.nulls]
    # Read strings, because a type that Arrow guesses from the first block would change ids ("007") or fail later.
    convert = pa.csv.ConvertOptions(
        column_types={name: pa.string() for name in wanted},
        include_columns=wanted,
        null_values=words,
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
    )
    next_row, done = dialect.first_row, 0
    with Utf8File(path, given.encoding if given else None) as file:
        try:
            with _arrow_reader(RowStream(file, dialect), dialect, convert) as reader:
                for batch in reader:
                    rows = np.arange(next_row, next_row + len(batch))
                    next_row += len(batch)
                    _refuse_header(path, batch, rows, dialect.names[0])
                    at = file.tell()  # read once, because Arrow reads ahead in its own thread
                    size, done = at - done, at
                    yield ColumnChunk(rows, pa.Table.from_batches([batch]), size, str(dialect))
        except pa.ArrowException as error:
            if "Empty CSV file" in str(error):  # no rows, which is not an error here
                return
            problem, remedy = _reason(error, dialect)
            raise UnclearTableError(f"{path}, after row {next_row - 1}: {problem}", remedy) from error


def _refuse_header(path: Path, batch: pa.RecordBatch, rows: np.ndarray, first: str) -> None:
    """Raise ValueError for a row that begins with a byte order mark or repeats the header, as in joined files.

    first: the file's first column; if it is not among those of `batch`, no value that is read has the mark.
    """
    names = batch.schema.names
    if first in names:
        marked = pc.fill_null(pc.starts_with(batch.column(names.index(first)), "\ufeff"), False)
        if (at := pc.index(marked, True).as_py()) >= 0:
            raise ValueError(
                f"{path}, row {rows[at]}: a byte order mark within the file, as in files that were joined; remove it"
            )
    if len(names) < 2:
        return  # a single cell can be equal to the name of its column
    for at in np.flatnonzero(pc.fill_null(pc.equal(batch.column(0), names[0]), False).to_numpy(zero_copy_only=False)):
        if all(batch.column(i)[int(at)].as_py() == name for i, name in enumerate(names)):
            raise ValueError(
                f"{path}, row {rows[at]}: the header again ({', '.join(names)[:200]}), as in files that were joined; "
                "remove this row"
            )


def _arrow_reader(stream: RowStream, dialect: Dialect, convert: pa.csv.ConvertOptions) -> pa.csv.CSVStreamingReader:
    read = pa.csv.ReadOptions(use_threads=False, block_size=MAX_ROW_BYTES, column_names=_unique(dialect.names))
    parse = pa.csv.ParseOptions(
        delimiter=stream.delimiter, quote_char='"' if stream.quote else False, newlines_in_values=stream.quote
    )
    return pa.csv.open_csv(stream, read_options=read, parse_options=parse, convert_options=convert)


def _unique(names: Sequence[str]) -> list[str]:
    """The names, with a number added to repeated ones: columns that are not read may have the same name."""
    return [name if names.index(name) == i else f"{name}\0{i}" for i, name in enumerate(names)]


def _reason(error: Exception, dialect: Dialect) -> tuple[str, str]:
    """(Arrow's message with row numbers converted to those of the file, remedy)."""
    before = dialect.first_row - 1
    text = re.sub(r"Row #(\d+)", lambda m: f"Row #{int(m[1]) + before}", str(error)[:300])
    if "invalid UTF8" in text:
        return text, "Set format: {encoding: cp1252} (or whichever it is) in the mapping, or fetch it again"
    if "straddling" in text:
        return f"a row of more than {MAX_ROW_BYTES:,} bytes", "Correct it"
    return text, f"Correct the row; the file is read with {dialect}, which `format` in the mapping can change"


def read_parquet(path: Path, columns: Sequence[str]) -> Iterator[ColumnChunk]:
    """Stream `columns` of a Parquet file in the file's types. Raises ValueError for a missing column or damage."""
    with error_location(path, _DAMAGED), pq.ParquetFile(path) as file:
        _require_columns(path, columns, file.schema_arrow.names)
        wanted = list(dict.fromkeys(columns))
        per_row = path.stat().st_size / max(file.metadata.num_rows, 1)
        next_row = 1
        for batch in file.iter_batches(_ROWS_PER_BATCH, columns=wanted):
            rows = np.arange(next_row, next_row + len(batch))
            next_row += len(batch)
            batch.validate(full=True)
            yield ColumnChunk(rows, pa.Table.from_batches([batch]).select(wanted), int(per_row * len(batch)))


def _read_arrow(path: Path, columns: Sequence[str]) -> Iterator[ColumnChunk]:
    """Stream `columns` of an Arrow IPC (Feather) file in the file's types."""
    with error_location(path, _DAMAGED), pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as file:
        _require_columns(path, columns, file.schema.names)
        wanted, next_row = list(dict.fromkeys(columns)), 1
        for index in range(file.num_record_batches):
            batch = file.get_batch(index)
            batch.validate(full=True)
            table = pa.Table.from_batches([batch]).select(wanted)
            for start in range(0, len(table), _ROWS_PER_BATCH):
                part = table.slice(start, _ROWS_PER_BATCH)
                yield ColumnChunk(np.arange(next_row, next_row + len(part)), part, part.nbytes)
                next_row += len(part)


def read_json_lines(path: Path, columns: Sequence[str]) -> Iterator[ColumnChunk]:
    """Stream `columns` of a file with one JSON object or Python dict per line; a key that a line lacks is null.

    Raises ValueError naming file and row for a line that is neither, for a column that no line of the first batch has,
    or for values of several types in one column (but integers may be mixed with floats, or with texts).
    """
    wanted, done, seen = list(dict.fromkeys(columns)), 0, False
    with Utf8File(path) as file:
        for rows, records in _batches(path, file):
            if not seen:
                _require_columns(path, wanted, list(dict.fromkeys(key for record in records for key in record)))
                seen = True
            with error_location(f"{path}, rows {rows[0]}..{rows[-1]}", "write one type of value per column"):
                table = pa.table({name: _column([record.get(name) for record in records]) for name in wanted})
            at = file.tell()
            size, done = at - done, at
            yield ColumnChunk(np.array(rows, np.int64), table, size, "JSON lines")


def _column(values: list[Any]) -> pa.Array:
    kinds = {type(value) for value in values} - {type(None)}
    if kinds in ({int, float}, {int, str}):  # convert to one type: float, or str for ids
        convert = float if float in kinds else str
        values = [None if value is None else convert(value) for value in values]
    try:
        return pa.array(values)
    except OverflowError:  # integers that do not fit into 64 bits
        if kinds != {int}:
            raise
        return pa.array([None if value is None else str(value) for value in values])


def _batches(path: Path, file: Utf8File) -> Iterator[tuple[list[int], list[dict[str, Any]]]]:
    rows: list[int] = []
    records: list[dict[str, Any]] = []
    for row, line in text_lines(path, file):
        record = parse_record(line, path, row)
        rows.append(row)
        records.append(record)
        if len(rows) == _ROWS_PER_BATCH // 8:
            yield rows, records
            rows, records = [], []
    if rows:
        yield rows, records


class _RepeatedKey(Exception):
    """A JSON object has a key twice."""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        twice = next(name for index, (name, _) in enumerate(pairs) if name in dict(pairs[:index]))
        raise _RepeatedKey(f"key {twice[:100]!r} is there twice; write each key once")
    return record


def parse_record(line: bytes, path: Path, row: int) -> dict[str, Any]:
    """Parse one line, JSON or a Python literal, as a dict.

    Raises:
        ValueError: naming file and row; the line is neither, or has a key twice.
    """
    try:
        record = json.loads(line, object_pairs_hook=_without_repeats)
    except _RepeatedKey as error:
        raise ValueError(f"{path}, row {row}: {error}") from error
    except (ValueError, RecursionError):
        try:
            literal = ast.parse(line.decode("utf-8").strip(), mode="eval")
            record = ast.literal_eval(literal)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
            raise ValueError(
                f"{path}, row {row}: neither JSON nor a Python literal ({error}); fetch it again, or write one object "
                "per line"
            ) from error
        if isinstance(literal.body, ast.Dict) and len(literal.body.keys) > len(record):
            raise ValueError(f"{path}, row {row}: a key is there twice; write each key once") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path}, row {row}: a {type(record).__name__}, expected a dict; write one object per line")
    return record


def text_lines(path: Path, file: Utf8File) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line without its end) of all lines that are not blank."""
    before, rest = 0, b""
    while block := file.read(1 << 20):
        *lines, rest = (rest + block).split(b"\n")
        for row, line in enumerate(lines, start=before + 1):
            if line.strip():
                yield row, line
        before += len(lines)
        if len(rest) > 1 << 28:
            raise ValueError(f"{path}, row {before + 1}: more than {1 << 28:,} bytes; write one object per line")
    if rest.strip():
        yield before + 1, rest


def _require_columns(path: Path, wanted: Sequence[str], present: Sequence[str]) -> None:
    missing = [name for name in dict.fromkeys(wanted) if name not in present]
    if missing:
        near = did_you_mean(missing[0], present) if len(missing) == 1 else ""
        shown = ", ".join(present[:50])[:500] or "none"
        raise ValueError(f"{path}: no column {', '.join(missing)}{near}; it has {shown}")
    twice = [name for name in dict.fromkeys(wanted) if present.count(name) > 1]
    if twice:
        raise ValueError(f"{path}: column {twice[0]} is there twice; rename one of them")
