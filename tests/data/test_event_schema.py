"""Declared labels, weights, rates and context of events, from the mapping to batches."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from hllm_torchrec.data.append import append_events
from hllm_torchrec.data.bad_rows import BadRows
from hllm_torchrec.data.batch_spec import BatchSpec
from hllm_torchrec.data.collate import Collator
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.dataset_compaction import compact
from hllm_torchrec.data.event_schema import EventSchema
from hllm_torchrec.data.events import Events
from hllm_torchrec.data.forgetting import Names, forget
from hllm_torchrec.data.loader import Loader, LoaderSpec
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.sources.table_mapping import table
from hllm_torchrec.data.task_targets import drawn_exposures
from tests.helpers import fixtures, task_shop

ROOT = Path(__file__).resolve().parents[2]


def read(dataset: Dataset) -> dict[tuple[str, str, int], dict[str, Any]]:
    """All events by raw user, raw item and second, from the last part that has each user."""
    items, users = dataset.items["raw_item_id"].to_pylist(), dataset.users["raw_user_id"].to_pylist()
    found = {}
    for user in range(1, dataset.num_users):
        events = dataset.user_events(user)
        for i in range(len(events)):
            key = (users[user - 1], items[events.item_ids[i] - 1], int(events.timestamps[i]))
            found[key] = {"click": events.labels[i]} | {name: column[i] for name, column in events.extra.items()}
    return found


def as_declared(row: dict[str, Any], devices: list[str]) -> dict[str, Any]:
    click = float(row["click"])
    return {
        "click": click,
        "label_like": float(row["like"]) if click else np.nan,
        "label_watch": np.float32(row["watch"]),
        "label_stars": float(row["stars"] - 1) if click else np.nan,
        "context_device": devices.index(row["device"]) + 1,
        "context_place": row["place"],
        "context_price": float(row["price"]) if row["price"] else np.nan,
    }


def test_every_declared_column_is_in_the_dataset_as_the_mapping_says() -> None:
    dataset = task_shop.dataset()
    found, devices = read(dataset), dataset.feature_values("device").to_pylist()
    rows = task_shop.events().to_pylist()
    assert len(found) == len(rows)
    for row in rows:
        own = found[row["user"], row["item"], row["second"]]
        assert own == pytest.approx(as_declared(row, devices), nan_ok=True)
    assert dataset.schema == EventSchema.from_manifest(dataset.manifest)
    assert dataset.schema.label_names == ("click", "like", "watch", "stars")


def test_appended_and_compacted_events_carry_the_columns(tmp_path: Path) -> None:
    rows = task_shop.events()
    days = (rows["second"].to_numpy() - 1_600_000_000) // 86_400
    dataset = task_shop.prepared(tmp_path, rows.filter(pa.array(days < 5)))
    later = task_shop.write(tmp_path / "later", rows.filter(pa.array(days >= 5)))
    assert append_events(table(later), dataset.root) is not None
    appended = Dataset.open(dataset.root)
    whole = read(task_shop.dataset())
    assert appended.feature_values("device").to_pylist() == task_shop.dataset().feature_values("device").to_pylist()
    assert read(appended).keys() == whole.keys()
    for key, own in read(appended).items():
        assert own == pytest.approx(whole[key], nan_ok=True)
    compact(dataset.root)
    for key, own in read(Dataset.open(dataset.root)).items():
        assert own == pytest.approx(whole[key], nan_ok=True)


def test_appends_are_folded_with_their_columns(tmp_path: Path) -> None:
    rows = task_shop.events()
    second = rows["second"].to_numpy()
    cuts = np.quantile(second, np.linspace(0.5, 1, 10))
    dataset = task_shop.prepared(tmp_path, rows.filter(pa.array(second <= cuts[0])))
    for number, (start, end) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):
        day = task_shop.write(tmp_path / f"{number}", rows.filter(pa.array((second > start) & (second <= end))))
        assert append_events(table(day), dataset.root) is not None
    appended = Dataset.open(dataset.root)
    assert len(appended.manifest["appends"]) < len(cuts) - 1, "several are one"
    whole = read(task_shop.dataset())
    assert read(appended).keys() == whole.keys()
    for key, own in read(appended).items():
        assert own == pytest.approx(whole[key], nan_ok=True)


def test_a_forgotten_user_and_item_leave_the_columns_of_the_others(tmp_path: Path) -> None:
    rows = task_shop.events()
    days = (rows["second"].to_numpy() - 1_600_000_000) // 86_400
    declared = {"weight": "weight", "sampling_rate": "rate"}
    dataset = task_shop.prepared(tmp_path, rows.filter(pa.array(days < 5)), **declared)
    later = task_shop.write(tmp_path / "later", rows.filter(pa.array(days >= 5)), **declared)
    append_events(table(later), dataset.root)
    before = read(Dataset.open(dataset.root))
    gone = forget(dataset.root, Names(["u3"], ["i5"]), erase=True)
    expected = {key: own for key, own in before.items() if key[0] != "u3" and key[1] != "i5"}
    assert gone.found["events"] == len(before) - len(expected) > 20
    after = Dataset.open(dataset.root)
    assert read(after).keys() == expected.keys() and after.schema == task_shop.weighted().schema
    for key, own in read(after).items():
        assert own == pytest.approx(expected[key], nan_ok=True)
    assert append_events(table(task_shop.write(tmp_path / "more", task_shop.events(1, 20, 1), **declared)), after.root)
    compact(after.root)
    found = read(Dataset.open(after.root))
    assert {key[0] for key in found} == {f"u{n}" for n in range(task_shop.USERS)} - {"u3"}
    for key, own in expected.items():
        assert found[key] == pytest.approx(own, nan_ok=True)


def test_an_append_with_other_labels_is_refused(tmp_path: Path) -> None:
    dataset = task_shop.prepared(tmp_path)
    fewer = {"click": "binary", "like": {"kind": "binary", "given": "click"}}
    later = task_shop.write(tmp_path / "later", task_shop.events(1, first_day=9, days=1), labels=fewer)
    with pytest.raises(ValueError, match=r"the settings of labels of the source are \['click', 'like'\], those of"):
        append_events(table(later), dataset.root)
    values = {"stars": {"kind": "ordinal", "values": [3, 2, 1], "given": "click"}}
    other = task_shop.write(tmp_path / "other", task_shop.events(1, 9, 1), labels=task_shop.LABELS | values)
    with pytest.raises(ValueError, match=r"of label stars of the source are .*\[3, 2, 1\].*dataset .*\[1, 2, 3\]"):
        append_events(table(other), dataset.root)


def test_names_of_labels_and_context_are_no_other_columns(tmp_path: Path) -> None:
    rows, prices = task_shop.events(), pa.array(np.arange(len(task_shop.events())))
    labels = {"click": "binary", "weight": {"kind": "regression", "column": "watch"}}
    context = {
        "sampling_rate": {"kind": "numeric", "column": "number"},
        **dict.fromkeys(("label", "timestamp", "user_id", "item_id", "position", "row"), "numeric"),
    }
    rows = rows.append_column("number", prices)
    for name in list(context)[1:]:
        rows = rows.append_column(name, prices)
    dataset = task_shop.prepared(tmp_path, rows, labels=labels, context=context, weight="weight", sampling_rate="rate")
    found = read(dataset)
    for number, row in enumerate(rows.to_pylist()):
        own = found[row["user"], row["item"], row["second"]]
        expected = {"click": row["click"], "label_weight": np.float32(row["watch"])}
        expected |= {"weight": row["weight"], "sampling_rate": row["rate"]}
        assert own == pytest.approx(expected | {f"context_{name}": number for name in context})


def test_a_dataset_without_a_declaration_has_one_label() -> None:
    assert fixtures.dataset().schema == EventSchema() and "event_schema" not in fixtures.dataset().manifest


def test_no_source_file_names_a_declared_column() -> None:
    names = [*task_shop.LABELS, *task_shop.CONTEXT]
    quoted = re.compile("|".join(rf"""["'](label_|context_|score_)?{name}["']""" for name in names if name != "like"))
    files = [file for folder in ("hllm_torchrec", "modules", "launch") for file in (ROOT / folder).rglob("*.py")]
    own = [file for file in files if quoted.search(file.read_text())]
    # These know columns of published files, the stars of MovieLens, and the action of a page.
    assert {file.name for file in own} <= {"amazon.py", "movielens.py", "registry.py", "plan.py", "estimate.py"}, own


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": {"click": "binary", "like": "boolean"}}, r"events\.labels\.like\.kind is 'boolean'; choose one of"),
        (
            {"labels": {"watch": "regression"}},
            r"events\.labels\.watch: the first label says which events are exposures",
        ),
        (
            {"labels": {"click": "binary", "like": {"kind": "binary", "given": "clik"}}},
            r"events\.labels\.like\.given: 'clik' is no binary label declared before it \(did you mean 'click'\?\)",
        ),
        (
            {"labels": {"click": "binary", "stars": {"kind": "ordinal"}}},
            r"events\.labels\.stars\.values: an ordinal label, and only that, lists its different values",
        ),
        (
            {"labels": {"click": "binary", "stars": {"kind": "ordinal", "values": [1, "1"]}}},
            r"events\.labels\.stars\.values has '1' more than once; list each value once, in order",
        ),
        (
            {"labels": {"click": "binary", "like": {"kind": "binary", "transform": "log1p"}}},
            r"events\.labels\.like\.transform: only for kind regression; leave it out",
        ),
        ({"labels": {"click": {"kind": "binary", "colum": "x"}}}, r"unknown key 'colum'; did you mean column\?"),
        (
            {"context": {"device": "category"}},
            r"events\.context\.device\.kind is 'category'; choose one of categorical",
        ),
        ({"context": {"click": "categorical"}}, r"'click' names two columns of events; give each its own name"),
        ({"label": "click"}, r"events\.labels replaces events\.label and events\.positive_from; leave these out"),
    ],
)
def test_a_mistake_in_a_declaration_is_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as found:
        table(task_shop.write(tmp_path, **changes))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("like", "2", r"events\.csv, row 2: the label like is 0 or 1; it is another value"),
        ("stars", "7", r"events\.csv, row 2: the label stars is one of 1, 2, 3; it is another value"),
        ("watch", "-1", r"events\.csv, row 2: the label watch is a number above -1 \(log1p\); it is another value"),
        ("watch", "1e39", r"events\.csv, row 2: the label watch is a number above -1 \(log1p\); it is another value"),
        ("price", "1e39", r"events\.csv, row 2: price is a finite number, or unknown; it is another value"),
        ("watch", "long", r"events\.csv, row 2: the label watch is a number above -1"),
        ("price", "dear", r"events\.csv, row 2: price is a finite number, or unknown; it is another value"),
        ("weight", "nan", r"events\.csv, row 2: weight is empty; a weight is a number of at least 0\. Correct the row"),
        ("weight", "-1", r"events\.csv, row 2: weight is -1; a weight is a number of at least 0"),
        ("rate", "0", r"events\.csv, row 2: sampling_rate is 0; a sampling rate is above 0 and at most 1"),
        ("rate", "1.5", r"events\.csv, row 2: sampling_rate is 1\.5; a sampling rate is above 0 and at most 1"),
        ("click", "", r"events\.csv, row 2: the label \w+ is given, but the first label, click, is not"),
    ],
)
def test_a_bad_value_is_one_line_with_its_row(tmp_path: Path, column: str, value: str, message: str) -> None:
    rows = task_shop.events()
    cells = ["" if cell is None else str(cell) for cell in rows[column].to_pylist()]
    cells[0] = value
    rows = rows.set_column(rows.column_names.index(column), column, pa.array(cells))
    mapping = task_shop.write(tmp_path, rows, weight="weight", sampling_rate="rate")
    with pytest.raises(ValueError, match=message) as found:
        prepare(table(mapping), tmp_path / "dataset")
    assert "\n" not in str(found.value)
    policy = BadRows().changed({"nan_label": "drop"})
    dataset = Dataset.open(prepare(table(mapping), tmp_path / "dataset", policy=policy))
    assert dataset.manifest["counts"]["dropped"]["nan_label"] == 1
    assert dataset.manifest["counts"]["events"] == len(rows) - 1
    if column in ("weight", "rate"):
        return
    kept = BadRows().changed({"nan_label": "keep"})
    dataset = Dataset.open(prepare(table(mapping), tmp_path / "kept", policy=kept))
    first = rows.slice(0, 1).to_pylist()[0]
    own = read(dataset)[first["user"], first["item"], first["second"]]
    unknown = (
        own["click"] if column == "click" else own[f"context_{column}" if column == "price" else f"label_{column}"]
    )
    assert np.isnan(unknown), "the event stays, without what is wrong"


