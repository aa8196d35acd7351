import json
import os
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hllm_torchrec.data.bad_rows import BadRows
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.sources.amazon import amazon
from hllm_torchrec.data.sources.columnar import parse_record
from hllm_torchrec.data.sources.kuairec import kuairec
from hllm_torchrec.data.sources.movielens import age_bucket, movielens_1m, movielens_100k, split_title
from hllm_torchrec.data.sources.pixelrec import pixelrec
from hllm_torchrec.data.sources.table_mapping import table
from hllm_torchrec.data.sources.values import as_id_strings, parse_float, parse_seconds
from tests.helpers.source_files import (
    MOVIES,
    RATINGS,
    amazon_files,
    grouplens_100k,
    kuairec_files,
    movielens_1m_files,
    pixelrec_files,
    recbole_100k,
    sequences,
    write_csv,
    write_lines,
)

SPLIT = "leave_one_out"


def histories(ratings=RATINGS, prefix=""):
    """Raw user id → [(item, second, label, action)] in time order, by a plain loop."""
    found = {}
    for user, item, rating, second in sorted(ratings, key=lambda r: r[3]):
        found.setdefault(prefix + user, []).append((prefix + item, second, float(rating >= 4), rating))
    return found


def feature_values(dataset, kind, name):
    """Raw id → the values of a feature."""
    values, offsets = dataset.feature_ids(kind, name)
    words = [None, *pq.read_table(dataset.root / "features" / f"{name}.parquet")["value"].to_pylist()]
    rows = dataset.items if kind == "item" else dataset.users
    raw = [None, *rows[f"raw_{kind}_id"].to_pylist()]
    return {raw[i]: [words[v] for v in values[offsets[i] : offsets[i + 1]]] for i in range(1, len(raw))}


@pytest.mark.parametrize("layout", [recbole_100k, grouplens_100k])
def test_movielens_100k_in_both_layouts_gives_texts_features_and_ordered_histories(tmp_path, layout):
    dataset = Dataset.open(prepare(movielens_100k(layout(tmp_path / "raw")), tmp_path / "out", split=SPLIT))
    texts = dataset.text(["title", "year", "genres"]).to_pylist()
    assert texts == [{"title": t, "year": y, "genres": ", ".join(g)} for _, t, y, g in MOVIES]
    assert dataset.items["raw_item_id"].to_pylist() == [m[0] for m in MOVIES]
    assert {user: history for user, (_, history) in sequences(dataset, "test").items()} == histories()
    assert feature_values(dataset, "item", "genres") == {m[0]: m[3] for m in MOVIES}
    assert feature_values(dataset, "item", "release_year")["9"] == ["1963"]
    assert feature_values(dataset, "user", "age") == {"5": ["18"], "3": ["50"], "8": ["1"]}
    assert feature_values(dataset, "user", "occupation")["5"] == ["technician"]
    assert dataset.manifest["actions"] == {"number": 6, "names": {str(i): f"rating {i}" for i in range(1, 6)}}


def test_movielens_1m_reads_latin_1_and_keeps_its_codes(tmp_path):
    dataset = Dataset.open(prepare(movielens_1m(movielens_1m_files(tmp_path)), tmp_path / "out", split=SPLIT))
    assert dataset.text(["title"])["title"].to_pylist() == [m[1] for m in MOVIES]
    assert {user: history for user, (_, history) in sequences(dataset, "test").items()} == histories()
    assert feature_values(dataset, "user", "age") == {"5": ["25"], "3": ["50"], "8": ["1"]}
    assert feature_values(dataset, "user", "occupation") == {"5": ["12"], "3": ["0"], "8": ["10"]}
    assert dataset.name == "ml-1m"


@pytest.mark.parametrize(
    ("age", "bucket"),
    [("0", "1"), ("17", "1"), ("18", "18"), ("24", "18"), ("49", "45"), ("55", "50"), ("73", "56")],
)
def test_ages_fall_into_the_buckets_of_movielens_1m(age, bucket):
    assert age_bucket(age) == bucket


