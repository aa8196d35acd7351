"""Splitting of a text table's bytes into rows and cells, for any separator, quoting and escapes."""

import re
from functools import cache
from typing import NamedTuple

BARE_RETURN = re.compile(rb"\r(?!\n|\Z)")
"""A carriage return that is not a line end, in a file whose lines end with LF or CR LF."""
NULL = b"\\N"
"""The text for null in exports of MySQL and PostgreSQL."""


class Cell(NamedTuple):
    """A cell of a row: its bytes without quotation marks and escapes, and whether it was quoted."""

    value: bytes
    quoted: bool


class Rows(NamedTuple):
    """The complete rows of a text, and their size in bytes; the bytes after them are an incomplete row."""

    rows: list[list[Cell]]
    size: int
    is_broken: bool
    """True if more bytes cannot complete the rest to a row: text follows the closing mark of a quoted cell."""


@cache
def cell_pattern(separator: bytes, quote: bytes, escape: bytes, line_end: bytes) -> re.Pattern[bytes]:
    """Pattern of a cell (group `quoted` with its marks, or `plain`) and of the separator or line end after it (`end`).

    line_end: CR if the file's first line ends with CR. Otherwise rows end with LF or CR LF, and a CR alone is a normal
    character.
    """
    end, mark, slash = re.escape(separator), re.escape(quote), re.escape(escape)
    # Possessive quantifiers (++, *+) prevent backtracking in a cell that does not match (quadratic time).
    plain = b"[^" + re.escape(b"\r\n" + separator[:1] + (b"" if quote else escape)) + b"]"
    if len(separator) > 1:
        plain += b"|(?!" + end + b")" + re.escape(separator[:1])
    if line_end != b"\r":
        plain += rb"|\r(?!\n|\Z)"
    quoted = b"(?!)"
    if quote:
        inner = b"[^" + mark + slash + b"]++|" + mark * 2 + (b"|" + slash + b"." if escape else b"")
        quoted = mark + b"(?:" + inner + b")*+" + mark
        plain = b"(?!" + mark + b")(?:" + plain + b")*+"
    else:
        plain = b"(?:" + plain + (b"|" + slash + b"(?:\r\n|.)" if escape else b"") + b")*+"
    ends = rb"\r" if line_end == b"\r" else rb"\r?\n|\r\Z"
    return re.compile(
        b"(?:(?P<quoted>" + quoted + b")|(?P<plain>" + plain + b"))(?P<end>" + end + b"|" + ends + b"|\\Z)", re.DOTALL
    )


def split_rows(
    text: bytes, separator: bytes, quote: bytes, escape: bytes, line_end: bytes = b"\n", *, final: bool
) -> Rows:
    """The rows of `text` without blank lines. final: the end of the text also ends a last row without a line break."""
    rows: list[list[Cell]] = []
    row: list[Cell] = []
    size = 0
    found = matches(cell_pattern(separator, quote, escape, line_end), text)
    ends = (separator, line_end, b"\n", b"\r\n")
    for match in found:
        quoted, plain, end = match.groups()
        if end not in ends and not (final and match.end() == len(text)):
            break
        if quoted is not None:
            row.append(Cell(_unquoted(quoted, quote, escape), True))
        # A cell with escapes counts as quoted, so that an escaped backslash followed by N is a text, not null.
        elif escape and not quote and escape in plain and plain != NULL:
            row.append(Cell(_unescaped(plain), True))
        else:
            row.append(Cell(plain, False))
        if end != separator:
            if len(row) > 1 or row[0].value or row[0].quoted:
                rows.append(row)
            row, size = [], match.end()
    at = found[-1].end() if found else 0
    return Rows(rows, size, at < len(text) and not _open_cell(quote, escape).fullmatch(text, at))


@cache
def _open_cell(quote: bytes, escape: bytes) -> re.Pattern[bytes]:
    """Pattern of an incomplete cell: a quoted cell without its closing mark, or an escape without its character."""
    if not quote:
        return re.compile(b"(?!)" if not escape else b".*" + re.escape(escape), re.DOTALL)
    mark, slash = re.escape(quote), re.escape(escape)
    inner = b"[^" + mark + slash + b"]++|" + mark * 2 + (b"|" + slash + b"(?:.|\\Z)" if escape else b"")
    return re.compile(mark + b"(?:" + inner + b")*+" + mark + b"?", re.DOTALL)


def matches(pattern: re.Pattern[bytes], text: bytes) -> list[re.Match[bytes]]:
    """Consecutive matches from the start of the text, up to the first gap between two matches or the end."""
    found: list[re.Match[bytes]] = []
    at = 0
    for match in pattern.finditer(text):
        if match.start() != at:
            break
        found.append(match)
        at = match.end()
    # At the end of the text the pattern matches the empty string; this is a cell only after a separator.
    before = found[-2]["end"] if len(found) > 1 else b""
    if found and found[-1].start() == len(text) and before in (b"", b"\n", b"\r\n", b"\r"):
        found.pop()
    return found


_ESCAPES = {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"0": b"\0", b"b": b"\b", b"f": b"\f", b"v": b"\v"}


def _unescaped(cell: bytes) -> bytes:
    """Replace the escapes in a cell that is not quoted."""
    return re.sub(rb"\\(\r\n|.)", lambda m: _ESCAPES.get(m[1], m[1]), cell, flags=re.DOTALL)


def _unquoted(cell: bytes, quote: bytes, escape: bytes) -> bytes:
    inner = cell[1:-1]
    if quote in inner:
        inner = inner.replace(quote * 2, quote)
    # Spark and csv escape only marks and backslashes; a backslash before another character is a backslash.
    return re.sub(rb"\\([\\" + quote + rb"])", rb"\1", inner) if escape and escape in inner else inner


def count_lines(text: bytes) -> int:
    """Number of line ends (LF, CR LF or CR) in a text."""
    return text.count(b"\n") + text.count(b"\r") - text.count(b"\r\n")
