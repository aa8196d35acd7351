"""`hllm seal`: what prepare writes is sealed to the same dataset; what breaks the contract is named."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.sealing import seal
from hllm_torchrec.launch.seal import main
from tests.data.test_append import append, everything
from tests.helpers import task_shop
from tests.helpers.source_files import ITEMS, memory_source, random_events


def unsealed(tmp_path, rule="time"):
    """The files of a prepared dataset without what seal writes, and the dataset."""
    prepared = Dataset.open(prepare(memory_source(tmp_path, random_events(), ITEMS), tmp_path / "p", split=rule))
    root = shutil.copytree(prepared.root, tmp_path / "s")
    for name in ("manifest.json", "training_item_counts.npy"):
        (root / name).unlink()
    shutil.rmtree(root / "events")
    split = {"rule": rule, "cut_timestamps": prepared.manifest["split"]["cut_timestamps"]}
    split |= {"fractions": [0.8, 0.1, 0.1]} if rule == "leave_last" else {}
    contract = {
        "name": "memory",
        "label_rule": "rating >= 4",
        "actions": [f"rating {n}" for n in range(1, 6)],
        "text_columns": ["title"],
        "has_timestamps": True,
        "split": split,
    }
    (root / "contract.yaml").write_text(yaml.safe_dump(contract))
    return root, prepared


@pytest.mark.parametrize("rule", ["time", "leave_one_out", "leave_last"])
def test_what_prepare_writes_is_sealed_to_the_same_dataset(tmp_path, rule, capsys):
    root, prepared = unsealed(tmp_path, rule)
    (root / "sequences" / "train" / "_SUCCESS").write_text("")  # as Spark leaves it
    assert main([str(root)]) == 0, capsys.readouterr().err
    assert "400 events, 25 users, 15 items" in capsys.readouterr().out
    dataset = Dataset.open(root)
    assert everything(dataset) == everything(prepared)
    for name in ("actions", "vocabulary", "seconds", "text_columns", "item_features"):
        assert dataset.manifest[name] == prepared.manifest[name], name
    for name in ("users", "items", "events", "exposures", "positives"):
        assert dataset.manifest["counts"][name] == prepared.manifest["counts"][name], name
    for part, facts in prepared.manifest["parts"].items():
        assert dataset.manifest["parts"][part] == {name: facts[name] for name in facts if name != "files"}
    day = [("u1", "new", 5, 60), ("u2", "i1", 1, 3)]
    append(root, tmp_path / "day", day, ["new"])
    append(prepared.root, tmp_path / "day", day, ["new"])
    assert everything(Dataset.open(root)) == everything(Dataset.open(prepared.root))
    with pytest.raises(ValueError, match=r"has a manifest\.json already; remove it"):
        seal(root)


def changed(path, change):
    table = pq.read_table(path)
    pq.write_table(change(table), path)


def with_column(name, values):
    def change(table):
        field = table.schema.field(name)
        return table.set_column(
            table.column_names.index(name), field, pa.array(values(table[name].to_pylist()), field.type)
        )

    return change


BROKEN = {
    "repeated raw id": (
        "items.parquet",
        with_column("raw_item_id", lambda v: [v[1], *v[1:]]),
        r"raw_item_id '.*' is there",
    ),
    "empty raw id": (
        "users.parquet",
        with_column("raw_user_id", lambda v: ["", *v[1:]]),
        r"row 0: raw_user_id is empty",
    ),
    "a gap": (
        "items.parquet",
        with_column("item_id", lambda v: [*v[:-1], 99]),
        r"row 14: item_id is 99, it must be 15",
    ),
    "null text": ("items.parquet", with_column("title", lambda v: [None, *v[1:]]), r"title must be strings"),
    "unsorted": (
        "sequences/train/part-00000.parquet",
        with_column("timestamps", lambda v: [v[0][::-1], *v[1:]]),
        r"part-00000\.parquet, row group 0, row 0: timestamps\[\d+\] is \d+; it is earlier than the one before",
    ),
    "milliseconds": (
        "sequences/train/part-00000.parquet",
        with_column("timestamps", lambda v: [[1_700_000_000_000 for _ in row] for row in v]),
        r"row 0: timestamps\[0\] is 1700000000000; .* it looks like milliseconds; write",
    ),
    "another history": (
        "sequences/valid/part-00000.parquet",
        with_column("item_ids", lambda v: [[v[0][0] % 15 + 1, *v[0][1:]], *v[1:]]),
        r"valid.*row 0: user \d+ has a history in valid that differs from its events in the earlier parts",
    ),
    "another start": (
        "sequences/valid/part-00000.parquet",
        with_column("target_start", lambda v: [v[0] - 1, *v[1:]]),
        r"valid.*row 0: user \d+ has a target_start that is not its number of events before valid",
    ),
    "twice": (
        "sequences/train/part-00000.parquet",
        lambda table: pa.concat_tables([table, table.slice(0, 1)]),
        r"train.*: user \d+ has an earlier row in this part",
    ),
    "an unknown item": (
        "sequences/test/part-00000.parquet",
        with_column("item_ids", lambda v: [[*v[0][:-1], 77], *v[1:]]),
        r"test.*item_ids\[\d+\] is 77; the dataset's items have the ids 0\.\.15",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_breaks_the_contract_is_named_and_nothing_is_sealed(tmp_path, kind):
    name, change, message = BROKEN[kind]
    root, _ = unsealed(tmp_path)
    changed(root / name, change)
    with pytest.raises(ValueError, match=message) as error:
        seal(root)
    assert str(error.value).endswith("; write the file again, then seal")
    assert not (root / "manifest.json").exists()


def test_a_part_that_does_not_follow_the_rule_is_named(tmp_path):
    root, _ = unsealed(tmp_path)
    text = (root / "contract.yaml").read_text()

    def refused(match, **split):
        contract = yaml.safe_load(text)
        contract["split"] = split
        (root / "contract.yaml").write_text(yaml.safe_dump(contract))
        with pytest.raises(ValueError, match=match):
            seal(root)

    refused(r"user \d+ has \d+ events, of which valid begins at .*leave_one_out divides at", rule="leave_one_out")
    refused(
        r"has an event in train outside of the seconds that cut_timestamps give this part",
        rule="time",
        cut_timestamps=[3, 39],
    )
    refused(r"split\.cut_timestamps must be the first second of valid", rule="time")
    refused(r"split\.rule is 'x'; choose time, leave_one_out or leave_last", rule="x")
    (root / "contract.yaml").write_text(text.replace("text_columns", "texts"))
    with pytest.raises(ValueError, match=r"contract\.yaml: text_columns is None, it must be a list of names"):
        seal(root)
    (root / "contract.yaml").unlink()
    with pytest.raises(ValueError, match=r"contract\.yaml is missing: it has the facts that the files do not contain"):
        seal(root)


def declared(tmp_path, **changes):
    """As `unsealed`, of the shop with labels, weights, rates and context."""
    prepared = task_shop.weighted()
    root = shutil.copytree(prepared.root, tmp_path / "s")
    for name in ("manifest.json", "training_item_counts.npy"):
        (root / name).unlink()
    shutil.rmtree(root / "events")
    events = {"labels": task_shop.LABELS, "weight": True, "sampling_rate": True, "context": task_shop.CONTEXT}
    contract = {
        "name": "task-shop",
        "label_rule": "click, 0 or 1",
        "actions": ["event"],
        "text_columns": ["title"],
        "has_timestamps": True,
        "split": {"rule": "time", "cut_timestamps": prepared.manifest["split"]["cut_timestamps"]},
        "events": events | changes,
    }
    (root / "contract.yaml").write_text(yaml.safe_dump(contract, sort_keys=False))
    return root, prepared


def test_declared_columns_are_sealed_to_the_same_dataset(tmp_path):
    root, prepared = declared(tmp_path)
    dataset = seal(root)
    assert dataset.schema == prepared.schema and dataset.schema.sizes == prepared.schema.sizes
    assert dataset.manifest["vocabulary"] == prepared.manifest["vocabulary"]
    for user in range(1, prepared.num_users):
        found, expected = dataset.user_events(user), prepared.user_events(user)
        assert found.extra.keys() == expected.extra.keys() != set()
        for name, values in expected.extra.items():
            assert np.array_equal(found.extra[name], values, equal_nan=True), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": True}, r"unknown key events\.weights; known: labels, weight, sampling_rate, context"),
        ({"weight": "importance"}, r"events\.weight is 'importance', it must be true or false"),
        ({"labels": {"click": {"kind": "binary", "column": "c"}}}, "leave column and positive_from out"),
        ({"context": {"page": "categorical"}}, r"features.page\.parquet"),
        ({"context": {"device": "text"}}, r"events\.context\.device\.kind is 'text'; choose one of categorical"),
    ],
)
def test_mistakes_in_declared_columns_are_named(tmp_path, changes, message):
    root, _ = declared(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        seal(root)


@pytest.mark.parametrize(
    ("part", "name", "change", "message"),
    [
        ("train", "weight", lambda v: [[-1.0, *v[0][1:]], *v[1:]], "a weight is a number of at least 0"),
        ("train", "context_device", lambda v: [[9, *v[0][1:]], *v[1:]], r"the dataset's device has the ids 0\.\.3"),
        ("valid", "label_watch", lambda v: [[v[0][0] + 1, *v[0][1:]], *v[1:]], "has a history in valid that differs"),
    ],
)
def test_values_of_declared_columns_are_checked(tmp_path, part, name, change, message):
    root, _ = declared(tmp_path)
    changed(root / "sequences" / part / "part-00000.parquet", with_column(name, change))
    with pytest.raises(ValueError, match=message):
        seal(root)