def test_the_year_leaves_the_title_only_where_it_ends_it():
    assert split_title("Toy Story (1995)") == ("Toy Story", "1995")
    assert split_title("2001: A Space Odyssey (1968) ") == ("2001: A Space Odyssey", "1968")
    assert split_title("unknown") == ("unknown", "")
    assert split_title("Contempt (Mépris, Le)") == ("Contempt (Mépris, Le)", "")


def test_a_movielens_folder_without_its_files_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"neither ml-100k\.inter nor GroupLens.*not found: .*u\.data"):
        movielens_100k(tmp_path)
    with pytest.raises(ValueError, match=r"MovieLens-1M: file not found: .*ratings\.dat"):
        movielens_1m(tmp_path)


def test_a_damaged_line_is_named(tmp_path):
    folder = grouplens_100k(tmp_path)
    with (folder / "u.data").open("a") as file:
        file.write("5\t1\t5\n")
    with pytest.raises(ValueError, match=r"u\.data, row 11: 3 columns separated by '\\t', expected 4"):
        list(movielens_100k(folder).events())
    recbole = recbole_100k(tmp_path / "recbole")
    write_lines(recbole / "ml-100k.user", ["user_id:token\ta", "é"], "latin-1")
    with pytest.raises(ValueError, match=r"ml-100k\.user, row 2: not utf-8"):
        list(movielens_100k(recbole).users())
    write_lines(recbole / "ml-100k.item", ["id\ttitle"])
    with pytest.raises(ValueError, match=r"ml-100k\.item, row 1: the header begins 'id\\ttitle', expected 'item_id"):
        list(movielens_100k(recbole).items())


def test_ratings_are_an_ordinal_label_beside_the_binary_one(tmp_path):
    folder = recbole_100k(tmp_path)
    plain, source = movielens_100k(folder), movielens_100k(folder, stars=True)
    assert plain.schema.is_default and not plain.options
    dataset = Dataset.open(prepare(source, tmp_path / "out", split=SPLIT))
    assert dataset.schema.label_names == ("liked", "stars")
    read = 0
    for user in range(1, dataset.num_users):
        events = dataset.user_events(user)
        assert (events.extra["label_stars"] == events.actions - 1).all()
        assert (events.labels == (events.extra["label_stars"] >= 3)).all()
        read += len(events)
    assert read == len(RATINGS)


def test_kuairec_has_a_like_and_numbers_of_watching(tmp_path):
    dataset = Dataset.open(prepare(kuairec(kuairec_files(tmp_path)), tmp_path / "out", split=SPLIT))
    assert dataset.name == "kuairec-big"
    assert dataset.schema.label_names == ("like", "complete", "watch_ratio", "watch_seconds")
    items, users = dataset.items["raw_item_id"].to_pylist(), dataset.users["raw_user_id"].to_pylist()
    found = {
        (users[user - 1], items[events.item_ids[i] - 1]): (int(events.timestamps[i]), float(events.labels[i]))
        + tuple(float(events.extra[f"label_{name}"][i]) for name in ("complete", "watch_ratio", "watch_seconds"))
        for user in range(1, dataset.num_users)
        for events in [dataset.user_events(user)]
        for i in range(len(events))
    }
    # One view was logged twice, one has no time; a ratio of exactly 2 is no like.
    assert sorted(found) == [("0", "10"), ("0", "3649"), ("0", "9598"), ("1", "10"), ("1", "9598")]
    assert found["0", "3649"] == pytest.approx((1593878903, 0, 1, 13838 / 10867, 13.838))
    assert found["0", "10"] == pytest.approx((1593879366, 1, 1, 31 / 15, 31.0))
    assert found["1", "10"] == pytest.approx((1593880000, 0, 0, 0, 0))
    assert found["1", "9598"] == pytest.approx((1593965303, 0, 1, 2.0, 21.968))
    assert dataset.manifest["counts"]["dropped"] == {"bad_time": 1, "duplicate_event": 1}


