"""Text files of users, plain or compressed, in UTF-8, UTF-16 or UTF-32, read as a stream or as a short list.

The first bytes, not the file name, determine compression and encoding.
"""

import bz2
import codecs
import errno
import gzip
import lzma
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

LARGEST_LIST = 1 << 28
"""Maximum size of a list, decompressed and as UTF-8, in bytes."""

_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
}
_MARKS = {  # UTF-32 comes before UTF-16: the mark of UTF-32-LE starts with that of UTF-16-LE
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_HEAD = 4096


class PlainFile:
    """Stream of the decompressed bytes of a file; a context manager.

    `compression` is "gzip", "bzip2", "xz", "zstd", "lz4", "zip" or "". A zip archive must hold one file.
    """

    def __init__(self, path: Path) -> None:
        """Open `path`. Raises ValueError for a damaged file, or a zip archive that does not hold exactly one file."""
        self.path = path
        self._raw: BinaryIO = path.open("rb")
        head = self._raw.read(8)
        self._raw.seek(0)
        self.compression = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), "")
        try:
            with self._damage():
                self._data = self._decompressed()
        except BaseException:
            self._raw.close()
            raise

    def _decompressed(self) -> Any:
        match self.compression:
            case "":
                return self._raw
            case "gzip":
                return gzip.open(self._raw)
            case "bzip2":
                return bz2.open(self._raw)
            case "xz":
                return lzma.open(self._raw)
            case "zip":
                return self._member()
        return pa.CompressedInputStream(pa.PythonFile(self._raw, mode="r"), self.compression)

    def _member(self) -> Any:
        archive = zipfile.ZipFile(self._raw)
        names = [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX/")]
        if "[Content_Types].xml" in names:
            raise ValueError(f"{self.path} is a workbook or a document, not a table; write it as CSV or Parquet")
        if len(names) != 1:
            some = ", ".join(names[:5])
            raise ValueError(f"{self.path} holds {len(names)} files ({some}); give an archive of one, or unpack it")
        return archive.open(names[0])

    @contextmanager
    def _damage(self) -> Iterator[None]:
        """Context manager that raises errors of decompression as ValueError.

        Errors of the machine (MemoryError, OSError with an errno) are raised unchanged.
        """
        try:
            yield
        except Exception as error:  # decoders of damaged bytes raise almost anything
            # EINVAL: seeking to a negative offset, which the directory of a damaged zip file contained.
            is_of_the_machine = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)
            if is_of_the_machine or isinstance(error, MemoryError) or str(self.path) in str(error):
                raise
            kind = f"{self.compression} file" if self.compression else "file"
            raise ValueError(f"{self.path} is a damaged {kind} ({error}); fetch or write it again") from error

    def read(self, size: int) -> bytes:
        """Read at most `size` bytes; b"" at the end. Raises ValueError if the file is damaged."""
        with self._damage():
            data: bytes = self._data.read(size)
            return data

    def tell(self) -> int:
        """Return the number of bytes of the (possibly compressed) file that have been read."""
        return self._raw.tell()

    def __enter__(self) -> "PlainFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()


class Utf8File:
    """Stream of the text of a file as UTF-8 bytes without a byte order mark; a context manager.

    UTF-8 without a byte order mark is not validated here: the table readers do it, and their errors name the row and
    the column.
    """

    def __init__(self, path: Path, encoding: str | None = None) -> None:
        """Open `path`.

        Args:
            encoding: None detects it: a byte order mark, UTF-16 without a mark (see `_encoding`), else UTF-8.

        Raises:
            ValueError: `encoding` is not known, or the file is damaged.
        """
        self._plain = PlainFile(path)
        self.path, self.compression = path, self._plain.compression
        try:
            self._waiting = self._plain.read(_HEAD)
            self.encoding = encoding or _encoding(self._waiting)
            plain = self.encoding in ("utf-8", "ascii", "us-ascii", "utf8")
            self._decoder = None if plain else codecs.getincrementaldecoder(self.encoding)()
        except LookupError as error:
            self._plain.__exit__()
            raise ValueError(f"{path}: {encoding!r} is not an encoding; choose one like utf-8, cp1252") from error
        except BaseException:
            self._plain.__exit__()
            raise
        self._lines = 1

    def read(self, size: int) -> bytes:
        """Read about `size` bytes; b"" only at the end.

        Raises:
            ValueError: bytes are invalid in the encoding; the message contains the number of a line before them.
        """
        while True:
            data, self._waiting = self._waiting or self._plain.read(size), b""
            if self._decoder is None:
                return data
            try:
                text = self._decoder.decode(data, final=not data).encode()
            except UnicodeError as error:
                raise ValueError(
                    f"{self.path}, after line {self._lines}: not {self.encoding} ({error}); set the encoding, or "
                    "write the file as UTF-8"
                ) from error
            self._lines += text.count(b"\n")
            if text or not data:
                return text

    def tell(self) -> int:
        """Return the number of bytes of the (possibly compressed) file that have been read."""
        return self._plain.tell()

    def __enter__(self) -> "Utf8File":
        return self

    def __exit__(self, *_: object) -> None:
        self._plain.__exit__()


def _encoding(head: bytes) -> str:
    """Detect the encoding: by a byte order mark, else UTF-16 if nearly every second byte is 0, else UTF-8."""
    for mark, name in _MARKS.items():
        if head.startswith(mark):
            return name
    for first, name in ((1, "utf-16-le"), (0, "utf-16-be")):
        half, other = head[first::2], head[1 - first :: 2]
        if len(head) >= 4 and half.count(0) > 0.9 * len(half) and other.count(0) < 0.1 * len(other):
            return name
    return "utf-8"


def read_list(path: Path) -> list[str]:
    """Return the non-blank lines of a small text file, without line ends: one entry (an id or a word) per line.

    Leading, trailing and inner blanks of a line are part of the entry. The file may be compressed, and in UTF-8, UTF-16
    or UTF-32.

    Raises:
        ValueError: the file is damaged or not text, has only blank lines, or is larger than `LARGEST_LIST`.
    """
    with Utf8File(path) as file:
        blocks, size = [], 0
        while block := file.read(1 << 20):
            blocks.append(block)
            size += len(block)
            if size > LARGEST_LIST:
                raise ValueError(f"{path} is larger than {LARGEST_LIST:,} bytes; give a list with an entry per line")
    try:
        text = b"".join(blocks).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {error}: write UTF-8 text, one entry per line") from None
    if "\0" in text:
        raise ValueError(f"{path} is not text; write UTF-8 text, one entry per line")
    # Not str.splitlines, which also splits at characters that an id may contain (U+0085, U+2028).
    lines = [line for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"{path} has no lines; write UTF-8 text, one entry per line")
    return lines
