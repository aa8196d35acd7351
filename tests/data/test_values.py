"""Values of columns from every Arrow type that holds the right thing."""

from datetime import UTC, date, datetime
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest

from hllm_torchrec.data.sources.values import (
    are_dates_as_numbers,
    as_id_strings,
    as_lists,
    as_texts,
    parse_labels,
    parse_seconds,
    without_html,
)

SECOND = 1_700_000_000
MOMENT = datetime.fromtimestamp(SECOND, UTC)


@pytest.mark.parametrize(
    "values",
    [
        pa.array(["7", None, "8"]),
        pa.array(["7", None, "8"], pa.large_string()),
        pa.array(["7", None, "8"], pa.string_view()),
        pa.array(["7", None, "8"]).dictionary_encode(),
        pa.array([b"7", None, b"8"], pa.binary()),
        pa.array([7, None, 8], pa.uint8()),
        pa.array([7, None, 8], pa.float64()),
        pa.array([7, float("nan"), 8], pa.float32()),
        pa.array([Decimal("7.00"), None, Decimal("8.00")], pa.decimal128(12, 2)),
        pa.array(["7", "nan", "8"]),
        pa.array(["7", "None", "8"]),
        pa.chunked_array([["7", "NULL"], ["8"]]),
    ],
)
def test_ids_of_every_exact_type(values):
    assert as_id_strings(values, "user").to_pylist() == ["7", None, "8"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            pa.array([7, 2**24], pa.float32()),
            "type float, which rounds whole numbers above 16777216, and larger values",
        ),
        (pa.array(np.array([7, 2**11], np.float16)), "type halffloat, which rounds whole numbers above 2048"),
        (pa.array([7, 2.0**53]), "type double, which rounds whole numbers above 9007199254740992"),
        (pa.array(["7", "9.78014E+12"]), r"user ids like '9\.78014E\+12' are numbers in scientific notation"),
        (pa.array(["7", "1e+05"]), r"user ids like '1e\+05'"),
    ],
)
def test_ids_that_were_rounded_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        as_id_strings(values, "user")


def test_ids_that_only_look_rounded_are_read():
    texts = ["1.2340E+03", "1E5", "E+12", "a+b", "1.5e+1x", "+4915112345"]
    assert as_id_strings(pa.array(texts), "user").to_pylist() == texts
    assert as_id_strings(pa.array([2.0**53 - 1, 2.0**24]), "user").to_pylist() == ["9007199254740991", "16777216"]


def test_words_for_null_are_ids_if_the_mapping_says_so():
    assert as_id_strings(pa.array(["NA", "-"]), "user", nulls=("-",)).to_pylist() == ["NA", None]


@pytest.mark.parametrize("values", [pa.array([Decimal("7.50")]), pa.array([MOMENT]), pa.array([[1]]), pa.array([True])])
def test_other_types_are_no_ids(values):
    with pytest.raises(ValueError, match=r"the item id column has type .*ids must be strings or integers"):
        as_id_strings(values, "item")


@pytest.mark.parametrize(
    ("values", "unit"),
    [
        (pa.array([SECOND]), "seconds"),
        (pa.array([SECOND * 1000 + 999]), "milliseconds"),
        (pa.array([float(SECOND)]), "seconds"),
        (pa.array([Decimal(SECOND)], pa.decimal128(20, 0)), "seconds"),
        (pa.array([str(SECOND)]).dictionary_encode(), "seconds"),
        (pa.array([f" {SECOND}.25"], pa.large_string()), "seconds"),
        (pa.array([SECOND * 10**9], pa.timestamp("ns", tz="UTC")), "milliseconds"),
        (pa.array([MOMENT], pa.timestamp("us", tz="Asia/Tokyo")), "seconds"),
        (pa.array([MOMENT.replace(tzinfo=None)], pa.timestamp("ms")), "seconds"),
        (pa.array(["2023-11-14T22:13:20Z"]), "iso8601"),
        (pa.array(["2023-11-14 22:13:20 UTC"]), "iso8601"),
        (pa.array(["2023-11-14 23:13:20.123456789+01"]), "iso8601"),
    ],
)
def test_times_of_every_type(values, unit):
    assert parse_seconds(values, unit).to_pylist() == [SECOND]


def test_dates_are_the_seconds_of_their_midnight():
    day = SECOND // 86_400 * 86_400
    assert parse_seconds(pa.array([date(2023, 11, 14)], pa.date64()), "seconds").to_pylist() == [day]
    assert parse_seconds(pa.array([20231114]), "iso8601").to_pylist() == [day]
    assert are_dates_as_numbers(pa.array(["20231114", "20240101"]))
    assert not are_dates_as_numbers(pa.array([20231114, SECOND]))