def test_kuairec_reads_texts_tags_and_users(tmp_path):
    dataset = Dataset.open(prepare(kuairec(kuairec_files(tmp_path)), tmp_path / "out", split=SPLIT))
    columns = ["caption", "cover", "topics", "category"]
    texts = dict(zip(dataset.items["raw_item_id"].to_pylist(), dataset.text(columns).to_pylist(), strict=True))
    assert list(texts["10"].values()) == ["精神小伙", "", "", "颜值"]
    assert list(texts["3649"].values()) == ["搞笑, #hi", "", "五爱街, 爆款", "高新数码"]
    assert list(texts["9598"].values()) == ["", "", "", ""], "its caption is broken over two lines"
    assert set(texts) == {"10", "3649", "9598"}, "a video without a view is left out"
    assert feature_values(dataset, "item", "tags")["3649"] == ["27", "9"]
    assert feature_values(dataset, "user", "follow_user_num_range")["0"] == ["(0,10]"]


def test_kuairec_without_its_captions_is_an_error(tmp_path):
    matrix = kuairec_files(tmp_path)
    (tmp_path / "kuairec_caption_category.csv").unlink()
    with pytest.raises(ValueError, match=r"KuaiRec 2\.0: file not found: .*caption_category\.csv\. Put all files"):
        kuairec(matrix)
    write_lines(tmp_path / "kuairec_caption_category.csv", ["video_id,caption"])
    with pytest.raises(ValueError, match=r"kuairec_caption_category\.csv: no column manual_cover_text; it has video"):
        list(kuairec(matrix).items())


def test_pixelrec_keeps_the_items_with_events_and_reads_quoted_line_breaks(tmp_path):
    source = pixelrec(*pixelrec_files(tmp_path))
    dataset = Dataset.open(prepare(source, tmp_path / "out", split=SPLIT))
    assert dataset.name == "pixel200k"
    assert dataset.items["raw_item_id"].to_pylist() == [f"i{m[0]}" for m in MOVIES]
    assert dataset.text(["description"])["description"][0].as_py() == 'line 1, "quoted"\nline 2 of 1'
    for user, (start, history) in sequences(dataset, "test").items():
        expected = [("i" + item, second, 1.0, 1) for item, second, _, _ in histories()[user[1:]]]
        assert history == expected
        assert start == len(expected) - 1
    assert feature_values(dataset, "item", "tag")["i1"] == ["film"]
    assert dataset.feature_size("item", "tag") == 2, "the tag of the unseen item is not in the vocabulary"


def test_pixelrec_milliseconds_are_named_and_can_be_declared(tmp_path):
    interactions, items = pixelrec_files(tmp_path)
    rows = [(item, user, int(second) * 1000 + 999) for user, item, _, second in RATINGS]
    write_csv(interactions, [("item_id", "user_id", "timestamp"), *((f"i{i}", f"u{u}", t) for i, u, t in rows)])
    with pytest.raises(ValueError, match=r"Pixel200K\.csv, row 2: the time '880000000999'.*looks like milliseconds"):
        prepare(pixelrec(interactions, items), tmp_path / "out", split=SPLIT)
    source = pixelrec(interactions, items, time_unit="milliseconds")
    dataset = Dataset.open(prepare(source, tmp_path / "out", split=SPLIT))
    _, history = sequences(dataset, "test")["u5"]
    assert [event[1] for event in history] == [event[1] for event in histories()["5"]]
    with pytest.raises(ValueError, match=r"time_unit='hours' is not one of seconds, milliseconds"):
        pixelrec(interactions, items, time_unit="hours")


def random_ratings(seed=0, users=60, items=12, count=500):
    rng = np.random.default_rng(seed)
    return [
        (
            f"A{rng.integers(users)}",
            f"B{rng.integers(items)}",
            int(rng.integers(1, 6)),
            int(1e9 + rng.integers(300)),
        )
        for _ in range(count)
    ]


