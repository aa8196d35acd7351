"""Tables of users through `prepare`: what is read, what is refused, and what is reported."""

import gzip
import json
import pickle
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from hllm_torchrec.data.append import append_events
from hllm_torchrec.data.bad_rows import BadRows
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.sources.table_mapping import table
from hllm_torchrec.launch.prepare import main, summary
from tests.helpers.source_files import sequences, write_csv

TIMES = range(1_700_000_000, 1_700_004_000, 100)
EVENTS = [(f"u{n % 4}", f"i{n % 5}", time, n % 2) for n, time in enumerate(TIMES)]
EVENT_NAMES = ("user", "item", "time", "label")
ITEMS = [(f"i{n}", f"Title {n}", "a|b") for n in range(5)]


def shop(folder: Path, rows=EVENTS, catalogue=ITEMS, **changes) -> Path:
    """A mapping and its two CSV files; changes: of the mapping's parts."""
    write_csv(folder / "e.csv", [EVENT_NAMES, *rows])
    write_csv(folder / "i.csv", [("item", "title", "genre"), *catalogue])
    mapping = {
        "name": "shop",
        "events": {"path": "e.csv", **{name: name for name in EVENT_NAMES}},
        "items": {"path": "i.csv", "item": "item", "text": ["title"]},
    }
    for part, values in changes.items():
        mapping[part] = mapping.get(part, {}) | values if isinstance(values, dict) else values
    (folder / "m.yaml").write_text(json.dumps(mapping))
    return folder / "m.yaml"


def prepared(mapping: Path, **options) -> Dataset:
    return Dataset.open(prepare(table(mapping), mapping.parent / "out", overwrite=True, **options))


def features(dataset: Dataset, name: str) -> list[list[str]]:
    words = pq.read_table(dataset.root / "features" / f"{name}.parquet")["value"].to_pylist()
    return [[words[v - 1] for v in row] for row in dataset.items[f"feature_{name}"].to_pylist()]


def test_files_are_read_in_natural_order(tmp_path):
    for number in (1, 2, 9, 10, 11):
        write_csv(tmp_path / f"day-{number}.csv", [EVENT_NAMES[:2], *((f"u{k}", f"i{number % 6}") for k in range(2))])
    items = [(f"i{n}", f"Title {n}", "") for n in range(6)]
    mapping = shop(tmp_path, catalogue=items, events={"path": "day-*.csv", "time": None, "label": None})
    found = sequences(prepared(mapping, split="leave_one_out"), "test")
    assert [event[0] for event in found["u0"][1]] == [f"i{n % 6}" for n in (1, 2, 9, 10, 11)]


def test_a_folder_as_spark_writes_it_is_read_with_the_columns_in_its_names(tmp_path):
    for label in (0, 1):
        part = tmp_path / "events" / f"label={label}"
        part.mkdir(parents=True)
        rows = [event[:3] for event in EVENTS if event[3] == label]
        pq.write_table(pa.Table.from_pylist([dict(zip(EVENT_NAMES, row)) for row in rows]), part / "part-0.parquet")
        (part / "_SUCCESS").write_bytes(b"")
        (part / ".part-0.parquet.crc").write_bytes(b"crc")
    expected = sequences(prepared(shop(tmp_path)), "test")
    assert sequences(prepared(shop(tmp_path, events={"path": "events"})), "test") == expected


def test_values_in_names_of_folders_are_unescaped(tmp_path):
    for user in ("a b", "c:d", "e%f", "g/h", "ü"):
        part = tmp_path / "events" / f"user={quote(user, safe='')}"
        part.mkdir(parents=True)
        pq.write_table(
            pa.table({"item": ["i0", "i1", "i2"], "time": [5, 6, 7], "label": [0, 1, 0]}), part / "part-0.parquet"
        )
    found = prepared(shop(tmp_path, events={"path": "events"}), split="leave_one_out")
    assert sorted(found.users["raw_user_id"].to_pylist()) == ["a b", "c:d", "e%f", "g/h", "ü"]


