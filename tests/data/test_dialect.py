"""Text tables as others write them: what is read equals what was written, and what DuckDB reads."""

import csv
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hllm_torchrec.data.sources.columnar import read_columns
from hllm_torchrec.data.sources.dialect import SAMPLE_BYTES, Format, detect_dialect
from hllm_torchrec.data.sources.values import NULL_WORDS
from tests.fuzz.mutations import FEW
from tests.helpers import text_tables as tables

NAMES = tables.NAMES
QUOTINGS = (csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC)
SEPARATORS = st.sampled_from(",\t;|")
SLOWLY = settings(FEW, max_examples=3 * FEW.max_examples)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tables")


def read(path: Path, given: Format | None = None) -> list[tuple[str, str | None, str | None]]:
    """All rows; missing and empty cells are None."""
    rows = [row for chunk in read_columns(path, NAMES, given) for row in chunk.table.to_pylist()]
    return [(row["item"], row["title"] or None, row["n"] or None) for row in rows]


def written(rows):
    return [(item, title or None, None if n is None else str(n)) for item, title, n in rows]


def check(path: Path, rows, given: Format) -> None:
    """The rows are read as they were written; refused only where two readings fit, and then read by the format."""
    try:
        found = read(path)
    except ValueError as error:
        assert "Say which" in str(error)
    else:
        assert found == written(rows)
    assert read(path, given) == written(rows)