def core_oracle(ratings, k, iterative):
    """The k-core by plain counting; or the single pass of the published protocol."""
    users, items = Counter(r[0] for r in ratings), Counter(r[1] for r in ratings)
    kept = [r for r in ratings if users[r[0]] >= k and items[r[1]] >= k]
    if not iterative:
        users = Counter(r[0] for r in kept)
        return [r for r in kept if users[r[0]] >= k]
    return kept if len(kept) == len(ratings) else core_oracle(kept, k, iterative)


@pytest.mark.parametrize("python_literals", [True, False])
@pytest.mark.parametrize("core", ["iterative", "published"])
def test_amazon_keeps_the_5_core_and_items_without_metadata(tmp_path, python_literals, core):
    ratings = random_ratings(users=90, items=60)
    source = amazon(*amazon_files(tmp_path, ratings, python_literals))
    dataset = Dataset.open(prepare(source, tmp_path / "out", split=SPLIT, core=core, partitions=3))
    expected = core_oracle(ratings, 5, core == "iterative")
    assert 0 < len(expected) < len(ratings)
    found = {user: history for user, (_, history) in sequences(dataset, "test").items()}
    assert found == {u: h for u, h in histories(expected).items() if len(h) >= 3}
    assert dataset.manifest["counts"]["dropped"]["outside_5_core"] == len(ratings) - len(expected)
    assert set(dataset.items["raw_item_id"].to_pylist()) == {r[1] for r in expected}
    titles = dict(zip(dataset.items["raw_item_id"].to_pylist(), dataset.items["title"].to_pylist(), strict=True))
    top = Counter(r[1] for r in ratings).most_common(1)[0][0]
    known = next(item for item in titles if item != top)
    assert titles[known] == f"It's book {known}"
    assert feature_values(dataset, "item", "categories")[known] == ["Books", f"C{known}"]
    assert titles[top] == ""
    assert dataset.manifest["counts"]["kept"]["unknown_item"] == sum(r[1] == top for r in ratings)


def test_amazon_metadata_is_never_evaluated(tmp_path):
    marker = tmp_path / "evaluated"
    line = f"__import__('os').mkdir({str(marker)!r})".encode()
    with pytest.raises(ValueError, match=r"meta\.json, row 7: neither JSON nor a Python literal"):
        parse_record(line, tmp_path / "meta.json", 7)
    assert not marker.exists()
    with pytest.raises(ValueError, match=r"row 3: a list, expected a dict"):
        parse_record(b"['asin']", tmp_path / "meta.json", 3)
    with pytest.raises(ValueError, match=r"row 1: neither JSON"):
        parse_record(b"(" * 100_000, tmp_path / "meta.json", 1)
    with pytest.raises(ValueError, match=r"row 1: neither JSON"):
        parse_record(b"{['asin']: 1}", tmp_path / "meta.json", 1)


@pytest.mark.parametrize("line", [b'{"label": 1, "label": 0}', b'{"a": {"b": 1, "b": 1}}', b"{'label': 1, 'label': 0}"])
def test_a_key_twice_is_refused_because_parsers_differ_in_which_value_they_keep(line, tmp_path):
    with pytest.raises(ValueError, match=r"meta\.json, row 7: .*there twice"):
        parse_record(line, tmp_path / "meta.json", 7)


def test_a_damaged_gzip_file_is_named(tmp_path):
    ratings, meta = amazon_files(tmp_path, random_ratings())
    meta.write_bytes(meta.read_bytes()[:-20])
    with pytest.raises(
        ValueError, match=r"meta_Books\.json\.gz is a damaged gzip file .*end-of-stream.*fetch or write it again"
    ):
        list(amazon(ratings, meta).items())


