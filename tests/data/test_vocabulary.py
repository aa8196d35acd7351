"""Marks of id maps: a prefix is recognized, and anything else is located."""

from functools import partial
from hashlib import blake2b

import numpy as np
import pytest

from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.sources.movielens import movielens_100k
from hllm_torchrec.data.vocabulary import (
    MOST_MARKS,
    IdDifference,
    IdMark,
    compute_marks,
    dataset_marks,
    find_difference,
    id_digest,
    map_ids,
    map_problems,
    mark_ids,
    row_digests,
    vector_mark,
)
from tests.helpers.source_files import memory_source, recbole_100k


def names(number: int) -> list[str]:
    return [f"i{n}" for n in range(number)]


def difference(run: list, data: list) -> IdDifference | None:
    return find_difference(mark_ids(run), mark_ids(data), lambda start, stop: data[start:stop])


def test_the_chain_is_that_of_the_documentation():
    chain = b""
    for value in names(5):
        chain = blake2b(chain + blake2b(value.encode(), digest_size=16).digest(), digest_size=16).digest()
    assert mark_ids(names(5)).value == chain.hex()


@pytest.mark.parametrize("number", [0, 1, 7, MOST_MARKS, MOST_MARKS + 1, 5 * MOST_MARKS + 3])
def test_a_mark_continued_equals_that_of_all_ids(number):
    ids = names(number)
    for cut in {0, number // 3, number}:
        assert mark_ids(ids[cut:], mark_ids(ids[:cut])) == mark_ids(ids)
    whole = mark_ids(ids)
    assert len(whole.values) <= MOST_MARKS and IdMark.from_json(whole.to_json()) == whole
    assert [position for position, _ in whole.positions()][-1] == number


@pytest.mark.parametrize("run", [0, 1, 50, 1024, 1025, 2600, 5000])
@pytest.mark.parametrize("more", [0, 1, 4000])
def test_prefixes_are_recognized_and_read_few_ids(run, more):
    data, read = names(run + more), []

    def ids(start: int, stop: int) -> list[str]:
        read.extend(range(start, stop))
        return data[start:stop]

    mark = mark_ids(data)
    assert find_difference(mark_ids(data[:run]), mark, ids) is None
    assert len(read) <= mark.step


def test_the_first_difference_of_small_maps_is_exact():
    data = names(300)
    for position in (0, 17, 299):
        run = data.copy()
        run[position] = "other"
        assert difference(run, data) == IdDifference(position, position + 1)


def test_the_first_difference_of_large_maps_is_within_a_step():
    data = names(5000)
    run = [*data[:4321], "other", *data[4322:4900]]
    found = difference(run, data)
    assert found is not None and found.first <= 4321 < found.last and found.last - found.first <= mark_ids(run).step


def test_a_shorter_dataset_and_another_order():
    assert difference(names(10), names(8)) == IdDifference(8, 10, is_shorter=True)
    assert difference(["x", *names(10)], names(8)) == IdDifference(0, 1)
    assert difference(names(10)[::-1], names(10)) == IdDifference(0, 1)


def test_an_erased_id_keeps_its_place_by_its_digest():
    ids: list[str | bytes] = [*names(10)]
    ids[4] = id_digest("i4")
    assert mark_ids(ids) == mark_ids(names(10))


@pytest.mark.parametrize(
    "change", [{"count": -1}, {"count": 9}, {"step": 0}, {"value": "xyz"}, {"values": None}, {"values": ["00"] * 3}]
)
def test_damaged_marks_are_refused(change):
    with pytest.raises(ValueError, match="damaged mark of a vocabulary"):
        IdMark.from_json(mark_ids(names(3)).to_json() | change)


# ---------------------------------------------------------------------- of a dataset


@pytest.fixture
def build(tmp_path):
    def build(items: list[str], **options) -> Dataset:
        events = [(f"u{n % 7}", f"i{n % 5}", 5, n) for n in range(60)]
        source = memory_source(tmp_path, events, items)
        return Dataset.open(prepare(source, tmp_path / "data", **options))

    return build


def test_a_dataset_has_a_mark_of_each_map(build):
    dataset = build(names(5))
    marks = compute_marks(dataset)
    assert marks["items"] == mark_ids(dataset.items["raw_item_id"].to_pylist())
    assert marks["users"].count == dataset.num_users - 1
    assert marks["actions"].count == dataset.num_actions - 1
    assert list(map_ids(dataset, "items", 1, 3)) == dataset.items["raw_item_id"].to_pylist()[1:3]
    assert dataset_marks(dataset) == marks


def test_features_are_maps_of_their_values(tmp_path):
    dataset = Dataset.open(prepare(movielens_100k(recbole_100k(tmp_path / "raw")), tmp_path / "out"))
    marks = compute_marks(dataset)
    sizes = dataset.manifest["item_features"] | dataset.manifest["user_features"]
    assert set(marks) == {"items", "users", "actions", *(f"feature/{name}" for name in sizes)}
    for name, facts in sizes.items():
        assert marks[f"feature/{name}"].count == facts["size"] - 1
    with pytest.raises(ValueError, match="no item, user or context feature 'color'"):
        dataset.feature_values("color")


def test_an_extended_dataset_has_the_maps_of_the_first(build):
    before = compute_marks(build(names(5)))
    after = build(["new", *names(5)], extend=True)
    assert after.num_items == 7
    assert map_problems(before, after, before) == []


def test_items_in_another_order_are_named(build):
    before = compute_marks(build(names(5)))
    after = build(names(5)[::-1], overwrite=True)
    first = after.items["raw_item_id"][0].as_py()
    assert map_problems(before, after, ["users", "items"]) == [
        f"items: number 1 is {first!r} here and another one there"
    ]


def test_fewer_items_are_counted(build):
    dataset = build(names(5))
    ids = partial(map_ids, dataset, "items")
    run = mark_ids([*ids(), "later"])
    assert map_problems({"items": run}, dataset, ["items"]) == ["items: 5 here, 6 there"]


def test_vectors_are_compared_by_their_rows():
    vectors = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    changed = vectors.copy()
    changed[2, 1] += 1e-6
    assert find_difference(vector_mark(vectors[:4]), vector_mark(vectors), partial(row_digests, vectors)) is None
    found = find_difference(vector_mark(vectors), vector_mark(changed), partial(row_digests, changed))
    assert found == IdDifference(2, 3)
