"""Reading of prediction files (Parquet or CSV) by ranges of rows; memory does not grow with the size of the files."""

import glob
import hashlib
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hllm_torchrec.common.errors import did_you_mean
from hllm_torchrec.common.machine_errors import is_machine_error, path_in_errors
from hllm_torchrec.data.sources.columnar import read_csv
from hllm_torchrec.data.sources.dialect import NULL_WORDS, header_names
from hllm_torchrec.data.sources.table_mapping import natural_key
from hllm_torchrec.data.sources.values import require_exact_ids
from hllm_torchrec.data.validation import error_location
from hllm_torchrec.metrics.group_auc import NO_USER, ROWS_WITHOUT_USER

SUFFIXES = (".parquet", ".csv", ".csv.gz")
NUMBERS = ("label", "weight", "history_length", "timestamp")
"""Columns of CSV files that are read as numbers, like scores and probabilities; other columns are read as text."""

EXACT = 1 << 53
"""float64 represents every whole number up to this magnitude."""
FINGERPRINT_CHUNK = 1 << 24
INTEGER = re.compile(r"0|-?[1-9]\d{0,18}")
_LEAST = NO_USER + ROWS_WITHOUT_USER


def find_files(paths: Sequence[str | Path]) -> list[Path]:
    """Resolve `paths` (files, patterns with `*`, or directories with Parquet or CSV files) to files, in natural order.

    Raises:
        ValueError: a path matches no file, or a file is of another kind.
    """
    found: list[Path] = []
    for path in map(str, paths):
        # A path that exists is no pattern, whatever characters it has.
        is_pattern = glob.has_magic(path) and not Path(path).exists()
        matches = sorted(map(Path, glob.glob(path)), key=natural_key) if is_pattern else [Path(path)]
        for match in matches:
            listed = match.iterdir() if match.is_dir() else ()
            inside = sorted((file for file in listed if file.name.endswith(SUFFIXES)), key=natural_key)
            found += inside or ([match] if match.is_file() else [])
            if not (inside or match.is_file()):
                raise ValueError(
                    f"{match} is not a file or a directory with {', '.join(SUFFIXES)} files; {_remedy(match)}"
                )
        if not matches:
            raise ValueError(f"{path} matches no file; look at the pattern, and quote it in a shell")
    for file in found:
        if not file.name.endswith(SUFFIXES):
            raise ValueError(f"{file} is not of a kind that can be read: {', '.join(SUFFIXES)}; convert it")
    return found


def _remedy(folder: Path) -> str:
    """Remedy for a folder without prediction files: the pattern of those in its subfolders, if there are any."""
    below = next((file for file in sorted(folder.rglob("*")) if file.name.endswith(SUFFIXES) and file.is_file()), None)
    if below is None:
        return "name either"
    folders = len(below.relative_to(folder).parts) - 1
    return f"those in its subfolders are read by a pattern: '{folder}/{'*/' * folders}*{''.join(below.suffixes)}'"


@contextmanager
def unchanged_files(paths: Iterable[str | Path]) -> Iterator[None]:
    """Context manager for reading files several times; checks at the end that no file was changed. Collective.

    Raises:
        ValueError: a file was replaced, changed, added or removed inside the block; the message names the first one.
            An error of the block is replaced by this one, because the change may have caused it.
    """
    names = list(paths)
    before = _versions(names)
    try:
        yield
    except Exception as error:
        _require_unchanged(names, before, error)
        raise
    _require_unchanged(names, before)


_Versions = dict[str, tuple[int, int, int]]


def _require_unchanged(paths: Sequence[str | Path], before: _Versions, cause: Exception | None = None) -> None:
    from hllm_torchrec.distributed.array_collectives import gather_objects  # imports torch

    now = _versions(paths)
    changed = next((name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)), None)
    if name := next(filter(None, gather_objects(changed)), None):
        problem = f"{name} was replaced or changed while it was read, by another job: run this job again"
        raise ValueError(problem) from cause