def test_amazon_ratings_outside_1_to_5_are_bad_labels(tmp_path):
    ratings, meta = amazon_files(tmp_path, random_ratings())
    with ratings.open("a") as file:
        file.write("A1,B1,6.0,1000000000\n")
    with pytest.raises(ValueError, match=r"ratings_Books\.csv, row 501: the label \(rating >= 4\) is not a number"):
        prepare(amazon(ratings, meta), tmp_path / "out", split=SPLIT)


def test_a_csv_row_with_another_number_of_cells_names_file_and_row(tmp_path):
    interactions, items = pixelrec_files(tmp_path)
    with interactions.open("a") as file:
        file.write("i1,u5\n")
    with pytest.raises(ValueError, match=r"Pixel200K\.csv, after row \d+: .*Row #12: Expected 3 columns, got 2"):
        prepare(pixelrec(interactions, items), tmp_path / "out", split=SPLIT)
    interactions.write_bytes(b"item_id,user_id,timestamp\ni\xff1,u5,880000000\n")
    with pytest.raises(ValueError, match=r"Pixel200K\.csv, after row 1: .*invalid UTF8"):
        prepare(pixelrec(interactions, items), tmp_path / "out", split=SPLIT)


def test_a_missing_column_lists_those_there_are(tmp_path):
    interactions, items = pixelrec_files(tmp_path)
    write_csv(items, [("item_id", "title", "tag"), ("i1", "a", "b")])
    with pytest.raises(ValueError, match=r"item_info\.csv: no column description; it has item_id, title, tag"):
        prepare(pixelrec(interactions, items), tmp_path / "out", split=SPLIT)


# --- tables by a column mapping


MAPPING = """
name: shop
events:
  path: events-*.csv
  user: customer
  item: sku
  time: at
  time_unit: iso8601
  label: stars
  positive_from: 3
  action: kind
  actions: [view, buy]
items:
  path: items.csv
  item: sku
  text: [title, brand]
  features: {category: "|", colour: null}
  created_at: listed
users:
  path: users.csv
  user: customer
  features: {country: null}
"""


def shop(folder, mapping=MAPPING):
    header = ("customer", "sku", "at", "stars", "kind")
    one = [
        ("ann", "s/1", "2020-01-01 00:00:10", 5, "buy"),
        ("bob", "s/2", "2020-01-01T00:00:05+00:00", "", "view"),
    ]
    two = [("ann", "s/2", "2020-01-01T01:00:00+01:00", 2, "view"), ("bob", "s/1", "2020-01-02", 3, "")]
    three = [("ann", "s/3", "2020-02-01", 4, "view"), ("bob", "s/3", "2020-02-02", 1, "buy")]
    write_csv(folder / "events-1.csv", [header, *one])
    write_csv(folder / "events-2.csv", [header, *two, *three])
    items = [("sku", "title", "brand", "category", "colour", "listed")]
    items += [("s/1", "Mug", "Acme", "kitchen|gift", "red", 1577836800), ("s/2", "Pen", "", "", "", "")]
    items += [("s/3", "Hat", "Acme", "gift", "red", 1577836801)]
    write_csv(folder / "items.csv", items)
    write_csv(folder / "users.csv", [("customer", "country"), ("bob", "NZ"), ("zoe", "FR")])
    (folder / "shop.yaml").write_text(mapping)
    return folder / "shop.yaml"


def test_a_table_of_csv_files_is_read_by_its_mapping(tmp_path):
    dataset = Dataset.open(prepare(table(shop(tmp_path)), tmp_path / "out", split=SPLIT))
    start = 1577836800  # 2020-01-01
    assert sequences(dataset, "test") == {
        "ann": (
            2,
            [("s/2", start, 0.0, 1), ("s/1", start + 10, 1.0, 2), ("s/3", start + 31 * 86400, 1.0, 1)],
        ),
        "bob": (
            2,
            [
                ("s/2", start + 5, None, 1),
                ("s/1", start + 86400, 1.0, 0),
                ("s/3", start + 32 * 86400, 0.0, 2),
            ],
        ),
    }
    assert feature_values(dataset, "item", "category") == {
        "s/1": ["kitchen", "gift"],
        "s/2": [],
        "s/3": ["gift"],
    }
    assert feature_values(dataset, "user", "country") == {"ann": [], "bob": ["NZ"]}
    assert dataset.items["created_at"].to_pylist() == [start, None, start + 1]
    counts = dataset.manifest["counts"]
    assert (counts["users_without_features"], counts["user_rows_without_events"]) == (1, 1)
    assert (counts["events"], counts["exposures"]) == (6, 5), "an empty label is no exposure"
    assert dataset.manifest["label_rule"] == "stars >= 3"


