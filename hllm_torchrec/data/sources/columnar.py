"""Streaming of columns of large CSV and Parquet files, with row numbers and errors that name file and row."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from hllm_torchrec.data.validation import error_location

_BLOCK_BYTES = 4 << 20
_ROWS_PER_BATCH = 131_072


class ColumnChunk(NamedTuple):
    """Consecutive rows: their numbers (int64 from 1, a header included), the columns, the bytes that they cover."""

    rows: np.ndarray
    table: pa.Table
    size: int


def read_columns(path: Path, columns: Sequence[str]) -> Iterator[ColumnChunk]:
    """Stream `columns` of a `.parquet` file, or of a CSV file with a header (`.tsv`: separated by tabs)."""
    if path.suffix == ".parquet":
        return read_parquet(path, columns)
    return read_csv(path, columns, delimiter="\t" if path.suffix == ".tsv" else ",")


def read_csv(
    path: Path, columns: Sequence[str], *, delimiter: str = ",", names: Sequence[str] | None = None
) -> Iterator[ColumnChunk]:
    """Stream `columns` of a UTF-8 CSV file as strings (an empty cell is ""); line breaks in quotes are allowed.

    `names` are the columns of a file without a header. Raises ValueError naming the file and, if known, the row for a
    missing column, another number of cells, or bytes that are not UTF-8.
    """
    present = list(names) if names is not None else _header(path, delimiter)
    _require_columns(path, columns, present)
    wanted = list(dict.fromkeys(columns))
    read = pa.csv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES, column_names=present, skip_rows=names is None)
    parse = pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    # Strings: a type that Arrow guesses from the first block would change ids ("007") or fail in a later block.
    types = {name: pa.string() for name in wanted}
    convert = pa.csv.ConvertOptions(column_types=types, include_columns=wanted, strings_can_be_null=False)
    next_row, done = (1 if names is not None else 2), 0
    with pa.OSFile(str(path)) as file:
        try:
            with pa.csv.open_csv(file, read_options=read, parse_options=parse, convert_options=convert) as reader:
                for batch in reader:
                    rows = np.arange(next_row, next_row + len(batch))
                    next_row += len(batch)
                    size, done = file.tell() - done, file.tell()
                    yield ColumnChunk(rows, pa.Table.from_batches([batch]), size)
        except (pa.ArrowException, OSError) as error:
            if "Empty CSV file" in str(error):  # no rows, which is not an error here
                return
            raise ValueError(
                f"{path}, after row {next_row - 1}: {str(error)[:300]}. The file is damaged: fetch it again"
            ) from error


def read_parquet(path: Path, columns: Sequence[str]) -> Iterator[ColumnChunk]:
    """Stream `columns` of a Parquet file in their own types. Raises ValueError for a missing column or damage."""
    with error_location(path, "the file is damaged: fetch or write it again"), pq.ParquetFile(path) as file:
        _require_columns(path, columns, file.schema_arrow.names)
        wanted = list(dict.fromkeys(columns))
        per_row = path.stat().st_size / max(file.metadata.num_rows, 1)
        next_row = 1
        for batch in file.iter_batches(_ROWS_PER_BATCH, columns=wanted):
            rows = np.arange(next_row, next_row + len(batch))
            next_row += len(batch)
            batch.validate(full=True)
            yield ColumnChunk(rows, pa.Table.from_batches([batch]).select(wanted), int(per_row * len(batch)))


def _header(path: Path, delimiter: str) -> list[str]:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        try:
            return [name.strip() for name in next(csv.reader(lines, delimiter=delimiter), [])]
        except csv.Error as error:
            raise ValueError(f"{path}, row 1: {error}. A line with the columns' names must be there") from error


def _require_columns(path: Path, wanted: Sequence[str], present: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in present]
    if missing:
        raise ValueError(f"{path}: no column {', '.join(missing)}; it has {', '.join(present) or 'none'}")
