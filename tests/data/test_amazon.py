"""Amazon reviews of all editions: told apart by content, the same data set whichever way they are written."""

import gzip
import json
import random

import pytest

from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.sources.amazon import amazon
from hllm_torchrec.launch.prepare import main, summary
from tests.helpers.source_files import sequences

USERS, PRODUCTS = [f"A{u:013d}" for u in range(20)], [f"B{i:09d}" for i in range(12)]
RANDOM = random.Random(0)
RATINGS = [
    (user, item, RANDOM.randint(1, 5), 1_400_000_000 + RANDOM.randint(0, 10**7))
    for user in USERS
    for item in RANDOM.sample(PRODUCTS, 8)
]
TITLES = {item: f"Tom &amp; Jerry&#39;s <i>{n}</i>" for n, item in enumerate(PRODUCTS)}


def lines(records, write=json.dumps):
    return "".join(f"{write(record)}\n" for record in records).encode()


def csv_lines(rows):
    return "".join(",".join(map(str, row)) + "\n" for row in rows).encode()


def metadata(key, category, write=json.dumps):
    return lines([{key: item, "title": title, category: [["Books"]]} for item, title in TITLES.items()], write)


HEADER = ("user_id", "parent_asin", "rating", "timestamp")
EDITIONS = {
    "2014": (csv_lines((u, i, f"{r}.0", t) for u, i, r, t in RATINGS), metadata("asin", "categories", repr)),
    "2014 reviews": (
        lines([{"reviewerID": u, "asin": i, "overall": float(r), "unixReviewTime": t} for u, i, r, t in RATINGS], repr),
        metadata("asin", "categories", repr),
    ),
    "2018": (csv_lines((i, u, f"{r}.0", t) for u, i, r, t in RATINGS), metadata("asin", "category")),
    "2023": (
        csv_lines([HEADER, *((u, i, f"{r}.0", t * 1000 + 7) for u, i, r, t in RATINGS)]),
        metadata("parent_asin", "categories"),
    ),
    "2023 with histories": (
        csv_lines([(*HEADER, "history"), *((u, i, r, t * 1000, "B1 B2") for u, i, r, t in RATINGS)]),
        metadata("parent_asin", "categories"),
    ),
    "2023 reviews": (
        lines(
            [
                {
                    "user_id": u,
                    "asin": "other",
                    "parent_asin": i,
                    "rating": float(r),
                    "timestamp": t * 1000,
                    "title": "x",
                }
                for u, i, r, t in RATINGS
            ]
        ),
        metadata("parent_asin", "categories"),
    ),
}


def source(folder, edition, **options):
    events, items = EDITIONS[edition]
    (folder / "ratings_Books.csv").write_bytes(events)
    (folder / "meta.json.gz").write_bytes(gzip.compress(items))
    return amazon(folder / "ratings_Books.csv", folder / "meta.json.gz", **options)


@pytest.mark.parametrize("edition", EDITIONS)
def test_every_edition_gives_the_same_dataset(tmp_path, edition):
    dataset = Dataset.open(prepare(source(tmp_path, edition), tmp_path / "out", split="leave_one_out"))
    expected = {}
    for user, item, rating, second in sorted(RATINGS, key=lambda row: row[3]):
        expected.setdefault(user, []).append((item, second, float(rating >= 4), rating))
    assert {user: history for user, (_, history) in sequences(dataset, "test").items()} == expected
    titles = dict(zip(dataset.items["raw_item_id"].to_pylist(), dataset.items["title"].to_pylist(), strict=True))
    assert titles == {item: f"Tom & Jerry's {n}" for n, item in enumerate(PRODUCTS)}
    assert dataset.manifest["counts"]["kept"] == {}


def test_the_layout_is_said(tmp_path):
    out = prepare(source(tmp_path, "2018"), tmp_path / "out", split="leave_one_out")
    assert "users in user, items in item, times in seconds" in summary(out)
    out = prepare(source(tmp_path, "2023"), tmp_path / "new", split="leave_one_out")
    assert "users in user_id, items in parent_asin, times in milliseconds" in summary(out)
    assert "meta.json.gz: JSON lines; without HTML" in summary(out)


def test_html_is_kept_if_asked(tmp_path):
    source(tmp_path, "2014")
    words = ["--source", "amazon", "--path", tmp_path / "ratings_Books.csv", "--items", tmp_path / "meta.json.gz"]
    words += ["--split", "leave_one_out", "--html", "keep", "--output", tmp_path / "out"]
    assert main([str(word) for word in words]) == 0
    assert Dataset.open(tmp_path / "out").items["title"][0].as_py() in TITLES.values()


def test_ids_of_another_form_are_told_by_the_metadata(tmp_path):
    events = csv_lines((f"p{i}", f"c{u}", 5, t) for u, i, _, t in RATINGS)
    items = lines([{"asin": f"p{item}", "title": item} for item in PRODUCTS])
    (tmp_path / "e.csv").write_bytes(events)
    (tmp_path / "m.json").write_bytes(items)
    chunk = next(iter(amazon(tmp_path / "e.csv", tmp_path / "m.json").events()))
    assert set(chunk.table["raw_item_id"].to_pylist()) == {f"p{item}" for item in PRODUCTS}


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (b"user,item,stars\nA,B,1\n", r"its first line is 'user,item,stars'; an Amazon rating file has user, item"),
        (b"", r"ratings\.csv has no rows; fetch it again"),
        (b'{"user_id": "A"\n', r"ratings\.csv, row 1: neither JSON nor a Python literal"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path, events, message):
    (tmp_path / "ratings.csv").write_bytes(events)
    (tmp_path / "meta.json").write_bytes(EDITIONS["2018"][1])
    with pytest.raises(ValueError, match=message):
        list(amazon(tmp_path / "ratings.csv", tmp_path / "meta.json").events())
