"""Text tables as csv, pandas, pyarrow, Spark, MySQL and PostgreSQL write them, for tests of the readers."""

import bz2
import csv
import gzip
import io
import lzma
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.csv
from hypothesis import strategies as st

Row = tuple[str, str | None, int | None]
"""(item, title, n): an id, a text (None only where the writer has a null), a number or None."""
NAMES = ["item", "title", "n"]

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
TITLES = st.one_of(
    WORDS,
    st.text(st.sampled_from('ab "\',;\t|\n\\-'), max_size=12),
    st.sampled_from(
        ['"Heroes"', '"Weird Al" in concert', 'Low"', "a\nb, c", "it's", "\\N", "\\n", "C:\\new\\x", "a\r\nb"]
    ),
)  # fmt: skip
TABLES = st.lists(st.tuples(TITLES, st.one_of(st.none(), st.integers(-9, 10**6))), min_size=1, max_size=8).map(
    lambda rows: [(f"i{k}", title, n) for k, (title, n) in enumerate(rows)]
)


def as_csv(rows: Sequence[Row], separator: str, quoting: int, line_end: str) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=separator, quoting=quoting, lineterminator=line_end)
    writer.writerows([NAMES, *rows])
    return out.getvalue().encode()


def as_pandas(rows: Sequence[Row], separator: str, quoting: int, null: str) -> bytes:
    frame = pd.DataFrame(rows, columns=NAMES).astype({"n": "Int64"})
    return frame.to_csv(sep=separator, quoting=quoting, na_rep=null, index=False).encode()


def as_arrow(rows: Sequence[Row], separator: str, style: str) -> bytes:
    out = io.BytesIO()
    columns = [pa.array(column, kind) for column, kind in zip(zip(*rows), (pa.string(), pa.string(), pa.int64()))]
    options = pa.csv.WriteOptions(delimiter=separator, quoting_style=style)
    pa.csv.write_csv(pa.table(columns, names=NAMES), out, options)
    return out.getvalue()


def as_spark(rows: Sequence[Row], separator: str) -> bytes:
    """Marks around cells that need them, a backslash before marks and backslashes in these."""

    def cell(value: object) -> str:
        text = "" if value is None else str(value)
        if not text or not set(text) & {separator, '"', "\n", "\r"}:
            return text
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    return "".join(separator.join(map(cell, row)) + "\n" for row in [NAMES, *rows]).encode()


def as_mysql(rows: Sequence[Row]) -> bytes:
    """SELECT ... INTO OUTFILE: tabs, a backslash before what is special, \\N for null."""
    special = str.maketrans({"\\": "\\\\", "\t": "\\\t", "\n": "\\\n"})
    return "".join(
        "\t".join("\\N" if v is None else str(v).translate(special) for v in row) + "\n" for row in [NAMES, *rows]
    ).encode()


def as_postgres(rows: Sequence[Row]) -> bytes:
    """COPY in text format: tabs, letters after a backslash, \\N for null."""
    special = str.maketrans(
        {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r", "\b": "\\b", "\f": "\\f", "\v": "\\v"}
    )
    return "".join(
        "\t".join("\\N" if v is None else str(v).translate(special) for v in row) + "\n" for row in [NAMES, *rows]
    ).encode()


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": lambda data: _arrow_stream("zstd", data),
    "lz4": lambda data: _arrow_stream("lz4", data),
    "zip": lambda data: zipped({"table.csv": data}),
}


def _arrow_stream(codec: str, data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(data)
    written: bytes = sink.getvalue().to_pybytes()
    return written


def zipped(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def write(path: Path, data: bytes, compression: str = "", encoding: str = "utf-8") -> Path:
    """Write UTF-8 `data` in another encoding, compressed."""
    path.write_bytes(COMPRESSIONS[compression](data.decode().encode(encoding)))
    return path


def by_duckdb(
    path: Path, separator: str, quote: str = '"', escape: str = '"', null: str = ""
) -> list[tuple[str, str | None, str | None]]:
    """All rows as DuckDB reads them; missing and empty cells are None."""
    text = duckdb.read_csv(
        str(path), delimiter=separator, quotechar=quote, escapechar=escape, header=True, all_varchar=True,
        na_values=null, strict_mode=False, max_line_size=1 << 20, auto_detect=False,
        columns=dict.fromkeys(NAMES, "VARCHAR"),
    )  # fmt: skip
    return [(item, title or None, n or None) for item, title, n in text.fetchall()]
