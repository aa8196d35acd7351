"""The dialect of a text table: separator, quoting, escapes, encoding, header and words for missing values.

Each part is taken from the mapping's `format`, or else detected from a sample at the start of the file:

- separator: the one of `SEPARATORS` that splits the first line so that it contains all columns to read (without a
  header line: that splits each of the first 100 rows into the number of columns in the mapping);
- quoting: cells in double quotation marks, where a mark inside a cell is doubled (RFC 4180) or has a backslash before
  it (Spark); cells in apostrophes; or no quoting, for example if a cell begins with a mark that is never closed.
  Without quoting, there may be backslashes before separators and line breaks, and `\\N` for null (MySQL, PostgreSQL);
- encoding: UTF-8, or UTF-16 or UTF-32 by their byte order mark. Other encodings cannot be detected and must be given;
- nulls: an empty cell; unless `format.nulls` lists other words, also `\\N`, and each of `NULL_WORDS` that is in a
  column whose other cells are numbers, times or booleans. These words are null in all columns.

If two dialects fit the sample and give different values, an error names the option that decides between them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

from hllm_torchrec.common.text_files import Utf8File
from hllm_torchrec.data.sources.cells import (
    BARE_RETURN,
    NULL,
    Cell,
    Rows,
    cell_pattern,
    count_lines,
    matches,
    split_rows,
)

SEPARATORS = (",", "\t", ";", "|", "\x01")
NULL_WORDS = ("NULL", "null", "None", "NA", "N/A", "n/a", "<NA>", "#N/A", "NaN", "nan", "NaT")
SAMPLE_BYTES = 1 << 18
MAX_ROW_BYTES = 4 << 20
"""Maximum size of a row in bytes."""

_NAMES = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar", "\x01": "control-A", " ": "blank"}
_MARKS = {'"': "double", "'": "single"}
_EXCEL_HINT = re.compile(rb"sep=(.)\r?\n", re.IGNORECASE)
_VALUE = re.compile(
    rb"\s*(?:[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|\d{4}-\d\d-\d\d(?:[T ][\d:.]+)?(?:Z|UTC|[-+]\d\d:?\d\d)?"
    rb"|true|false|True|False|TRUE|FALSE)\s*"
)
_LITERAL_BACKSLASH = re.compile(rb"(?<!\\)(?:\\\\)*\\(?![\\ntr0bfvN\t\r\n])")
_WORD = re.compile(rb"[A-Za-z0-9_.:+-]*")


@dataclass(frozen=True)
class Format:
    """The `format` part of the mapping; None: the value is detected."""

    separator: str | None = None
    """Text between the cells: one or more characters."""
    quote: str | None = None
    """Quotation mark around cells: `"`, `'` or "none"."""
    escape: str | None = None
    """Escape character before a mark, separator or line break inside a cell: `\\` or "none"."""
    encoding: str | None = None
    header: list[str] | None = None
    """Names of the columns of a file without a header line."""
    nulls: list[str] | None = None
    """Words for missing values in all columns, including ids and texts; besides them, only an empty cell is missing."""


@dataclass(frozen=True)
class Dialect:
    """Settings for reading a text table; see the module docstring."""

    separator: str
    quote: str
    """`"`, `'` or "" (cells are not quoted)."""
    escape: str
    """`\\` or ""."""
    encoding: str
    compression: str
    names: tuple[str, ...]
    """Names of the columns in the file's order."""
    skip: int
    """Number of bytes, in UTF-8, before the first row."""
    first_row: int
    """Line number of the first row, from 1, counting a header."""
    nulls: tuple[str, ...]
    line_end: str
    """CR if the first line ends with CR; else LF, which includes CR LF."""
    has_returns: bool
    """True if the sample has a CR that is not part of a line end."""
    is_certain: bool
    """False if no cell of the sample shows whether the file uses quoting."""

    def __str__(self) -> str:
        """The dialect in words, for the summary."""
        quoting = f"cells in {_MARKS[self.quote]} quotation marks" if self.quote else "no quoting"
        if self.quote == '"' and not self.is_certain:
            quoting = "no quoted cell seen"
        parts = [f"separated by {_NAMES.get(self.separator, repr(self.separator))}", quoting]
        parts += ["backslash escapes"] if self.escape else []
        parts += [self.encoding] if self.encoding not in ("utf-8", "utf-8-sig") else []
        parts += [self.compression] if self.compression else []
        parts += [] if self.first_row > 1 else ["no header"]
        parts += [f"missing: {', '.join(self.nulls)}"] if self.nulls else []
        return ", ".join(parts)


