import json

import numpy as np
import pyarrow as pa
import pytest

from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.sources.movielens import movielens_100k
from tests.helpers import fixtures
from tests.helpers.source_files import RATINGS, memory_source, recbole_100k


@pytest.fixture
def dataset(tmp_path):
    source = movielens_100k(recbole_100k(tmp_path / "raw"))
    return Dataset.open(prepare(source, tmp_path / "out", split="leave_one_out"))


def test_sizes_include_the_unknown_id(dataset):
    assert (dataset.num_items, dataset.num_users, dataset.num_actions) == (5, 4, 6)
    assert dataset.items["item_id"].to_pylist() == [1, 2, 3, 4]
    assert dataset.users["user_id"].to_pylist() == [1, 2, 3]
    assert dataset.feature_size("item", "genres") == 9


def test_actions_are_worth_the_number_in_their_name(dataset):
    np.testing.assert_array_equal(dataset.action_values, [np.nan, 1, 2, 3, 4, 5])
    np.testing.assert_array_equal(fixtures.dataset().action_values, [np.nan, 1, 2, 3, 4, 5, np.nan])  # a view: none


def test_features_are_bags_by_id_with_an_empty_one_for_the_unknown(dataset):
    for kind, name, rows in (("item", "genres", 5), ("item", "release_year", 5), ("user", "gender", 4)):
        values, offsets = dataset.feature_ids(kind, name)
        assert values.dtype == offsets.dtype == np.int64
        assert len(offsets) == rows + 1
        assert list(offsets[:2]) == [0, 0]
        table = dataset.items if kind == "item" else dataset.users
        for row, bag in enumerate(table[f"feature_{name}"].to_pylist(), start=1):
            assert values[offsets[row] : offsets[row + 1]].tolist() == bag


def test_counts_are_the_training_events_of_each_item(dataset):
    raw = dataset.items["raw_item_id"].to_pylist()
    own = {}
    for user, item, _, _ in sorted(RATINGS, key=lambda r: r[3]):
        own.setdefault(user, []).append(item)
    train = [item for items in own.values() for item in items[:-2]]
    assert dataset.training_item_counts().tolist() == [0, *(train.count(item) for item in raw)]
    assert dataset.training_item_counts().dtype == np.int64


def test_row_groups_name_every_user_once(tmp_path):
    events = [(f"u{n % 50}", "i", 5, n) for n in range(200)]
    path = prepare(memory_source(tmp_path, events, ["i"]), tmp_path / "out", users_per_row_group=1, partitions=3)
    dataset = Dataset.open(path)
    groups = dataset.row_groups("train")
    assert [g.rows for g in groups] == [1] * 50
    users = [dataset.read_row_group(g.path, g.index, ["user_id"])["user_id"][0].as_py() for g in groups]
    assert sorted(users) == list(range(1, 51))


def test_small_data_still_has_a_row_group_for_every_rank(tmp_path):
    events = [(f"u{n % 100}", "i", 5, n) for n in range(1000)]
    dataset = Dataset.open(prepare(memory_source(tmp_path, events, ["i"]), tmp_path / "out"))
    assert max(g.rows for g in dataset.row_groups("train")) == 4


def test_sequences_have_the_documented_types(dataset):
    group = dataset.row_groups("test")[0]
    schema = dataset.read_row_group(group.path, group.index).schema
    assert schema.field("user_id").type == pa.int64()
    assert schema.field("target_start").type == pa.int32()
    types = {"item_ids": pa.int64(), "timestamps": pa.int64(), "labels": pa.float32(), "actions": pa.int32()}
    for name, kind in types.items():
        assert schema.field(name).type.value_type == kind


def test_text_is_by_item_and_unknown_columns_are_named(dataset):
    assert dataset.text(["year", "title"]).to_pylist()[3] == {
        "year": "1963",
        "title": "Contempt (Mépris, Le)",
    }
    with pytest.raises(ValueError, match=r"no text column plot, cast; it has title, year, genres"):
        dataset.text(["plot", "title", "cast"])
    with pytest.raises(ValueError, match=r"no user feature 'genres'; it has gender, occupation, age"):
        dataset.feature_ids("user", "genres")
    with pytest.raises(ValueError, match=r"kind 'movie' is not one of item, user"):
        dataset.feature_size("movie", "genres")
    with pytest.raises(ValueError, match=r"part 'all' is not one of train, valid, test"):
        dataset.sequence_files("all")


def test_what_is_no_sound_dataset_is_an_error_with_a_remedy(dataset, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is not a prepared dataset: no manifest\.json.*hllm prepare"):
        Dataset.open(tmp_path / "nowhere")
    path = dataset.root / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "schema_version": 99}))
    with pytest.raises(ValueError, match=r"schema_version 99, this program reads 1 and 2; prepare it again"):
        Dataset.open(dataset.root)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged .*; prepare the dataset again"):
        Dataset.open(dataset.root)
    path.write_text(json.dumps(manifest))
    with (dataset.root / "users.parquet").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"users\.parquet has \d+ bytes, the manifest says \d+; prepare again"):
        Dataset.open(dataset.root)
