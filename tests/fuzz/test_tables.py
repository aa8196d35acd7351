"""Fuzz: text tables in every dialect, as others write them, whole or damaged."""

import contextlib
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
from hypothesis import example, given
from hypothesis import strategies as st

from hllm_torchrec.data.sources.columnar import read_columns
from hllm_torchrec.data.sources.dialect import Format
from tests.fuzz.mutations import FEW, Target, byte_changes, change_bytes, check_reader
from tests.helpers import fixtures
from tests.helpers import text_tables as tables

NAMES = tables.NAMES
QUOTINGS = (csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC)
WRITERS: dict[str, Callable[[list[Any], str, int], bytes]] = {
    "csv": lambda rows, separator, n: tables.as_csv(rows, separator, QUOTINGS[n % 3], "\r\n" if n % 2 else "\n"),
    "pandas": lambda rows, separator, n: tables.as_pandas(rows, separator, QUOTINGS[n % 3], ""),
    "arrow": lambda rows, separator, n: tables.as_arrow(rows, separator, ("needed", "all_valid")[n % 2]),
    "spark": lambda rows, separator, n: tables.as_spark([*rows, ("last", '"', 1)], separator),
    "mysql": lambda rows, separator, n: tables.as_mysql(rows),
    "postgres": lambda rows, separator, n: tables.as_postgres(rows),
}
FORMATS = {
    "csv": ('"', "none"), "pandas": ('"', "none"), "arrow": ('"', "none"), "spark": ('"', "\\"),
    "mysql": ("none", "\\"), "postgres": ("none", "\\"),
}  # fmt: skip


def check(mutation: Any) -> None:
    kind, writer, rows, separator, n, compression, encoding, changes = mutation
    # `\N` is null in every dialect; a column of texts that are all in quotation marks reads as quoted.
    rows = [(item, "x" if title == "\\N" else title.strip('"'), number) for item, title, number in rows]
    separator = "\t" if writer in ("mysql", "postgres") else separator
    path = fixtures.folder() / "fuzz-table"
    tables.write(path, WRITERS[writer](rows, separator, n), compression, encoding)
    if kind == "damaged":
        path.write_bytes(change_bytes(path.read_bytes(), changes))
        check_reader(lambda: read(path), [str(path)])
        return
    expected = [(item, title or None, None if number is None else str(number)) for item, title, number in rows]
    expected += [("last", '"', "1")] if writer == "spark" else []
    quote, escape = FORMATS[writer]
    try:
        found = read(path)
    except ValueError as error:
        assert "Say which" in str(error), error
        found = read(path, Format(separator=separator, quote=quote, escape=escape))
    assert found == expected, f"another table: {found} for {expected}"
    if compression == "" and encoding == "utf-8" and writer in ("csv", "pandas", "arrow"):
        with contextlib.suppress(duckdb.Error):  # it has no reading of a carriage return in a cell
            other = tables.by_duckdb(path, separator)
            assert other == found, f"DuckDB reads {other}, not {found}"


def read(path: Path, given: Format | None = None) -> list[tuple[str, str | None, str | None]]:
    """All rows; missing and empty cells are None."""
    rows = [row for chunk in read_columns(path, NAMES, given) for row in chunk.table.to_pylist()]
    return [(row["item"], row["title"] or None, row["n"] or None) for row in rows]


TARGET = Target(
    "tables",
    st.tuples(
        st.sampled_from(["whole", "whole", "damaged"]),
        st.sampled_from(list(WRITERS)),
        tables.TABLES,
        st.sampled_from(",\t;|"),
        st.integers(0, 5),
        st.sampled_from(["", "", *tables.COMPRESSIONS]),
        st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32"]),
        byte_changes(),
    ),
    check,
)


@FEW
@example(("damaged", "csv", [("i1", "a", 1)], ",", 0, "gzip", "utf-8", [("cut", 0.5, 1)]))
@example(("damaged", "csv", [("i1", 'a, "b"', 1)], ",", 0, "", "utf-8", [("cut", 0.8, 1)]))
@given(TARGET.inputs)
def test_tables_are_read_as_written_or_refused_by_file(mutation: Any) -> None:
    check(mutation)
