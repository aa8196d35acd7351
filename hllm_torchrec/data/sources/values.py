"""Values of table columns: ids, texts, lists, labels and times, converted from all suitable Arrow types.

For a bad *value*, reading raises no error but passes on null or NaN, to which `prepare` applies its policy. For a
column of an unsuitable type, it raises ValueError.
"""

import ast
import csv
import json
import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hllm_torchrec.common.yaml_files import abbreviate
from hllm_torchrec.data.sources.dialect import NULL_WORDS

TIME_UNITS = {
    "seconds": 1,
    "milliseconds": 1_000,
    "microseconds": 1_000_000,
    "nanoseconds": 1_000_000_000,
    "iso8601": 0,
}
TRUE_WORDS, FALSE_WORDS = ("true", "t", "yes", "y"), ("false", "f", "no", "n")
"""Words (in any case) for the labels 1 and 0."""

_NUMBER = r"^\s*[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?\s*$"
_EXACT = 2**53
"""From this number on, float64 cannot represent every integer."""
_EXACT_FLOAT32 = 2**24
_EXACT_OF = {"halffloat": 2**11, "float": _EXACT_FLOAT32, "double": _EXACT}
"""Arrow's name of a float type -> the number from which on it cannot represent every integer."""
_SCIENTIFIC = r"^\s*[-+]?\d(?:\.(\d*))?[eE]\+(\d+)\s*$"
_DATE_AS_NUMBER = r"^(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])$"

Column: TypeAlias = "pa.Array | pa.ChunkedArray"


def _plain(values: Column) -> Column:
    """Decode a dictionary column, and convert Arrow's other string types and null to string."""
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if pa.types.is_large_string(values.type) or pa.types.is_string_view(values.type) or pa.types.is_null(values.type):
        return values.cast(pa.string())
    return values


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def is_list(kind: pa.DataType) -> bool:
    """True for any of Arrow's list types."""
    tests = ("is_list", "is_large_list", "is_fixed_size_list", "is_list_view", "is_large_list_view")
    return any(getattr(pa.types, test)(kind) for test in tests)


def as_id_strings(values: Column, what: str, nulls: tuple[str, ...] = NULL_WORDS) -> pa.Array:
    """Raw ids as strings; a null, a NaN and a text of `nulls` (words for a missing value) are null.

    Floats and decimals with whole values are converted to integers, because pandas and SQL write ids as floats if some
    are missing. Raises ValueError for a type without an exact text form, and for ids that were rounded.
    """
    values = _plain(values)
    kind = values.type
    if isinstance(kind, pa.UuidType):
        return pa.array([None if value is None else str(value) for value in values.to_pylist()], pa.string())
    if pa.types.is_floating(kind):
        number = values.cast(pa.float64()).to_numpy(zero_copy_only=False)
        known = ~np.isnan(number)
        if (np.floor(number[known]) != number[known]).any():
            raise ValueError(f"the {what} id column has type {kind} and values that are not whole; {_CONVERT_IDS}")
        require_exact_ids(values, what)
        values = pa.array(np.where(known, number, 0).astype(np.int64), mask=~known)
    elif pa.types.is_decimal(kind):
        values = pc.replace_substring_regex(values.cast(pa.string()), r"\.0*$", "")
        if pc.any(pc.match_substring(values, ".")).as_py():
            raise ValueError(f"the {what} id column has type {kind} and values that are not whole; {_CONVERT_IDS}")
    elif not (pa.types.is_integer(kind) or pa.types.is_string(kind) or _is_binary(kind)):
        raise ValueError(
            f"the {what} id column has type {kind}; ids must be strings or integers, because a {kind} has no "
            "exact text. Convert the column first"
        )
    texts = values.cast(pa.string())
    texts = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
    require_exact_ids(texts, what)
    absent = pc.is_in(texts, value_set=pa.array(nulls, pa.string()))
    return pc.if_else(absent, pa.scalar(None, pa.string()), texts) if pc.any(absent).as_py() else texts