@pytest.mark.slow
@SLOWLY
@given(
    tables.TABLES,
    SEPARATORS,
    st.sampled_from(QUOTINGS),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(list(tables.COMPRESSIONS)),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_what_csv_writes_is_read(folder, rows, separator, quoting, line_end, compression, encoding):
    rows = [(item, "" if title == "\\N" else title, n) for item, title, n in rows]
    data = tables.as_csv(rows, separator, quoting, line_end)
    path = tables.write(folder / "csv", data, compression, encoding)
    check(path, rows, Format(separator=separator, quote='"', escape="none"))


@SLOWLY
@given(tables.TABLES, SEPARATORS, st.sampled_from(QUOTINGS), st.sampled_from(["", "NA", "NULL"]))
def test_what_pandas_writes_is_read(folder, rows, separator, quoting, null):
    rows = [(item, "" if title in ("\\N", null) else title, n) for item, title, n in rows]
    path = tables.write(folder / "pandas.csv", tables.as_pandas([*rows, ("last", "x", 5)], separator, quoting, null))
    rows.append(("last", "x", 5))
    quoted = null if quoting == csv.QUOTE_ALL else ""  # a word in quotation marks is a text
    expected = [(item, title, quoted if n is None and quoted else n) for item, title, n in rows]
    if quoting != csv.QUOTE_MINIMAL:
        expected = [(i, t, null if n is None and null else n) for i, t, n in rows]
    check(path, expected, Format(separator=separator, quote='"', escape="none", nulls=[null] if null else []))


@SLOWLY
@given(tables.TABLES, SEPARATORS, st.sampled_from(["needed", "all_valid"]))
def test_what_arrow_writes_is_read(folder, rows, separator, style):
    path = tables.write(folder / "arrow.csv", tables.as_arrow(rows, separator, style))
    check(path, rows, Format(separator=separator, quote='"', escape="none", nulls=[]))


@SLOWLY
@given(tables.TABLES, SEPARATORS)
def test_what_spark_writes_is_read(folder, rows, separator):
    rows = [(item, "" if title == "\\N" else title, n) for item, title, n in rows]
    path = tables.write(folder / "spark.csv", tables.as_spark([*rows, ("last", '"', 1)], separator))
    rows.append(("last", '"', 1))  # without a mark inside, a backslash in a quoted cell is one
    check(path, rows, Format(separator=separator, quote='"', escape="\\"))


@SLOWLY
@given(tables.TABLES, st.sampled_from([tables.as_mysql, tables.as_postgres]))
def test_what_databases_write_is_read(folder, rows, export):
    # A column of texts that are all in quotation marks reads as quoted.
    rows = [(item, title.strip('"'), n) for item, title, n in rows]
    path = tables.write(folder / "sql.tsv", export(rows))
    check(path, rows, Format(separator="\t", quote="none", escape="\\"))


@SLOWLY
@given(tables.TABLES, SEPARATORS, st.sampled_from(QUOTINGS))
def test_duckdb_reads_the_same(folder, rows, separator, quoting):
    # DuckDB ends rows at a carriage return, also within a file of other line ends.
    rows = [(item, "x" if title == "\\N" else title.replace("\r", ""), n) for item, title, n in rows]
    path = tables.write(folder / "duckdb.csv", tables.as_csv(rows, separator, quoting, "\n"))
    given = Format(separator=separator, quote='"', escape="none", nulls=[])
    assert read(path, given) == tables.by_duckdb(path, separator) == written(rows)


@pytest.mark.parametrize(
    ("text", "rows", "said"),
    [
        ('item\ttitle\ni1\t"Weird Al" in concert\ni2\t"Heroes\ni3\tLow"\n',
         [("i1", '"Weird Al" in concert'), ("i2", '"Heroes'), ("i3", 'Low"')], "separated by tab, no quoting"),
        ('item,title\ni1,"a, ""b"""\n', [("i1", 'a, "b"')], "cells in double quotation marks"),
        ('item,title\ni1,"a, \\"b\\""\n', [("i1", 'a, "b"')], "backslash escapes"),
        ("'item';'title'\n'i1';'a; b'\n'i2';'it''s'\n", [("i1", "a; b"), ("i2", "it's")], "single quotation marks"),
        ("sep=;\r\nitem;title\r\ni1;a, b\r\n", [("i1", "a, b")], "separated by semicolon, no quoted cell seen"),
        ("item\ttitle\ni1\ta\\tb\\\nc\ni2\t\\N\n", [("i1", "a\tb\nc"), ("i2", None)], "backslash escapes, missing"),
        ("item\x01title\ni1\x01a,b\n", [("i1", "a,b")], "separated by control-A"),
        ("item|title\ri1|a\ri2|b", [("i1", "a"), ("i2", "b")], "separated by bar"),
        ("title,item,n\nNA,i1,NA\nx,i2,3\n", [("i1", None), ("i2", "x")], "missing: NA"),
        ("title,item,n\nNA,i1,4\nx,i2,3\n", [("i1", "NA"), ("i2", "x")], "no quoted cell seen"),
        ('item,title\n"i1",a\n"i2",', [("i1", "a"), ("i2", None)], "cells in double quotation marks"),
        ("item\ttitle\ni1\t\\N\ni2\t", [("i1", None), ("i2", None)], "backslash escapes"),
        ("item,title\ni1,'tis\ni2,5\" pipe\n", [("i1", "'tis"), ("i2", '5" pipe')], "no quoted cell seen"),
    ],
)  # fmt: skip
def test_dialects_are_told_apart_and_said(tmp_path, text, rows, said):
    (tmp_path / "t.csv").write_bytes(text.encode())
    (chunk,) = read_columns(tmp_path / "t.csv", ["item", "title"])
    assert list(zip(*chunk.table.to_pydict().values())) == rows
    assert said in chunk.dialect


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("item\ttitle\ni1\t\"Heroes\ni2\tLow\"\n", r"line 2: a quotation mark opens a cell of several lines.*Say"),
        ('item\ttitle\ni1\t"a, b"\ni2\tx y\n', r"the quotation marks around 'a, b' may be part of the text.*Say which"),
        ("item\ttitle\ni1\ta\\nb\n", r"backslashes may be escapes or part of the texts\. Say which"),
        ('item,title\ni1,"a, b" c\n', r"line 2: .*goes on after it \(' c'\)\. Correct it.*quote: none"),
        ('item,title\ni0,x\ni1,"a, b\n', r"line 3: a cell that begins with a quotation mark is not closed"),
        ("item,title\ni1,a,b\n", r"Row #2: Expected 2 columns, got 3.*separated by comma.*`format` in the mapping"),
        ("item,name\ni1,a\n", r"no column title; it has item, name \(separated by comma\): correct the mapping"),
        ("item,title,title\ni1,a,b\n", r"column title is there twice; rename one of them"),
        ("item,title\ni1,é\n".encode("latin-1"), r"Row #2: .*invalid UTF8.*Set format: \{encoding: cp1252"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named_by_line_and_remedy(tmp_path, text, message):
    (tmp_path / "t.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        list(read_columns(tmp_path / "t.csv", ["item", "title"]))


@pytest.mark.parametrize(
    ("text", "given", "rows"),
    [
        ("i1::a, \"b\"::3\n", Format(separator="::", header=NAMES), [("i1", 'a, "b"', "3")]),
        ("i1,NA,3\n", Format(header=NAMES, nulls=[]), [("i1", "NA", "3")]),
        ("item,title,n\ni1,-,3\n", Format(nulls=["-"]), [("i1", None, "3")]),
        ("item,title,n\ni1,é€,3\n".encode("cp1252"), Format(encoding="cp1252"), [("i1", "é€", "3")]),
        ('item\ttitle\tn\ni1\t"x"\t3\n', Format(quote='"'), [("i1", "x", "3")]),
        ('item,title,n\ni1,"x",3\n', Format(quote="none"), [("i1", '"x"', "3")]),
    ],
)  # fmt: skip
def test_the_mapping_overrides_what_is_detected(tmp_path, text, given, rows):
    (tmp_path / "t.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert read(tmp_path / "t.csv", given) == rows


@pytest.mark.slow
@pytest.mark.parametrize("late", ['"Weird Al" in concert', '"a, ""b""\nc"', "plain"])
def test_the_first_quoted_cell_after_the_sample_decides(tmp_path, late):
    rows = [(f"i{k}", f"title {k}") for k in range(2 * SAMPLE_BYTES // 14)]
    plain = "".join(f"{item}\t{title}\n" for item, title in rows)
    (tmp_path / "t.tsv").write_text(f"item\ttitle\n{plain}last\t{late}\nend\tx\n")
    assert not detect_dialect(tmp_path / "t.tsv", ["item", "title"]).is_certain
    found = [row for c in read_columns(tmp_path / "t.tsv", ["item", "title"]) for row in c.table.to_pylist()]
    expected = {'"a, ""b""\nc"': 'a, "b"\nc'}.get(late, late)
    assert [tuple(row.values()) for row in found] == [*rows, ("last", expected), ("end", "x")]


def test_a_mark_that_is_never_closed_is_named_wherever_it_is(tmp_path):
    rows = "".join(f'i{k},"title, {k}"\n' for k in range(100_000))
    (tmp_path / "t.csv").write_text(f'item,title\n{rows}last,"open\n{rows}')
    with pytest.raises(
        ValueError, match=r"t\.csv, line 100002: a cell that begins with a quotation mark goes on after"
    ):
        list(read_columns(tmp_path / "t.csv", ["item", "title"]))


def test_words_for_null_are_no_ids():
    assert {"nan", "None", "NULL", "NA"} <= set(NULL_WORDS)
