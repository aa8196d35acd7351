"""A text table as a stream of rows in a dialect that Arrow's CSV reader cannot misread.

Arrow is lenient: it adds text after a closing quotation mark to the cell, and an unclosed mark makes the following rows
part of the cell. So quoted cells are checked here, block by block. A dialect that Arrow does not support (apostrophes,
backslashes, separators of several characters) is rewritten to one that it supports.
"""

import io
import re
from functools import cache

from hllm_torchrec.common.text_files import Utf8File
from hllm_torchrec.data.sources.cells import BARE_RETURN, count_lines, split_rows
from hllm_torchrec.data.sources.dialect import MAX_ROW_BYTES, Dialect, UnclearTableError, requoted

_READ = 1 << 20
_CLOSED = re.compile(rb'"(?:[^"]++|"")*+"')


class RowStream(io.RawIOBase):
    """Stream of the rows of a text table after its header.

    delimiter: separator of the cells; quote: True if cells may be quoted with `"`.

    Raises ValueError, naming file and line, for a quoted cell that is not closed or is followed by text.
    """

    def __init__(self, file: Utf8File, dialect: Dialect) -> None:
        self._file, self._dialect = file, dialect
        self._separator = dialect.separator.encode()
        self.delimiter = dialect.separator if len(self._separator) == 1 else ","
        self._is_rewritten = (
            dialect.quote == "'" or bool(dialect.escape) or len(self._separator) > 1 or dialect.has_returns
        )
        self.quote = bool(dialect.quote) or self._is_rewritten
        self._marks = (dialect.quote.encode(), dialect.escape.encode())
        # If the sample has no quoted cell, the first quoted cell decides the quoting. Until then only complete rows are
        # passed on.
        self._is_open = not dialect.is_certain and dialect.quote == '"' and not self._is_rewritten
        self._rest = b""
        self._out = b""
        self._line = dialect.first_row
        self._at_end = False
        skip = dialect.skip
        while skip and (block := file.read(skip)):
            self._out, skip = block[skip:], max(skip - len(block), 0)
        if self._out:  # bytes after the header that were read with it
            self._out = self._next(self._out)

    def readable(self) -> bool:
        """True."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Read `size` bytes, fewer only at the end of the stream: Arrow uses the result of one call as a block."""
        assert size >= 0
        parts = [self._out]
        count = len(self._out)
        while count < size and not self._at_end:
            block = self._file.read(_READ)
            self._at_end = not block
            parts.append(self._next(block))
            count += len(parts[-1])
        data = b"".join(parts)
        self._out = data[size:]
        return data[:size]

    def _next(self, block: bytes) -> bytes:
        """The bytes to pass on after `block` was read; block b"" means the end of the file."""
        text, final = self._rest + block, not block
        if self._is_open and (self._has_quoted_cell(text) or self._has_return(text)):
            self._decide(text, final=final)
            if not self._is_rewritten:  # nothing of `_rest` was passed on yet
                block, self._rest = text, b""
        if self._is_rewritten:
            return self._rewritten(text, final=final)
        if self._is_open:
            return self._whole_rows(text, final=final)
        self._rest = self._checked(text, final=final)
        self._line += count_lines(block)
        # Without a line break at the end, Arrow reads an empty last cell as quoted if another cell is quoted.
        return block or b"\n"

    def _has_quoted_cell(self, text: bytes) -> bool:
        return b'"' in text and _opening(self._separator).search(text) is not None

    def _has_return(self, text: bytes) -> bool:
        """True if a carriage return is not a line end in this dialect; Arrow would treat it as one."""
        return b"\r" in text and self._dialect.line_end != "\r" and BARE_RETURN.search(text) is not None

    def _whole_rows(self, text: bytes, *, final: bool) -> bytes:
        end = len(text) if final else max(text.rfind(b"\n"), text.rfind(b"\r", 0, -1)) + 1
        self._rest = text[end:]
        self._line += count_lines(text[:end])
        self._require_short(self._rest, self._line)
        return text[:end]

    def _require_short(self, rest: bytes, line: int) -> None:
        if len(rest) > MAX_ROW_BYTES:
            raise ValueError(f"{self._file.path}, line {line}: a row of more than {MAX_ROW_BYTES:,} bytes; correct it")

    def _decide(self, text: bytes, *, final: bool) -> None:
        """Decide the quoting from the rows of `text`, which has the first quoted cell."""
        self._is_open = False
        quote, escape = requoted(self._file.path, text, self._dialect, self._line, complete=final)
        self._marks = (quote.encode(), escape.encode())
        self._is_rewritten = (quote, escape) != ('"', "") or self._has_return(text)

    def _checked(self, text: bytes, *, final: bool) -> bytes:
        """Check all cells except the last, which may be incomplete; returns the bytes of the last cell."""
        quote = self._dialect.quote
        if (not quote or b'"' not in text) and not self._has_return(text):
            ends = (text.rfind(self._separator), text.rfind(b"\n"), text.rfind(b"\r"))
            return text[max(ends) + 1 :]
        rows, tail = _well_formed(self._separator, quote.encode(), self._dialect.line_end.encode())
        matched = rows.match(text)
        assert matched is not None
        rest = text[matched.end() :]
        is_open = rest.startswith(b'"') and not _CLOSED.fullmatch(rest)
        if not tail.fullmatch(rest) or (is_open and (final or len(rest) > MAX_ROW_BYTES)):
            line = self._line + count_lines(text[: matched.end()]) - count_lines(self._rest)
            raise self._malformed(rest, line)
        return rest

    def _malformed(self, rest: bytes, line: int) -> ValueError:
        place = f"{self._file.path}, line {line}"
        if rest.startswith(b"\\") and not self._marks[0]:
            return UnclearTableError(f"{place}: a backslash at the end", "Set format: {escape: none} in the mapping")
        if not rest.startswith(b'"'):
            return ValueError(f"{place}: a carriage return inside a row; remove it, or put the cell in quotation marks")
        closed = re.match(rb'"(?:[^"]|"")*+"([^\r\n]{1,20})', rest[:MAX_ROW_BYTES])
        what = f"goes on after it ({closed[1].decode(errors='replace')!r})" if closed else "is not closed"
        return UnclearTableError(
            f"{place}: a cell that begins with a quotation mark {what}",
            "Correct it (a mark inside a quoted cell is doubled), or set format: {quote: none} in the mapping if the "
            "file does not quote",
        )

    def _rewritten(self, text: bytes, *, final: bool) -> bytes:
        quote, escape = self._marks
        found = split_rows(text, self._separator, quote, escape, self._dialect.line_end.encode(), final=final)
        self._rest = text[found.size :]
        self._line += count_lines(text[: found.size])
        if found.is_broken or (self._rest and final):
            raise self._malformed(self._rest, self._line)
        self._require_short(self._rest, self._line)
        delimiter = self.delimiter.encode()
        special = re.compile(b'["\r\n' + re.escape(delimiter) + b"]").search
        lines = (
            delimiter.join(
                b'"' + value.replace(b'"', b'""') + b'"' if quoted or special(value) else value for value, quoted in row
            )
            for row in found.rows
        )
        return b"".join(line + b"\n" for line in lines)


@cache
def _opening(separator: bytes) -> re.Pattern[bytes]:
    """Pattern of a mark that opens a cell."""
    return re.compile(rb"(?:\A|[\r\n]|" + re.escape(separator) + rb')"')


@cache
def _well_formed(separator: bytes, quote: bytes, line_end: bytes) -> tuple[re.Pattern[bytes], re.Pattern[bytes]]:
    """(pattern of all complete cells at the start of a text, pattern of a cell that may continue in the next block)."""
    end = re.escape(separator)
    quoted = quote + b'(?:[^"]++|"")*+' if quote else b"(?!)"
    plain = b"[^" + end + b"\r\n" + quote + b"][^" + end + b"\r\n]*+"
    ends = rb"\r" if line_end == b"\r" else rb"\r?\n"
    cells = b"(?:(?:" + quoted + quote + b"|" + plain + b"|)(?:" + end + b"|" + ends + b"))*+"
    return re.compile(cells), re.compile(b"(?:" + quoted + quote + b"?|" + plain + rb"|)\r?")