def require_exact_ids(values: Column, what: str) -> None:
    """Raise ValueError if different ids may have become equal when they were written: floats that are too large, and
    texts like 9.78014E+12."""
    kind = values.type
    if pa.types.is_floating(kind):
        exact, number = _EXACT_OF[str(kind)], np.nan_to_num(values.cast(pa.float64()).to_numpy(zero_copy_only=False))
        if (np.abs(number) >= exact).any():
            raise ValueError(
                f"the {what} id column has type {kind}, which rounds whole numbers above {exact}, and larger values; "
                "write the ids again as strings or integers"
            )
    elif pa.types.is_string(kind) and (example := rounded_example(values)):
        raise ValueError(
            f"{what} ids like {abbreviate(example)} are numbers in scientific notation, which spreadsheets round; "
            "write the ids again as texts or whole numbers"
        )


def rounded_example(texts: Column, share: float = 0.0) -> str | None:
    """The first text that is a number in scientific notation with too few digits (9.78014E+12).

    share: None is returned if such texts are at most this share of all texts.
    """
    if not pc.any(pc.match_substring(texts, "+")).as_py():
        return None
    found = texts.filter(pc.fill_null(pc.match_substring_regex(texts, _SCIENTIFIC), False)).to_pylist()
    parts = [(text, re.fullmatch(_SCIENTIFIC, text)) for text in found]
    rounded = [text for text, match in parts if match and len(match[1] or "") < int(match[2][:4])]
    return rounded[0] if len(rounded) > share * len(texts) else None


_CONVERT_IDS = "ids must be strings or integers: convert the column first"


def as_texts(values: Column) -> pa.Array:
    """Values as strings; 4.0 becomes "4", lists are joined by commas. Raises ValueError for structs."""
    values = _plain(values)
    kind = values.type
    if is_list(kind):
        return pa.array([None if cell is None else ", ".join(_texts(cell)) for cell in values.to_pylist()], pa.string())
    if pa.types.is_floating(kind):
        return pa.array([None if v is None or v != v else _text(v) for v in values.to_pylist()], pa.string())
    if pa.types.is_decimal(kind):
        return pc.replace_substring_regex(values.cast(pa.string()), r"\.0*$", "")
    if pa.types.is_nested(kind):
        raise ValueError(f"type {kind} has no text; give a column of texts, numbers or lists of these")
    texts = values.cast(pa.string())
    texts = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
    return _lists_as_texts(texts) if pa.types.is_string(kind) else texts


def _lists_as_texts(texts: pa.Array) -> pa.Array:
    """Convert texts that are printed lists of texts (`['a', 'b']`, as CSV writers print them) to "a, b"."""
    marked = pc.fill_null(pc.match_substring_regex(texts, r"""^\s*\[\s*(u?'|").*\]\s*$"""), False)
    if not pc.any(marked).as_py():
        return texts
    cells = texts.to_pylist()
    for i in np.flatnonzero(marked.to_numpy(zero_copy_only=False)):
        listed = _literal_list(cells[i])
        if listed is not None and all(isinstance(value, str) for value in listed):
            cells[i] = ", ".join(listed)
    return pa.array(cells, pa.string())


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT:
        return str(int(value))
    return str(value)


def _texts(cell: list[Any] | None) -> list[str]:
    """The values of a list as texts, without blanks. Raises ValueError for a nested list or struct."""
    for value in cell or ():
        if isinstance(value, dict | list | tuple):
            raise ValueError(f"a list of {type(value).__name__}s cannot be read; give lists of texts or numbers")
    return [text for value in cell or () if value is not None and (text := _text(value).strip())]


def as_lists(values: Column, separator: str | None) -> pa.Array:
    """Categorical values as list<string>, without blanks.

    A text is split by `separator`. If this is None, a text that is a list in JSON or Python or an array of PostgreSQL
    is parsed; any other text is one value. Raises ValueError for structs and maps.
    """
    values = _plain(values)
    if is_list(values.type):
        cells = [_texts(cell) for cell in values.to_pylist()]
    else:
        plain = values.cast(pa.string()) if pa.types.is_string(values.type) else as_texts(values)
        texts = (text or "" for text in plain.to_pylist())
        cells = [text.split(separator) if separator else _listed(text) for text in texts]
    return pa.array([[v.strip() for v in cell if v.strip()] for cell in cells], pa.list_(pa.string()))