def test_a_table_of_parquet_files_takes_integers_nulls_and_timestamps(tmp_path):
    times = pa.array([3_000_000, 1_000_000, 2_500_000, 7, None], pa.timestamp("us"))
    labels = pa.array([1.0, None, 0.0, float("nan"), 1.0])
    events = {"u": pa.array([1, 1, 1, 1, 2]), "i": pa.array([10, 11, 12, 10, 10]), "t": times, "y": labels}
    pq.write_table(pa.table(events), tmp_path / "events.parquet", row_group_size=2)
    pq.write_table(
        pa.table({"i": [10, 11, 12], "n": ["a", "b", "c"], "f": [["x"], [], ["x", "y"]]}),
        tmp_path / "i.parquet",
    )
    mapping = {
        "name": "p",
        "events": {"path": "events.parquet", "user": "u", "item": "i", "time": "t", "label": "y"},
        "items": {"path": "i.parquet", "item": "i", "text": ["n"], "features": {"f": None}},
    }
    (tmp_path / "p.yaml").write_text(json.dumps(mapping))
    source = table(tmp_path / "p.yaml")
    with pytest.raises(ValueError, match=r"events\.parquet, row 5: the time None is not a number or date"):
        prepare(source, tmp_path / "out", split=SPLIT)
    policy = BadRows(bad_time="drop")
    with pytest.raises(ValueError, match=r"events\.parquet, row 4: the label \(y, 0 or 1\) is not a number"):
        prepare(source, tmp_path / "out", split=SPLIT, policy=policy)
    policy = BadRows(bad_time="drop", nan_label="keep")
    dataset = Dataset.open(prepare(source, tmp_path / "out", split=SPLIT, policy=policy))
    assert sequences(dataset, "test") == {
        "1": (3, [("10", 0, None, 1), ("11", 1, None, 1), ("12", 2, 0.0, 1), ("10", 3, 1.0, 1)])
    }
    assert dataset.manifest["counts"]["dropped"] == {"bad_time": 1}
    assert dataset.manifest["counts"]["kept"] == {"nan_label": 1}
    assert feature_values(dataset, "item", "f") == {"10": ["x"], "11": [], "12": ["x", "y"]}


def test_a_table_without_timestamps_is_in_row_order_across_files(tmp_path):
    mapping = MAPPING.replace("  time: at\n", "").replace("  time_unit: iso8601\n", "")
    dataset = Dataset.open(prepare(table(shop(tmp_path, mapping)), tmp_path / "out", split=SPLIT))
    assert dataset.manifest["has_timestamps"] is False
    found = sequences(dataset, "test")
    assert [event[0] for event in found["ann"][1]] == ["s/1", "s/2", "s/3"]
    seconds = [event[1] for event in found["ann"][1]]
    assert seconds == sorted(set(seconds)), "every row is a second of its own"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("  item: sku\n  time", "  itm: sku\n  time"),
            r"unknown key events\.itm; did you mean events\.item\?",
        ),
        (("  item: sku\n  time", "  time"), r"events\.item is missing; it is required"),
        (("events-*.csv", "none-*.csv"), r"events\.path='none-\*\.csv' matches no file under"),
        (("  actions: [view, buy]\n", ""), r"events\.actions is missing; list the values of 'kind'"),
        (("  label: stars\n", ""), r"events\.positive_from needs events\.label"),
        (("iso8601", "years"), r"time_unit='years' is not one of"),
        (("text: [title, brand]", "text: []"), r"items\.text=\[\] must be a list of at least one column"),
        (("name: shop", "name: ["), r"shop\.yaml is not valid YAML"),
        (("users:", "users: 3\nx:"), r"unknown key x|users must be a mapping"),
    ],
)
def test_a_mistake_in_the_mapping_names_its_field(tmp_path, change, message):
    path = shop(tmp_path, MAPPING.replace(*change))
    with pytest.raises(ValueError, match=message):
        table(path)