def _versions(paths: Sequence[str | Path]) -> _Versions:
    """File -> (inode, size, modification time); empty if a path matches no file, which the reader reports."""
    try:
        stats = {str(file): file.stat() for file in find_files(paths)}
    except (ValueError, FileNotFoundError):
        return {}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def fingerprint_files(files: Sequence[Path]) -> str:
    """Hash of the contents of the files, in order, as sixteen hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(FINGERPRINT_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


class RowReader:
    """Reads selected columns of several files as one table."""

    def __init__(self, files: Sequence[Path], columns: Sequence[str], folder: Path, numbers: Sequence[str] = ()):
        """Open the files; CSV files are first rewritten as Parquet into `folder`.

        Args:
            columns: columns to read; all files must have them.
            numbers: columns that are numbers in CSV files, in addition to `NUMBERS`.

        Raises:
            ValueError: a file cannot be read or does not have a column; the message names the file.
        """
        self.files, self.columns = list(files), list(dict.fromkeys(columns))
        self._names: list[list[str]] = []
        self._readable = [self._as_parquet(file, folder, index, numbers) for index, file in enumerate(files)]
        self._parquet = [_open(file) for file in self._readable]
        for shown, names in zip(files, self._names):
            _check_columns(shown, names, self.columns)
        self._first_rows = [0]
        for parquet in self._parquet:
            self._first_rows.append(self._first_rows[-1] + parquet.metadata.num_rows)

    @property
    def rows(self) -> int:
        """Number of rows of all files."""
        return self._first_rows[-1]

    def has(self, column: str) -> bool:
        """True if every file has the column, whether or not it is read."""
        return all(column in names for names in self._names)

    @property
    def schemas(self) -> list[pa.Schema]:
        """The schema of each file."""
        return [parquet.schema_arrow for parquet in self._parquet]

    def locate(self, row: int) -> str:
        """Location of a row for messages: `FILE: row 3`, from 0 within the file, and the line of a CSV file."""
        index = bisect_right(self._first_rows, row) - 1
        # Skip empty files, which start at the same row as the next one.
        while self._first_rows[index + 1] == self._first_rows[index]:
            index -= 1
        within = row - self._first_rows[index]
        # Lines count from 1, and the first is the header.
        line = "" if self.files[index].suffix == ".parquet" else f" (line {within + 2})"
        return f"{self.files[index]}: row {within}{line}"

    def batches(self, low: int, high: int, size: int) -> Iterator[pa.Table]:
        """Yield the rows [low, high) in tables of `size` rows; the last one may be shorter."""
        # Regroup the pieces, because the readers of all models must yield the same rows, whatever their row groups are.
        waiting: list[pa.Table] = []
        count = 0
        for piece in self._pieces(low, high, size):
            waiting.append(piece)
            count += len(piece)
            while count >= size:
                # "permissive", because the files of one model may have different types of a column (int32 and int64).
                joined = pa.concat_tables(waiting, promote_options="permissive")
                yield joined.slice(0, size)
                waiting, count = [joined.slice(size)], count - size
        if count:
            yield pa.concat_tables(waiting, promote_options="permissive")

    def _pieces(self, low: int, high: int, size: int) -> Iterator[pa.Table]:
        """Yield the rows [low, high) in pieces as they are decoded; row groups outside the range are not read."""
        for file, first, parquet in zip(self.files, self._first_rows, self._parquet):
            start = first
            for group in range(parquet.num_row_groups):
                end = start + parquet.metadata.row_group(group).num_rows
                if start < high and end > low:
                    position = start
                    for batch in self._decoded(file, parquet, group, size):
                        begin, stop = max(low - position, 0), min(high - position, len(batch))
                        if begin < stop:
                            yield pa.Table.from_batches([batch.slice(begin, stop - begin)])
                        position += len(batch)
                start = end

    def _decoded(self, file: Path, parquet: pq.ParquetFile, group: int, size: int) -> Iterator[pa.RecordBatch]:
        """Yield the validated batches of a row group."""
        with error_location(f"{file}: row group {group}", "write it again"):
            for batch in parquet.iter_batches(size, row_groups=[group], columns=self.columns):
                batch.validate(full=True)
                yield batch

    def _as_parquet(self, file: Path, folder: Path, index: int, numbers: Sequence[str]) -> Path:
        if file.suffix == ".parquet":
            self._names.append(_open(file).schema_arrow.names)
            return file
        names = column_names(file, self.columns)
        self._names.append(names)
        _check_columns(file, names, self.columns)
        numeric = {*NUMBERS, *numbers}
        kinds = {name: pa.float64() if name in numeric else pa.string() for name in self.columns}
        target = folder / f"{id(self)}-{index}.parquet"
        with _readable(file, "CSV", "correct the row, or write the file again: UTF-8, with a header and commas"):
            for name in _rewrite(file, kinds, target):
                kinds[name] = _whole_numbers(file, name)
            if not all(kind in (pa.float64(), pa.string()) for kind in kinds.values()):
                _rewrite(file, kinds, target)
        return target


def _rewrite(file: Path, kinds: dict[str, pa.DataType], target: Path) -> set[str]:
    """Write columns of a text table as Parquet; returns the float64 columns that have integers of EXACT or more."""
    rounded: set[str] = set()
    with pq.ParquetWriter(target, pa.schema(kinds)) as writer:
        for chunk in read_csv(file, list(kinds)):
            columns = {}
            for name, kind in kinds.items():
                columns[name] = texts = chunk.table[name].combine_chunks()
                if kind != pa.string():
                    columns[name] = _as_numbers(texts, kind, f"row {chunk.rows[0]} or later: column {name!r}")
                if kind == pa.float64():
                    large = pc.greater_equal(pc.abs(columns[name]), float(EXACT))
                    whole = pc.and_(large, pc.match_substring_regex(texts, r"^\s*[-+]?\d+\s*$"))
                    rounded |= {name} if pc.any(whole).as_py() else set()
            with path_in_errors(target.parent):
                writer.write_table(pa.table(columns, pa.schema(kinds)))
    return rounded


def _as_numbers(texts: pa.Array, kind: pa.DataType, place: str) -> pa.Array:
    """Texts as numbers; true is 1, false 0, and a word for a missing value null. Raises ValueError for other texts."""
    texts = pc.utf8_trim_whitespace(texts)
    flag = pc.index_in(pc.utf8_lower(texts), value_set=pa.array(["false", "true"]))
    texts = pc.if_else(pc.is_valid(flag), pc.cast(flag, pa.string()), texts)
    absent = pc.fill_null(pc.is_in(texts, value_set=pa.array(["", *NULL_WORDS])), False)
    texts = pc.if_else(absent, pa.scalar(None, pa.string()), texts)
    try:
        return pc.cast(texts, kind)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{place} must be a number: {error}") from error


def _whole_numbers(file: Path, name: str) -> pa.DataType:
    """The 64-bit integer type that can represent all numbers of a column of a text table; float64 if none can."""
    for kind in (pa.int64(), pa.uint64()):
        try:
            for chunk in read_csv(file, [name]):
                _as_numbers(chunk.table[name].combine_chunks(), kind, name)
            return kind
        except ValueError:
            continue
    return pa.float64()


@contextmanager
def _readable(file: Path, kind: str, remedy: str) -> Iterator[None]:
    """Context manager that converts errors of a file's contents into a ValueError with `remedy`.

    Raises:
        OSError: an error of the machine (too many open files, too little memory, ...); the message names the file.
    """
    try:
        with path_in_errors(file):
            yield
    except (pa.ArrowException, OSError, ValueError) as error:
        if is_machine_error(error):
            raise
        problem = str(getattr(error, "problem", error)).removeprefix(f"{file}: ").removeprefix(f"{file}, ")
        raise ValueError(f"{file} cannot be read as {kind}: {problem[:300]}; {remedy}") from error


def _open(file: Path) -> pq.ParquetFile:
    with _readable(file, "Parquet", "write it again"):
        opened = pq.ParquetFile(file, memory_map=False, pre_buffer=False)
        assert opened.schema_arrow.names is not None  # decodes the names, which raises an error if one is not UTF-8
        return opened


def column_names(file: Path, columns: Sequence[str] = ()) -> list[str]:
    """Names of the columns of a Parquet or CSV file; columns: columns that a CSV file is expected to have.

    Raises:
        ValueError: the file cannot be read; the message names it.
    """
    if file.suffix == ".parquet":
        return list(_open(file).schema_arrow.names)
    with _readable(file, "CSV", "correct the row, or write the file again: UTF-8, with a header and commas"):
        return header_names(file, columns)


def has_values(files: Sequence[Path], column: str) -> bool:
    """True if all files have the column and the statistics of Parquet's row groups do not show only nulls."""
    if not all(column in column_names(file) for file in files):
        return False
    return not all(file.suffix == ".parquet" and _only_nulls(_open(file), column) for file in files)