def _listed(text: str) -> list[str]:
    bare = text.strip()
    if bare[:1] == "[" and bare[-1:] == "]":
        listed = _literal_list(bare)
        return [text] if listed is None else _texts(listed)
    if bare[:1] == "{" and bare[-1:] == "}" and not set(bare[1:-1]) & set("{}:"):
        found = next(csv.reader([bare[1:-1]], escapechar="\\"), [])
        return [value for value in found if value != "NULL"]
    return [text]


def _literal_list(text: str) -> list[Any] | None:
    """Parse a text as a list in JSON or Python; None if it is not a list.

    Raises ValueError for a printed numpy array of texts, because Python would concatenate its texts.
    """
    if re.search(r"""(?<=[^,\[\s])['"]\s+u?['"](?=[^,\]\s])""", text):
        raise ValueError(f"{text[:80]!r} is a printed array without commas; write lists as JSON, or with a separator")
    for parse in (json.loads, ast.literal_eval):
        try:
            found = parse(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            continue
        return found if isinstance(found, list) else None
    return None


def parse_float(values: Column) -> np.ndarray:
    """float64 values; NaN for nulls and for strings that are not numbers."""
    values = _plain(values)
    # Arrow's cast fails for the complete column at the first bad string, so those become null first.
    if pa.types.is_string(values.type):
        is_number = pc.match_substring_regex(values, _NUMBER)
        values = pc.if_else(is_number, pc.utf8_trim_whitespace(values), pa.scalar(None, values.type))
    elif pa.types.is_boolean(values.type):
        values = values.cast(pa.int8())
    return values.cast(pa.float64()).to_numpy(zero_copy_only=False).astype(np.float64, copy=False)


def rating_labels(ratings: Column) -> tuple[np.ndarray, np.ndarray]:
    """Labels (float32, rating >= 4; NaN outside 1..5) and actions (int32, the rating; 0 outside)."""
    rating = parse_float(ratings)
    valid = np.isin(rating, [1, 2, 3, 4, 5])
    label = np.where(valid, rating >= 4, np.nan).astype(np.float32)
    return label, np.where(valid, rating, 0).astype(np.int32)


def parse_labels(values: Column, positive_from: float | None) -> pa.Array:
    """float32 labels: 1 from `positive_from` on, else 0; without it the value itself, which must be 0 or 1.

    Null where the cell is empty or a word for a missing value (not an exposure), NaN where it cannot be read.
    """
    values = _plain(values)
    number = parse_float(values)
    absent = pc.is_null(values).to_numpy(zero_copy_only=False)
    if pa.types.is_string(values.type):
        word = pc.utf8_lower(pc.utf8_trim_whitespace(pc.fill_null(values, "")))
        none = [w.lower() for w in NULL_WORDS]
        absent = pc.is_in(word, value_set=pa.array(["", *none])).to_numpy(zero_copy_only=False)
        for words, value in ((TRUE_WORDS, 1.0), (FALSE_WORDS, 0.0)):
            number = np.where(pc.is_in(word, value_set=pa.array(words)).to_numpy(zero_copy_only=False), value, number)
    elif pa.types.is_decimal(values.type):
        number = values.cast(pa.float64()).to_numpy(zero_copy_only=False)
    if positive_from is not None:
        number = np.where(np.isnan(number), np.nan, number >= positive_from)
    number = np.where((number == 0) | (number == 1), number, np.nan)
    return pa.array(number.astype(np.float32), mask=absent)


def parse_seconds(values: Column, unit: str) -> pa.Array:
    """Times as int64 seconds UTC (fractions rounded down); null for values that are not times.

    `unit` is one of `TIME_UNITS`; "iso8601" reads "2015-03-01 12:00:00", "2015-03-01T12:00:00+01:00" and 20150301,
    and a text without a zone is UTC. For Arrow timestamp and date columns the unit is ignored. Raises ValueError for
    types that are not times, and for large float32 values, which have a precision of only two minutes.
    """
    assert unit in TIME_UNITS, unit
    values = _plain(values)
    kind = values.type
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        whole = values.cast(pa.timestamp("us"), safe=False)
        return pa.array(_floor_seconds(whole.cast(pa.int64()), 1_000_000))
    if pa.types.is_temporal(kind) or pa.types.is_boolean(kind) or pa.types.is_nested(kind):
        raise ValueError(f"a {kind} is not a time; give a timestamp, a date, or a number of seconds")
    if unit == "iso8601":
        texts = values if pa.types.is_string(kind) else as_texts(values)
        return pa.array([_iso_seconds(v) for v in texts.to_pylist()], pa.int64())
    if pa.types.is_integer(kind):  # exact: a number of nanoseconds is above 2^53
        whole = values.cast(pa.int64(), safe=kind != pa.uint64())
        return pa.array(_floor_seconds(whole, TIME_UNITS[unit]))
    if unit == "nanoseconds" and pa.types.is_string(kind):
        values, unit = pc.replace_substring_regex(values, r"^(\s*[-+]?\d+)\d{3}(\.\d*)?\s*$", r"\1"), "microseconds"
    number = parse_float(values)
    if kind in (pa.float32(), pa.float16()) and (np.abs(np.nan_to_num(number)) > _EXACT_FLOAT32).any():
        raise ValueError(f"a {kind} holds times to two minutes only; write them as int64 or double")
    # Above 2^53 float64 cannot represent every integer: such values are treated as unparsable, except nanoseconds,
    # which float64 represents to within 256.
    exact = np.where(np.abs(number) < (2.0**63 if unit == "nanoseconds" else _EXACT), number, np.nan)
    seconds = np.floor(exact / TIME_UNITS[unit])
    return pa.array(np.nan_to_num(seconds).astype(np.int64), mask=np.isnan(seconds))


def parse_flags(values: Column) -> pa.Array:
    """Flags as bool [n], from a bool column, or from numbers or texts in `_FLAGS`; null for null and blank cells.

    Raises:
        ValueError: a value is not in `_FLAGS`.
    """
    if pa.types.is_boolean(values.type):
        return values
    texts = pc.utf8_lower(pc.utf8_trim_whitespace(as_texts(values)))
    texts = pc.replace_substring_regex(texts, r"^([01])\.0*$", r"\1")
    at = pc.index_in(texts, value_set=pa.array(_FLAGS, pa.string()))
    unknown = pc.and_(pc.and_(texts.is_valid(), at.is_null()), pc.not_equal(texts, ""))
    if pc.any(unknown).as_py():
        raise ValueError(f"{abbreviate(texts.filter(unknown)[0].as_py())} is none of {', '.join(_FLAGS)}")
    return pa.array(_FLAGS.values(), pa.bool_()).take(at)


_FLAGS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}