def test_rates_that_tell_the_label_are_refused(tmp_path: Path) -> None:
    rows = task_shop.events()
    rate = np.where(rows["click"].to_numpy() == 1, 1.0, 0.25)
    rows = rows.set_column(rows.column_names.index("rate"), "rate", pa.array(rate))
    mapping = task_shop.write(tmp_path, rows, sampling_rate="rate")
    with pytest.raises(ValueError, match=r"sampling_rate is 1 on every positive exposure and below 1 on every other"):
        prepare(table(mapping), tmp_path / "dataset")


def batches(dataset: Dataset, training: bool, **spec: Any) -> list[Any]:
    tasks = ("click", "like", "watch", "stars")
    own = BatchSpec("late", time_depth=0, tasks=tasks, **spec)
    loader = Loader(dataset, Collator(dataset, own, training=training), LoaderSpec("train", 4, 32))
    return list(loader.batches(0))


def test_weights_and_rates_reach_each_task_as_they_should() -> None:
    dataset = task_shop.weighted()
    for training in (True, False):
        for batch in batches(dataset, training):
            weights, labels = batch.task_weights.numpy(), batch.task_labels.numpy()
            assert np.array_equal(np.isnan(labels), weights == 0)
            click, given = batch.labels.numpy(), batch.weights.numpy()
            if not training:  # negatives stand for those that were left out
                assert batch.logit_offset is None and np.isin(given[click == 0], [0.5, 1, 2, 4, 8]).all()
                assert np.array_equal(weights[:, 0], given)
                continue
            rate = np.exp(-batch.logit_offset.numpy())
            assert set(rate.round(6)) <= {0.25, 1.0} and np.isin(given, [0.5, 1, 2]).all()
            assert np.array_equal(weights[:, 0], given), "the first label has the offset instead"
            assert np.array_equal(weights[:, 1], np.where(click == 1, given, 0)), "a like does not depend on the rate"
            assert weights[:, 2] == pytest.approx(np.where(click == 1, given, given / rate))