@pytest.mark.parametrize(
    "spelling", [pa.array, lambda values: pa.array(map(str, values)), lambda v: pa.array(v, pa.uint64())]
)
def test_nanoseconds_are_rounded_down_exactly(spelling):
    end_of_day = SECOND // 86_400 * 86_400 + 86_399
    values = spelling([SECOND * 10**9, end_of_day * 10**9 + 999_999_999, 5])
    assert parse_seconds(values, "nanoseconds").to_pylist() == [SECOND, end_of_day, 0]
    floats = pa.array([SECOND * 1e9, float("nan")])
    assert parse_seconds(floats, "nanoseconds").to_pylist() == [SECOND, None]


def test_what_does_not_hold_a_time_is_named():
    with pytest.raises(ValueError, match=r"a float holds times to two minutes only; write them as int64"):
        parse_seconds(pa.array([float(SECOND)]).cast(pa.float32()), "seconds")
    assert parse_seconds(pa.array([1000.5], pa.float32()), "seconds").to_pylist() == [1000]
    for values in (pa.array([1], pa.time32("s")), pa.array([True]), pa.array([[1]]), pa.array([1], pa.duration("s"))):
        with pytest.raises(ValueError, match=r"is not a time; give a timestamp"):
            parse_seconds(values, "seconds")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([True, False, None]), [1, 0, None]),
        (pa.array(["True", "FALSE", "yes", "n", " t ", "", "nan", None]), [1, 0, 1, 0, 1, None, None, None]),
        (pa.array(["1", "0.0", "1.0"]), [1, 0, 1]),
        (pa.array([1, 0, None], pa.int8()), [1, 0, None]),
        (pa.array([Decimal(1), Decimal(0)], pa.decimal128(3, 1)), [1, 0]),
        (pa.array(["true", "no"], pa.large_string()).dictionary_encode(), [1, 0]),
    ],
)
def test_labels_of_every_type(values, expected):
    assert parse_labels(values, None).to_pylist() == expected


def test_labels_that_cannot_be_read_are_nan_and_not_null():
    found = parse_labels(pa.array(["maybe", "2", "4,5"]), None)
    assert found.null_count == 0 and np.isnan(found.to_numpy()).all()
    assert parse_labels(pa.array(["3.5", "4", "x"]), 4).to_pylist()[:2] == [0, 1]


LISTS = [["a", "b"], [], ["c", "d"]]


@pytest.mark.parametrize(
    "values",
    [
        pa.array(LISTS),
        pa.array(LISTS, pa.large_list(pa.large_string())),
        pa.array([["a", "b"], [None, None], ["c", "d"]], pa.list_(pa.string(), 2)),
        pa.array(LISTS, pa.list_view(pa.string())),
        pa.array([["a", None, "b "], None, ["c", "d"]]),
        pa.array(['["a", "b"]', "[]", "['c', 'd']"]),
        pa.array(["{a,b}", "", '{c,"d"}']),
    ],
)
def test_lists_of_every_type(values):
    assert as_lists(values, None).to_pylist() == LISTS


def test_values_that_only_look_like_lists_stay_one_value():
    texts = ["[REC]", "{x: 1}", "[", "a|b"]
    assert as_lists(pa.array(texts), None).to_pylist() == [[text] for text in texts]
    assert as_lists(pa.array(["a| b|", "[x]|y"]), "|").to_pylist() == [["a", "b"], ["[x]", "y"]]
    assert as_lists(pa.array([1995.0, None]), None).to_pylist() == [["1995"], []]


def test_a_printed_array_is_refused():
    with pytest.raises(ValueError, match=r"is a printed array without commas; write lists as JSON"):
        as_lists(pa.array(["['a' 'b']"]), None)
    with pytest.raises(ValueError, match=r"a list of dicts cannot be read"):
        as_lists(pa.array([[{"a": 1}]]), None)


def test_texts_of_other_types():
    assert as_texts(pa.array([1995.0, 1.5, None])).to_pylist() == ["1995", "1.5", None]
    assert as_texts(pa.array([["a", "b"], None])).to_pylist() == ["a, b", None]
    assert as_texts(pa.array(["['a', 'b']", "[1998]", "x"])).to_pylist() == ["a, b", "[1998]", "x"]
    assert as_texts(pa.array([date(2020, 1, 2)])).to_pylist() == ["2020-01-02"]
    with pytest.raises(ValueError, match=r"has no text; give a column of texts"):
        as_texts(pa.array([{"a": 1}]))


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Tom &amp; Jerry&#39;s", "Tom & Jerry's"),
        ("<p>great</p><p>very<br/>good</p>", "great very good"),
        ("a <b>bo</b>ld word", "a bold word"),
        ("x<script>var a = '<p>';</script> y", "x y"),
        ("3 < 4 & 5 > 2", "3 < 4 & 5 > 2"),
        ("no html", "no html"),
        ("cut off <br", "cut off <br"),
    ],
)
def test_html_becomes_text(text, plain):
    assert without_html(text) == plain