def test_a_column_that_differs_from_the_name_of_its_folder_is_refused(tmp_path):
    inside = tmp_path / "label=1"
    inside.mkdir()
    with pytest.raises(ValueError, match=r"column label has '0', and the name of its folder says label=1; rename"):
        prepared(shop(inside))
    positive = [event for event in EVENTS if event[3] == 1]
    assert prepared(shop(inside, positive)).manifest["counts"]["events"] == len(positive)


def test_files_that_were_joined_with_their_headers_are_refused(tmp_path):
    half = [*ITEMS[:3], ("item", "title", "genre"), *ITEMS[3:]]
    with pytest.raises(ValueError, match=r"i\.csv, row 5: the header again \(item, title\).*remove this row"):
        prepared(shop(tmp_path, catalogue=half))
    renamed = [*ITEMS[:3], ("item", "another title", "genre"), *ITEMS[3:]]
    assert "item" in prepared(shop(tmp_path, catalogue=renamed)).items["raw_item_id"].to_pylist()


def test_a_byte_order_mark_within_a_file_is_refused(tmp_path):
    mapping = shop(tmp_path)
    lines = (tmp_path / "e.csv").read_text().splitlines(keepends=True)
    (tmp_path / "e.csv").write_text("".join(["\ufeff", *lines[:20], "\ufeff", *lines[20:]]))
    with pytest.raises(ValueError, match=r"e\.csv, row 21: a byte order mark within the file, .*; remove it"):
        prepared(mapping)
    # The first column of the file need not be the first one of the mapping.
    turned = [(item, user, *rest) for user, item, *rest in (line.split(",") for line in lines)]
    rows = [",".join(row) for row in turned]
    (tmp_path / "e.csv").write_text("".join([*rows[:9], "\ufeff", *rows[9:]]))
    with pytest.raises(ValueError, match=r"e\.csv, row 10: a byte order mark within the file, .*; remove it"):
        prepared(mapping)


def test_users_whose_ids_became_floats_in_one_file_are_refused(tmp_path):
    events = [(str(int(event[0][1])), *event[1:]) for event in EVENTS]
    mapping = shop(tmp_path, events[:20], events={"path": "e*.csv"})
    write_csv(tmp_path / "e2.csv", [EVENT_NAMES, *((f"{user}.0", *rest) for user, *rest in events[20:])])
    with pytest.raises(ValueError, match=r"csv: both (\d) and \1\.0 are ids of users: .* write all ids in one way"):
        prepared(mapping)
    (tmp_path / "e2.csv").rename(tmp_path / "day.csv")
    dataset = prepared(mapping)
    with pytest.raises(ValueError, match=r"both (\d) and \1\.0 are ids of users"):
        append_events(table(mapping, append=[tmp_path / "day.csv"]), dataset.root)
    write_csv(tmp_path / "day.csv", [EVENT_NAMES, *((f"{user}.5", *rest) for user, *rest in events[20:])])
    append_events(table(mapping, append=[tmp_path / "day.csv"]), dataset.root)
    assert Dataset.open(dataset.root).num_users == 9


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pickle.dumps({"user": 1}), "is a pickle, which is not read; write it as CSV, Parquet or JSON lines"),
        (b"SQLite format 3\0" + bytes(84), "is an SQLite database, which is not read"),
        (b"ORC" + bytes(50), "is not a table: its first line has a zero byte"),
        (b"e.csv" + bytes(507), "is not a table: its first line has a zero byte; write it as CSV or Parquet"),
    ],
)
def test_other_kinds_of_files_are_named(tmp_path, data, message):
    mapping = shop(tmp_path)
    (tmp_path / "e.csv").write_bytes(data)
    with pytest.raises(ValueError, match=rf"e\.csv {message}"):
        prepared(mapping)


def test_two_columns_of_one_name_are_refused(tmp_path):
    columns = [[event[k] for event in EVENTS] for k in range(4)]
    arrays = [pa.array(column) for column in (columns[0], *columns)]
    pq.write_table(pa.Table.from_arrays(arrays, names=["user", *EVENT_NAMES]), tmp_path / "e.parquet")
    with pytest.raises(ValueError, match=r"e\.parquet: column user is there twice; rename one of them"):
        prepared(shop(tmp_path, events={"path": "e.parquet"}))