def test_negatives_are_drawn_by_exposure_and_corrected() -> None:
    dataset = task_shop.dataset()
    whole, drawn = batches(dataset, True), batches(dataset, True, negative_rate=0.5)
    before = sum(int((batch.labels == 0).sum()) for batch in whole)
    after = sum(int((batch.labels == 0).sum()) for batch in drawn)
    positives = [sum(int((batch.labels == 1).sum()) for batch in found) for found in (whole, drawn)]
    assert positives[0] == positives[1] and 0.35 * before < after < 0.65 * before
    assert all((batch.logit_offset == np.float32(np.log(2))).all() for batch in drawn)
    assert sum(batch.item_ids.numel() for batch in drawn) > 0.8 * sum(batch.item_ids.numel() for batch in whole)
    evaluated = batches(dataset, False, negative_rate=0.5)
    assert sum(batch.num_exposures for batch in evaluated) == sum(batch.num_exposures for batch in whole)


def test_a_piece_of_a_user_draws_what_the_whole_user_draws() -> None:
    events = task_shop.dataset().user_events(3)
    piece = fixtures.Piece(**events.columns, user_id=3, first_target=0)
    every, _ = drawn_exposures(piece, 0.5, (0, 1))
    cut, _ = drawn_exposures(piece.cut(5, 20, 5), 0.5, (0, 1))
    assert np.array_equal(cut + 5, every[(every >= 5) & (every < 20)])


def test_columns_that_were_not_read_are_unknown() -> None:
    columns = {column.name: column for column in task_shop.dataset().schema.extra}
    plain, known = Events.at([1, 2]), task_shop.dataset().user_events(1)[:2]
    assert np.isnan(plain.column(columns["label_watch"])).all()
    joined = Events.concat([plain, known])
    assert joined.extra["context_device"].tolist() == [0, 0, *known.extra["context_device"]]
    assert np.isnan(joined.extra["label_watch"][:2]).all()


def test_a_damaged_schema_is_refused(tmp_path: Path) -> None:
    dataset = task_shop.prepared(tmp_path)
    path = dataset.root / "manifest.json"
    text = path.read_text()
    for old, new in (('"given": "click"', '"given": "nothing"'), ('"kind": "binary"', '"kind": 3')):
        path.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=r"manifest\.json is damaged \(event_schema is"):
            Dataset.open(dataset.root)