def test_an_action_that_is_not_listed_names_the_row(tmp_path):
    path = shop(tmp_path, MAPPING.replace("[view, buy]", "[view]"))
    with pytest.raises(
        ValueError, match=r"events-1\.csv, row 2: kind='buy' is not in events\.actions \(view\); add it"
    ):
        prepare(table(path), tmp_path / "out", split=SPLIT)


def test_a_mapping_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no\.yaml: no such mapping file"):
        table(tmp_path / "no.yaml")


# --- values


def test_times_are_floored_seconds_and_null_where_they_are_none():
    texts = pa.array(["881250949", " 8.8e8 ", "1.9", "-1", "", None, "abc", "nan", "1e300"])
    expected = [881250949, 880000000, 1, -1, None, None, None, None, None]
    assert parse_seconds(texts, "seconds").to_pylist() == expected
    assert parse_seconds(pa.array([1999, -1]), "milliseconds").to_pylist() == [1, -1]
    assert parse_seconds(pa.array([1_999_999]), "microseconds").to_pylist() == [1]
    iso = pa.array(["1970-01-02", "1970-01-01T01:00:00+01:00", "soon", None])
    assert parse_seconds(iso, "iso8601").to_pylist() == [86400, 0, None, None]
    assert parse_seconds(pa.array([86_400_000], pa.timestamp("ms")), "seconds").to_pylist() == [86400]
    assert parse_seconds(pa.array([2], pa.date32()), "seconds").to_pylist() == [2 * 86400]


def test_numbers_are_nan_where_they_are_none():
    found = parse_float(pa.array(["4", " 3.5", "", None, "x", "nan", "inf"]))
    assert np.array_equal(found, [4, 3.5, *[np.nan] * 5], equal_nan=True)


def test_ids_must_have_an_exact_text():
    assert as_id_strings(pa.array([7, None]), "user").to_pylist() == ["7", None]
    assert as_id_strings(pa.array(["a", "b"]).dictionary_encode(), "user").to_pylist() == ["a", "b"]
    assert as_id_strings(pa.array([7.0, None, float("nan")]), "user").to_pylist() == ["7", None, None]
    with pytest.raises(ValueError, match=r"the user id column has type double and values that are not whole; ids"):
        as_id_strings(pa.array([1.5]), "user")
    with pytest.raises(ValueError, match=r"the user id column has type bool; ids must be strings or integers"):
        as_id_strings(pa.array([True]), "user")


def test_events_stream_in_chunks_with_running_row_numbers(tmp_path):
    path = tmp_path / "Pixel1M.csv"
    count = 1_200_000
    with path.open("w") as file:
        file.write("item_id,user_id,timestamp\n")
        file.writelines(f"i{n % 97},user{n},88{n:07d}\n" for n in range(count))
    items = write_csv(tmp_path / "item_info.csv", [("item_id", "title", "tag", "description"), ("i1", "a", "b", "c")])
    chunks = list(pixelrec(path, items).events())
    assert len(chunks) > 1
    rows = np.concatenate([chunk.table["row"].to_numpy() for chunk in chunks])
    assert np.array_equal(rows, np.arange(2, count + 2))
    assert sum(chunk.size for chunk in chunks) == os.path.getsize(path)
    last = chunks[-1].table.slice(chunks[-1].table.num_rows - 1).to_pylist()[0]
    assert (last["raw_user_id"], last["timestamp"]) == (f"user{count - 1}", 880000000 + count - 1)