def test_a_json_array_is_named_and_integers_of_any_size_are_ids(tmp_path):
    users = [2**63 + n if n % 2 else -n for n in range(4)]
    rows = [dict(zip(EVENT_NAMES, (users[int(event[0][1])], *event[1:]))) for event in EVENTS]
    mapping = shop(tmp_path, events={"path": "e.json"})
    (tmp_path / "e.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"e\.json is one JSON array; write one object per line"):
        prepared(mapping)
    (tmp_path / "e.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert set(prepared(mapping).users["raw_user_id"].to_pylist()) == set(map(str, users))


@pytest.mark.parametrize("kind", ["feather", "jsonl", "jsonl.gz"])
def test_other_files_of_rows_give_the_same_dataset(tmp_path, kind):
    expected = sequences(prepared(shop(tmp_path)), "test")
    rows = [dict(zip(EVENT_NAMES, row)) for row in EVENTS]
    if kind == "feather":
        pa.feather.write_feather(pa.Table.from_pylist(rows), tmp_path / "e.feather")
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (tmp_path / f"e.{kind}").write_bytes(gzip.compress(text) if kind.endswith("gz") else text)
    assert sequences(prepared(shop(tmp_path, events={"path": f"e.{kind}"})), "test") == expected


def test_a_row_per_user_with_lists_is_a_row_per_event(tmp_path):
    """SeqRecBenchmark's layout, as `pandas.read_pickle(...).to_parquet(...)` gives it."""
    expected = sequences(prepared(shop(tmp_path)), "test")
    rows = [
        {"user": user, **{name: [e[k] for e in EVENTS if e[0] == user] for k, name in enumerate(EVENT_NAMES) if k}}
        for user in ("u0", "u1", "u2", "u3")
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "user2item.parquet")
    assert sequences(prepared(shop(tmp_path, events={"path": "user2item.parquet"})), "test") == expected
    rows[1]["time"].pop()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "user2item.parquet")
    with pytest.raises(
        ValueError, match=r"user2item\.parquet cannot be read \(the lists of time and item differ in length"
    ):
        prepared(shop(tmp_path, events={"path": "user2item.parquet"}))


def test_the_files_of_steam_are_read_as_they_are(tmp_path):
    games = [{"id": str(n), "title": f"Game {n}", "tags": ["Action", f"T{n}"]} for n in range(5)]
    plays = [
        {"username": u, "product_id": i[1:], "date": f"2017-12-{n % 28 + 1:02d}"} for n, (u, i, *_) in enumerate(EVENTS)
    ]
    for name, records in (("games", games), ("reviews", plays)):
        (tmp_path / f"steam_{name}.json").write_text("".join(f"{record!r}\n" for record in records))
    (tmp_path / "m.yaml").write_text(
        "name: steam\n"
        "events: {path: steam_reviews.json, user: username, item: product_id, time: date, time_unit: iso8601}\n"
        "items: {path: steam_games.json, item: id, text: [title, tags], features: {tags: null}}\n"
    )
    dataset = prepared(tmp_path / "m.yaml")
    assert dataset.text(["tags"])["tags"][3].as_py() == "Action, T3"
    assert features(dataset, "tags")[3] == ["Action", "T3"]
    assert dataset.manifest["counts"]["events"] == len(EVENTS)


def test_texts_of_several_files_are_joined_by_id(tmp_path):
    write_csv(tmp_path / "tags.tsv", [("id\ttags",), *((f"i{n}\tx;y{n}",) for n in (3, 1, 0))])
    pq.write_table(pa.table({"key": ["i0", "i1"], "plot": ["about 0", "about <b>1</b>"]}), tmp_path / "plots.parquet")
    joined = [
        {"path": "tags.tsv", "item": "id", "columns": ["tags"]},
        {"path": "plots.parquet", "item": "key", "columns": ["plot"]},
    ]
    parts = {"text": ["title", "plot"], "features": {"tags": ";"}, "join": joined, "html": "clean"}
    dataset = prepared(shop(tmp_path, items=parts))
    assert dataset.text(["plot"])["plot"].to_pylist() == ["about 0", "about 1", "", "", ""]
    assert features(dataset, "tags") == [["x", "y0"], ["x", "y1"], [], ["x", "y3"], []]
    write_csv(tmp_path / "tags.tsv", [("id\ttags",), ("i0\tx",), ("i0\ty",)])
    with pytest.raises(ValueError, match=r"tags\.tsv: item 'i0' came before with another tags; give one row per item"):
        prepared(shop(tmp_path, items=parts))


@pytest.mark.parametrize("name", ["row", "number", "item_id", "raw_item_id", "active", "created_at", "feature_genre"])
def test_a_text_does_not_take_the_place_of_another_column(tmp_path, name):
    mapping = shop(tmp_path, items={"text": [name], "features": {"genre": "|"}})
    (tmp_path / "i.csv").write_text((tmp_path / "i.csv").read_text().replace("title", name))
    with pytest.raises(ValueError, match=f"shop: the text column '{name}' has a name that datasets use themselves"):
        prepared(mapping)


@pytest.mark.parametrize("name", ["text", "label", "label_text", "timestamp", "time_text", "action", "user_id", "a.b"])
def test_a_text_may_have_the_name_of_a_column_of_events(tmp_path, name):
    mapping = shop(tmp_path, catalogue=[*ITEMS[:3], ("i3", "NaN", ""), ("i4", "NaN", "")], items={"text": [name]})
    (tmp_path / "i.csv").write_text((tmp_path / "i.csv").read_text().replace("title", name))
    dataset = prepared(mapping)
    assert dataset.text([name])[name].to_pylist() == ["Title 0", "Title 1", "Title 2", "NaN", "NaN"]
    assert any(f"{name} is 'nan' in 40% of the rows" in note for note in dataset.manifest["notes"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"events": {"format": {"quote": "`"}}}, r"events\.format\.quote is '`'; choose one of"),
        (
            {"events": {"format": {"seperator": ","}}},
            r"unknown key events\.format\.seperator; did you mean .*separator",
        ),
        ({"items": {"format": {"nulls": [None]}}}, r"items\.format\.nulls must be a list of texts; put them in quotes"),
        ({"items": {"html": "strip"}}, r"items\.html is 'strip'; choose one of keep, clean"),
        ({"items": {"join": [{"path": "x", "item": "i", "columns": ["z"]}]}}, r"join\[0\]\.columns has 'z'; list it"),
        ({"bad_rows": {"typo": "drop"}}, r"bad_rows has no kind 'typo'; known: missing_id"),
        ({"bad_rows": {"bad_time": "keep"}}, r"policy bad_time='keep': choose one of error, drop"),
        ({"events": {"path": "none-*.csv"}}, r"events\.path='none-\*\.csv' matches no file"),
    ],
)
def test_a_mistake_in_the_mapping_names_its_field(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        prepared(shop(tmp_path, **changes))


# --- times


@pytest.mark.parametrize(
    ("unit", "write", "message"),
    [
        (
            "milliseconds",
            int,
            r"time: 1700000000 in milliseconds is in 1970; it looks like seconds\. Set the time unit",
        ),
        ("microseconds", lambda t: t * 1000, r"in microseconds is in 1970; it looks like milliseconds"),
        ("seconds", lambda t: t * 1000, r"beyond 2099 in its unit; it looks like milliseconds"),
        ("microseconds", lambda t: t * 10**9, r"beyond 2099 in its unit; it looks like nanoseconds"),
        ("seconds", lambda t: "1.7E+09", r"times like 1\.7E\+09 were rounded, as spreadsheets do"),
        (
            "iso8601",
            lambda t: "2024-01-31 EST",
            r"is not a number or date of the stated unit: write it like 2024-01-31T",
        ),
        ("seconds", lambda t: 20240101 + t % 28, r"looks like a date; set the time unit: time_unit: iso8601"),
        ("seconds", lambda t: "2024-01-01", r"'2024-01-01' is not a number.*set the time unit to iso8601"),
    ],
)
def test_times_in_another_unit_are_refused_in_both_directions(tmp_path, unit, write, message):
    events = [(user, item, write(time), label) for user, item, time, label in EVENTS]
    with pytest.raises(ValueError, match=message):
        prepared(shop(tmp_path, events, events={"time_unit": unit}))


def test_what_the_tables_show_is_said(tmp_path):
    events = [(user, item, time // 86_400 * 86_400 + n * 86_400, 1) for n, (user, item, time, _) in enumerate(EVENTS)]
    items = [*((item, "nan", "") for item, *_ in ITEMS), ("i9", "x", "")]
    mapping = shop(tmp_path, events, items, items={"features": {"genre": "|"}})
    said = summary(prepared(mapping).root)
    for note in (
        "e.csv: separated by comma, no quoted cell seen",
        "times: 2023-11-14 00:00:00 to 2023-12-23 00:00:00 UTC",
        "times are days: events of one day are not history of each other",
        "caution: every label is 1; a model needs both",
        "caution: items: genre is empty in every row",
        "caution: items: title is 'nan' in 83% of the rows; if that means missing, set format: {nulls: [...]} in the "
        "mapping",
        "1 of 6 items have no event",
    ):
        assert f"  {note}" in said.splitlines()


def test_early_times_are_said(tmp_path):
    events = [(user, item, n + 1, label) for n, (user, item, _, label) in enumerate(EVENTS)]
    assert "caution: all times lie in 1970 to 1970; is the time unit right?" in summary(
        prepared(shop(tmp_path, events)).root
    )


def test_times_in_the_future_are_said(tmp_path):
    events = [(user, item, time + 10**9, label) for user, item, time, label in EVENTS]
    said = summary(prepared(shop(tmp_path, events)).root)
    assert "caution: some times lie in the future, the last at 20" in said and "the time unit" not in said


def test_a_user_file_that_matches_nobody_is_said(tmp_path):
    write_csv(tmp_path / "u.csv", [("user", "country"), *((n, "fr") for n in range(4))])
    users = {"path": "u.csv", "user": "user", "features": {"country": None}}
    said = summary(prepared(shop(tmp_path, users=users)).root)
    assert "caution: no user of the events is in the user file, so that no user has a feature" in said
    assert "4 rows of the user file are of users without events" in said
    write_csv(tmp_path / "u.csv", [("user", "country"), ("u1", "fr")])
    assert "3 of 4 users have no features" in summary(prepared(shop(tmp_path, users=users)).root)


# --- shares of bad rows


def changed(change, catalogue=ITEMS):
    return [change(n, *event) for n, event in enumerate(EVENTS)], catalogue


WITHOUT_LETTERS = [(item[1:], title, genre) for item, title, genre in ITEMS]
CHANGED = {
    "unknown_item": (*changed(lambda n, u, i, t, y: (u, f"x{i}", t, y)), "the item file may be another"),
    "ids": (*changed(lambda n, u, i, t, y: (u, f"{i[1:]}.0", t, y), WITHOUT_LETTERS),
            "ids became floats: '0.0' in the events, '0' in the items"),
    "swapped": (*changed(lambda n, u, i, t, y: (i, u, t, y)), "users and items have changed places"),
    "missing_id": (*changed(lambda n, u, i, t, y: (u if n % 3 else "nan", i, t, y)), "not logged in"),
    "nan_label": (*changed(lambda n, u, i, t, y: (u, i, t, "3" if n % 2 else "1")), "lacks positive_from"),
    "bad_time": (*changed(lambda n, u, i, t, y: (u, i, "soon" if n % 2 else t, y)), "another unit"),
    "duplicate_event": ([*EVENTS, *EVENTS], ITEMS, "a file may be read twice"),
    "item_without_text": (EVENTS, [(item, "", genre) for item, _, genre in ITEMS], "other columns may hold the texts"),
    "duplicate_item": (EVENTS, [*ITEMS, *((i, f"{title}!", g) for i, title, g in ITEMS)], "a row for each category"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHANGED)
def test_many_bad_rows_of_a_kind_are_an_error_with_the_likely_cause(tmp_path, kind):
    events, items, cause = CHANGED[kind]
    reason = kind if kind in BadRows().to_dict() else "unknown_item"
    mapping = shop(tmp_path, events, items)
    policy = BadRows(**{reason: "drop"})
    with pytest.raises(
        ValueError, match=rf"[ei]\.csv: {reason}: \d+ of \d+ rows of the (events|items) .*more than 20%.*"
    ) as error:
        prepared(mapping, policy=policy)
    assert cause in str(error.value) and f"bad_rows: {{{reason}: drop}}" in str(error.value)
    assert not (tmp_path / "out").exists()


SPELLED = {
    "blanks": (lambda i: f" {i}", r"ids have blanks around them: ' i0' in the events, 'i0' in the items"),
    "case": (str.upper, r"ids are in another case: 'I0' in the events, 'i0' in the items"),
    "Unicode": (lambda i: i.replace("i", "\uff49"), r"ids are in another Unicode form: "),
}


@pytest.mark.parametrize("kind", SPELLED)
def test_the_likely_cause_of_the_first_unknown_item_is_named(tmp_path, kind):
    change, cause = SPELLED[kind]
    with pytest.raises(ValueError, match=rf"e\.csv, row 2: item .* is not in the item file \({cause}.*Correct the row"):
        prepared(shop(tmp_path, *changed(lambda n, u, i, t, y: (u, change(i), t, y))))
    # the other way round: the items' ids are the odd ones
    with pytest.raises(ValueError, match=r"row 2: item 'i0' is not in the item file \(ids "):
        prepared(shop(tmp_path, catalogue=[(change(item), title, genre) for item, title, genre in ITEMS]))


def test_a_file_whose_name_looks_like_a_pattern_is_read(tmp_path):
    mapping = shop(tmp_path, events={"path": "e[1].csv"})
    (tmp_path / "e.csv").rename(tmp_path / "e[1].csv")
    assert prepared(mapping).manifest["counts"]["events"] == len(EVENTS)


def test_words_that_yaml_reads_as_booleans_or_numbers_need_quotes(tmp_path):
    mapping = shop(tmp_path, events={"action": "label"})
    text = json.dumps(json.loads(mapping.read_text()))
    mapping.write_text(text.replace('"action": "label"', '"action": "label", "actions": [off, 01]'))
    with pytest.raises(ValueError, match=r"label='0' is not in events\.actions \(False, 1\); add it there, in quotes"):
        prepared(mapping)
    mapping.write_text(text.replace('"action": "label"', '"weight": no'))
    with pytest.raises(ValueError, match=r"events\.weight is False, it must be text: in YAML the words on, off, yes"):
        prepared(mapping)


def test_a_share_is_allowed_by_the_mapping_or_the_command(tmp_path, capsys):
    events, items, _ = CHANGED["duplicate_event"]
    dataset = prepared(shop(tmp_path, events, items, bad_rows={"duplicate_event": "drop"}))
    assert dataset.manifest["counts"]["dropped"] == {"duplicate_event": 40}
    words = ["--source", "table", "--path", str(shop(tmp_path, events, items)), "--output", str(tmp_path / "new")]
    assert main(words) == 2
    assert "--bad-share 0.5)" in capsys.readouterr().err
    assert main([*words, "--bad-share", "0.5"]) == 0
    assert main([*words, "--overwrite", "--bad-share", "1.5"]) == 2
    assert "largest share of bad rows 1.5: choose one in 0..1" in capsys.readouterr().err


def test_a_row_per_category_is_an_error_and_counted_if_dropped(tmp_path):
    items = [(item, title, genre) for item, title, _ in ITEMS for genre in ("action", "drama")]
    mapping = shop(tmp_path, catalogue=items, items={"features": {"genre": None}})
    with pytest.raises(
        ValueError, match=r"i\.csv, row 3: item 'i0' came before with other values of genre; write one row"
    ):
        prepared(mapping)
    chosen = BadRows(duplicate_item="drop", largest_share=0.5)
    assert prepared(mapping, policy=chosen).manifest["counts"]["dropped"] == {"duplicate_item": 5}


def test_the_count_of_unknown_items_does_not_depend_on_the_chunks(tmp_path):
    rows = [(f"u{n % 50}", f"i{n % 9}", 1_700_000_000 + n, n % 2) for n in range(300_000)]
    items = [(f"i{n}", f"Title {n}", "") for n in range(8)]
    dataset = prepared(shop(tmp_path, rows, items), policy=BadRows(unknown_item="keep"))
    assert dataset.manifest["counts"]["kept"] == {"unknown_item": sum(n % 9 == 8 for n in range(300_000))}