def detect_dialect(path: Path, columns: Sequence[str], given: Format | None = None) -> Dialect:
    """Detect the dialect of a text table that has `columns`.

    Raises:
        ValueError: a column is missing; or no dialect is consistent with the first rows, or several are.
    """
    given = given or Format()
    with Utf8File(path, given.encoding) as file:
        text = b""
        while len(text) < SAMPLE_BYTES and (block := file.read(SAMPLE_BYTES)):
            text += block
        complete = not file.read(1)
        encoding, compression = file.encoding, file.compression
    hint = _EXCEL_HINT.match(text)
    before = hint.end() if hint else 0
    before += len(text[before:]) - len(text[before:].lstrip(b"\r\n"))
    separator = given.separator or (hint[1].decode("latin-1") if hint else None)
    line = count_lines(text[:before]) + 1
    sample = _Sample(path, text[before:], complete, tuple(columns), given, line)
    separator, header = sample.separator_and_header(separator)
    quote, escape, is_certain = sample.quoting(separator, header)
    return Dialect(
        separator=separator,
        quote=quote,
        escape=escape,
        encoding=encoding,
        compression=compression,
        names=header.names,
        skip=before + header.size,
        first_row=line + count_lines(text[before : before + header.size]) if header.size else line,
        nulls=sample.null_words(separator, quote, escape, header.size),
        line_end=sample.line_end.decode(),
        has_returns=sample.line_end != b"\r" and BARE_RETURN.search(text) is not None,
        is_certain=is_certain,
    )