def _only_nulls(parquet: pq.ParquetFile, column: str) -> bool:
    paths = [parquet.schema.column(place).path for place in range(len(parquet.schema))]
    groups = [parquet.metadata.row_group(group) for group in range(parquet.num_row_groups)]
    found = [group.column(paths.index(column)) for group in groups if column in paths]
    return all(c.statistics and c.statistics.has_null_count and c.statistics.null_count == c.num_values for c in found)


def _check_columns(file: Path, found: Sequence[str], wanted: Sequence[str]) -> None:
    for name in wanted:
        if found.count(name) > 1:
            raise ValueError(f"{file} has {found.count(name)} columns {name!r}: remove or rename all but one")
        if name not in found:
            raise ValueError(f"{file} has no column {name!r}{did_you_mean(name, found)}; it has {', '.join(found)}")


def seconds_of(values: pa.ChunkedArray) -> np.ndarray:
    """Times as int64 seconds [n]: Arrow timestamps, or numbers of seconds."""
    if pa.types.is_timestamp(values.type):
        values = pc.cast(pc.cast(values, pa.timestamp("s"), safe=False), pa.int64())
    return values.to_numpy().astype(np.int64)


def identities(values: pa.ChunkedArray) -> np.ndarray:
    """Ids as int64 [n]: integers, including integers stored as text, are kept; other ids become a 64-bit hash.

    Among 10^7 users, the probability that two have the same hash is 3e-6. Raises ValueError for ids that were rounded.
    """
    if pa.types.is_integer(values.type) and not values.null_count:
        limits = pc.min_max(values).as_py()
        if len(values) == 0 or _LEAST <= limits["min"] <= limits["max"] < 2**63:
            return values.to_numpy().astype(np.int64)
    require_exact_ids(values, "user or item")
    texts, codes = encoded(pc.cast(values, pa.string()))
    return np.array([_identity(str(text)) for text in texts], dtype=np.int64)[codes]


def are_absent(values: pa.ChunkedArray) -> np.ndarray:
    """Mask (bool [n]) of missing ids: nulls, NaN, blank texts and words for a missing value, as in a table."""
    if pa.types.is_integer(values.type):
        return values.is_null().to_numpy()
    values = values.cast(values.type.value_type) if pa.types.is_dictionary(values.type) else values
    words = pa.array(["", *NULL_WORDS], pa.string())
    return pc.is_in(pc.utf8_trim_whitespace(pc.fill_null(pc.cast(values, pa.string()), "")), value_set=words).to_numpy()


def encoded(values: pa.ChunkedArray) -> tuple[list[object], np.ndarray]:
    """(distinct values, with None for null; index of each row's value in them [n])."""
    if pa.types.is_dictionary(values.type):
        values = pc.cast(values, values.type.value_type)
    found = pc.dictionary_encode(values.combine_chunks(), null_encoding="encode")
    return found.dictionary.to_pylist(), found.indices.to_numpy()


def _identity(text: str) -> int:
    if INTEGER.fullmatch(text) and _LEAST <= int(text) < 2**63:
        return int(text)
    found = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
    return found if found >= _LEAST else found + ROWS_WITHOUT_USER