def are_dates_as_numbers(times: Column) -> bool:
    """True if all values of a time column are dates written as numbers, like 20240131."""
    values = _plain(times)
    if not (pa.types.is_string(values.type) or pa.types.is_integer(values.type)):
        return False
    texts = values.cast(pa.string()).drop_null()
    return len(texts) > 0 and bool(pc.all(pc.match_substring_regex(texts, _DATE_AS_NUMBER)).as_py())


def _floor_seconds(ticks: Column, per_second: int) -> np.ma.MaskedArray:
    missing = pc.is_null(ticks).to_numpy(zero_copy_only=False)
    whole = pc.fill_null(ticks, 0).to_numpy(zero_copy_only=False) // per_second
    return np.ma.masked_array(whole, mask=missing)


def _iso_seconds(text: str | None) -> int | None:
    try:
        moment = datetime.fromisoformat((text or "").strip().removesuffix(" UTC"))
    except ValueError:
        return None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() // 1)


def require_time_unit(unit: str) -> None:
    """Raise ValueError for a unit that is not in `TIME_UNITS`."""
    if unit not in TIME_UNITS:
        raise ValueError(f"time_unit={unit!r} is not one of {', '.join(TIME_UNITS)}; choose one of them")


class _PlainText(HTMLParser):
    """Collects the text of an HTML fragment; every tag that is not inline becomes a blank."""

    _INLINE = frozenset("a abbr b cite code em font i mark q s small span strong sub sup u".split())

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._hidden += tag in ("script", "style")
        self.parts.append("" if tag in self._INLINE else " ")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= self._hidden > 0 and tag in ("script", "style")
        self.parts.append("" if tag in self._INLINE else " ")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)


def without_html(text: str) -> str:
    """Remove tags, scripts and styles, replace entities by characters, and collapse white space.

    A text without "<" and "&" is returned unchanged.
    """
    if "<" not in text and "&" not in text:
        return text
    parser = _PlainText()
    parser.feed(text)
    parser.close()
    return " ".join("".join(parser.parts).split())