class UnclearTableError(ValueError):
    """Error for a text table that several dialects fit, or none; the remedy is a change of a source's mapping."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}. {remedy}")


def header_names(path: Path, columns: Sequence[str] = ()) -> list[str]:
    """Names of a text table's columns; columns: expected names, used to find the separator.

    Raises ValueError for a file that is not text or has no header.
    """
    with Utf8File(path) as file:
        text = file.read(SAMPLE_BYTES)
    text = text[len(text) - len(text.lstrip(b"\r\n")) :]
    sample = _Sample(path, text, False, (), Format(), 1)
    headers = [sample.header(separator).names for separator in SEPARATORS]
    found = next((names for names in headers if columns and set(columns) <= set(names)), None) or max(headers, key=len)
    if not any(found):
        raise ValueError(f"{path}: its first line names no columns")
    return list(found)


class _Header(NamedTuple):
    names: tuple[str, ...]
    size: int
    """Bytes of the header line; 0 if the mapping gives the names."""
    quoted: bool


class _Sample:
    """The first rows of a file, and detection of the dialect from them."""

    def __init__(
        self, path: Path, text: bytes, complete: bool, wanted: tuple[str, ...], given: Format, line: int
    ) -> None:
        """Args:
        text: starts with the header or, if the mapping gives the header, with the first row.
        complete: True if the text reaches the end of the file.
        line: line number at which the text starts.
        """
        self.path, self.text, self.complete, self.wanted, self.given = path, text, complete, wanted, given
        self.line = line
        first = re.search(rb"\r\n|\n|\r", text)
        self.line_end = b"\r" if first is not None and first[0] == b"\r" and b"\n" not in text else b"\n"

    def separator_and_header(self, separator: str | None) -> tuple[str, _Header]:
        """(separator with which the wanted columns exist, header)."""
        tried = (separator,) if separator else SEPARATORS
        if self.given.header is not None:
            names = tuple(self.given.header)
            self._require(names, tried[0])
            fits = [s for s in tried if all(len(row) == len(names) for row in self._rows(s, b'"', b"", 0).rows[:100])]
            fits = fits or [s for s in tried if s.encode() in self.text] or list(tried)
            return fits[0], _Header(names, 0, False)
        headers = {s: self.header(s) for s in tried}
        fits = [s for s, header in headers.items() if set(self.wanted) <= set(header.names)]
        found = fits[0] if fits else max(tried, key=lambda s: len(headers[s].names))
        self._require(headers[found].names, found)
        return found, headers[found]

    def header(self, separator: str) -> _Header:
        """The header if the first row is split by this separator."""
        line = re.match(rb"[^\r\n]*(?:\r\n|\n|\r|\Z)", self.text)
        assert line is not None
        for quote in (b'"', b""):
            # A quoted name may contain a line break, so the header is the first row, not the first line.
            text = self.text if quote in line[0] else line[0]
            rows = split_rows(text[: 1 << 16], separator.encode(), quote, b"", self.line_end, final=True).rows[:1]
            if rows:
                break
        cells = rows[0] if rows else []
        names = tuple(cell.value.decode(errors="replace").strip() for cell in cells)
        quoted = bool(cells) and all(cell.quoted for cell in cells if cell.value)
        if cells and all(len(name) > 1 and name[0] == name[-1] == "'" for name in names):
            names = tuple(name[1:-1] for name in names)
        size = len(line[0])
        if quoted and any(b"\n" in cell.value or b"\r" in cell.value for cell in cells):
            pattern, size = cell_pattern(separator.encode(), b'"', b"", self.line_end), 0
            for match in matches(pattern, self.text):
                size = match.end()
                if match["end"] != separator.encode():
                    break
        return _Header(names, size, quoted)

    def _require(self, names: tuple[str, ...], separator: str) -> None:
        missing = [name for name in dict.fromkeys(self.wanted) if name not in names]
        if missing:
            shown = ", ".join(names[:50])[:500] or "none"
            split = f" (separated by {_NAMES.get(separator, repr(separator))})" if len(names) > 1 else ""
            last = "add them to format.header" if self.given.header is not None else (
                "correct the mapping; if the file has no header line, give the columns' names as format.header"
            )  # fmt: skip
            raise ValueError(f"{self.path}: no column {', '.join(missing)}; it has {shown}{split}: {last}")
        twice = [name for name in dict.fromkeys(self.wanted) if names.count(name) > 1]
        if twice:
            raise ValueError(f"{self.path}: column {twice[0]} is there twice; rename one of them")

    def _rows(self, separator: str, quote: bytes, escape: bytes, skip: int) -> Rows:
        return split_rows(self.text[skip:], separator.encode(), quote, escape, self.line_end, final=self.complete)

    def quoting(self, separator: str, header: _Header) -> tuple[str, str, bool]:
        """(quote, escape, True if a cell of the sample decides them)."""
        given, body = self.given, self.text[header.size :]
        quotes = [_plain(given.quote)] if given.quote is not None else ['"', "", "'"]
        escapes = [_plain(given.escape)] if given.escape is not None else ["", "\\"]
        if len(quotes) == len(escapes) == 1:
            return quotes[0], escapes[0], True
        # If a mark opens no cell, quoting with this mark gives the same cells as no quoting.
        opened = {quote for quote in quotes if not quote or _opens_cell(body, quote.encode(), separator.encode())}
        escapes = [escape for escape in escapes if not escape or b"\\" in body] or escapes
        if opened <= {""} and escapes == [""] and '"' in quotes:
            return '"', "", False
        fits = {}
        for quote in quotes:
            for escape in escapes if quote in opened or quote == '"' else ():
                rows = self._rows(separator, quote.encode(), escape.encode(), header.size)
                if self._is_consistent(rows, len(header.names), header.size):
                    fits[quote, escape] = rows.rows
                    if (quote, escape) == ('"', "") and _is_proven(rows.rows, header.quoted):
                        return '"', "", True  # proven even if another quoting fits too, so none is tried
        line = self.line + count_lines(self.text[: header.size])
        return _Choice(self.path, fits, header.quoted, separator.encode(), body, line).made()

    def _is_consistent(self, found: Rows, cells: int, skip: int) -> bool:
        rest = len(self.text) - skip - found.size
        whole = rest == 0 if self.complete else not found.is_broken and rest < min(MAX_ROW_BYTES, len(self.text))
        return whole and all(len(row) == cells for row in found.rows)

    def null_words(self, separator: str, quote: str, escape: str, skip: int) -> tuple[str, ...]:
        """The words for null in the mapping, or else in the sample."""
        if self.given.nulls is not None:
            return tuple(self.given.nulls)
        words = [word.encode() for word in NULL_WORDS if self._is_cell(word.encode(), separator.encode())]
        found = ["\\N"] if b"\\N" in self.text else []
        if words:
            rows = self._rows(separator, quote.encode(), escape.encode(), skip).rows
            for column in zip(*rows):
                values = {cell.value for cell in column if not cell.quoted and cell.value}
                absent, others = values.intersection(words), values.difference(words)
                if absent and others and all(map(_VALUE.fullmatch, others)):
                    found += [word.decode() for word in sorted(absent)]
        return tuple(dict.fromkeys(found))

    def _is_cell(self, word: bytes, separator: bytes) -> bool:
        """True if there may be a cell without quotation marks that is this word."""
        edge = rb"[\r\n]|" + re.escape(separator)
        return (
            word in self.text
            and re.search(rb"(?:\A|" + edge + rb")" + re.escape(word) + rb"(?:" + edge + rb"|\Z)", self.text)
            is not None
        )


def _plain(text: str) -> str:
    return "" if text == "none" else text


def _opens_cell(body: bytes, quote: bytes, separator: bytes) -> bool:
    """True if a cell of `body` begins with the mark `quote`."""
    return re.search(rb"(?:\A|[\r\n]|" + re.escape(separator) + rb")" + quote, body) is not None


def requoted(path: Path, text: bytes, dialect: Dialect, line: int, *, complete: bool) -> tuple[str, str]:
    """(quote, escape) of a file whose first quoted cell is after the sample, in `text`, which starts at `line`."""
    sample = _Sample(path, text, complete, (), Format(), line)
    sample.line_end = dialect.line_end.encode()
    quote, escape, _ = sample.quoting(dialect.separator, _Header(dialect.names, 0, False))
    return quote, escape


class _Choice:
    """Chooses between the quotings with which every row of the sample has as many cells as the header (`fits`)."""

    def __init__(
        self,
        path: Path,
        fits: dict[tuple[str, str], list[list[Cell]]],
        header_quoted: bool,
        separator: bytes,
        body: bytes,
        line: int,
    ) -> None:
        self.path, self.fits, self.header_quoted = path, fits, header_quoted
        self.separator, self.body, self.line = separator, body, line

    def made(self) -> tuple[str, str, bool]:
        fits = self.fits
        marked = fits.get(('"', ""))
        plain, escaped = fits.get(("", "")), fits.get(("", "\\"), [])
        has_nulls = any(cell == (NULL, False) for row in escaped for cell in row)
        other = "\\" if has_nulls else "" if plain is not None else None
        if marked is not None and any(cell.quoted for row in marked for cell in row):
            return self._marked(marked, other)
        if self._all_in_apostrophes():
            return "'", "", True
        is_tabbed = self.separator == b"\t"
        if has_nulls and (is_tabbed or plain is None):
            return "", "\\", True
        # All backslashes could be escapes, and nothing else decides whether they are.
        undecided = is_tabbed or (has_nulls and re.search(rb"\\[^N]", self.body))
        if escaped and plain is not None and undecided and not _LITERAL_BACKSLASH.search(self.body):
            raise UnclearTableError(
                f"{self.path}: backslashes may be escapes or part of the texts",
                "Say which in the mapping: give format: {escape: none} or format: {quote: none, escape: '\\'}",
            )
        if marked is not None:  # no cell begins with a mark
            return '"', "", False
        for choice in (('"', "\\"), ("", ""), ("", "\\"), ("'", ""), ("'", "\\")):
            if choice in fits:
                return *choice, True
        # No quoting fits: return a default, so that the reader raises an error for the first row that does not fit.
        return ('"', "", True) if b'"' in self.body else ('"', "", False)

    def _marked(self, marked: list[list[Cell]], other: str | None) -> tuple[str, str, bool]:
        """Choose between quoted cells, which are all well-formed, and marks that belong to the texts.

        other: escape of the reading without quoting; None if the rows do not fit without quoting.
        """
        if other is None or _is_proven(marked, self.header_quoted):
            return '"', "", True
        if any(b"\n" in cell.value or b"\r" in cell.value for row in marked for cell in row if cell.quoted):
            line = self._line_of_break()
            raise UnclearTableError(
                f"{self.path}, line {line}: a quotation mark opens a cell of several lines, each of which is a row of "
                "its own without quoting",
                "Say which in the mapping: give format: {quote: none} or format: {quote: '\"'}",
            )
        cells = [cell for row in marked for cell in row]
        if all(cell.quoted == (_WORD.fullmatch(cell.value) is None) for cell in cells):  # as SQLite quotes
            return '"', "", True
        if self.separator == b",":  # in such files, marks normally quote
            return '"', "", True
        # In tab-separated files, Excel also quotes cells with commas. Other writers do not quote such cells; in their
        # files the marks are part of the texts.
        if all(re.search(b"[,;\t]", cell.value) for row in marked for cell in row if cell.quoted):
            text = next(cell.value for row in marked for cell in row if cell.quoted).decode(errors="replace")[:50]
            raise UnclearTableError(
                f"{self.path}: the quotation marks around {text!r} may be part of the text or not",
                "Say which in the mapping: give format: {quote: none} or format: {quote: '\"'}",
            )
        return "", other, True

    def _all_in_apostrophes(self) -> bool:
        """True if all cells of some column, at least two, are quoted when apostrophes are the marks."""
        rows = self.fits.get(("'", ""))
        return rows is not None and _has_quoted_column(rows)

    def _line_of_break(self) -> int:
        match = re.search(rb"(?:^|[\r\n]|" + re.escape(self.separator) + rb')"[^"\r\n]*[\r\n]', self.body)
        return self.line + count_lines(self.body[: match.start() + 1 if match else 0])


def _is_proven(rows: list[list[Cell]], header_quoted: bool) -> bool:
    """True if the header or some column is quoted, or a quoted cell has doubled marks; and some cell is quoted."""
    quoted = [cell for row in rows for cell in row if cell.quoted]
    return bool(quoted) and (header_quoted or any(b'"' in cell.value for cell in quoted) or _has_quoted_column(rows))


def _has_quoted_column(rows: list[list[Cell]]) -> bool:
    """True if some column has at least two cells and all its cells are quoted."""
    columns = ([cell for cell in column if cell.value or cell.quoted] for column in zip(*rows))
    return any(len(column) > 1 and all(cell.quoted for cell in column) for column in columns)


def check_format(given: Format) -> str | None:
    """Description of the first problem of a mapping's `format`, or None."""
    for name, allowed in (("quote", ('"', "'", "none")), ("escape", ("\\", "none"))):
        value = getattr(given, name)
        if value is not None and value not in allowed:
            return f"{name} is {value!r}; choose one of {', '.join(allowed)}"
    if given.separator is not None and (not given.separator or set(given.separator) & set("\r\n\"'")):
        return f"separator is {given.separator!r}; give one or more characters, no line break or quotation mark"
    for name in ("header", "nulls"):
        values = getattr(given, name)
        if values is not None and not all(isinstance(value, str) for value in values):
            return f"{name} must be a list of texts; put them in quotes"
    if given.header is not None and len(set(given.header)) < len(given.header):
        return "header names a column twice; rename one of them"
    assert {f.name for f in fields(given)} == {"separator", "quote", "escape", "encoding", "header", "nulls"}
    return None
