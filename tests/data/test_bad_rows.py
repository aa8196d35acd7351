import pytest

from hllm_torchrec.data.bad_rows import BadRows
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.prepare import prepare
from tests.helpers.source_files import ITEMS, memory_source, oracle, sequences

GOOD = [(f"u{n % 3}", f"i{n}", 5, 1000 + n) for n in range(12)]
BAD = {
    "missing_id": ([("", "i1", 5, 5)], r"events\.csv, row 13: the user id or the item id is missing"),
    "nan_label": (
        [("u1", "i1", float("nan"), 5)],
        r"events\.csv, row 13: the label \(rating >= 4\) is not a number",
    ),
    "bad_time": ([("u1", "i1", 5, -1)], r"events\.csv, row 13: the time '-1' \(second -1\) is outside 1970"),
    "unknown_item": ([("u1", "new", 5, 5)], r"events\.csv, row 13: item 'new' is not in the item file"),
    "duplicate_event": (
        [("u1", "i1", 5, 5), ("u1", "i1", 3, 5)],
        r"events\.csv, row 14: user u1 has this item in",
    ),
}


def bad_source(folder, reason):
    return memory_source(folder, [*GOOD, *BAD[reason][0]], ITEMS)


@pytest.mark.parametrize("reason", BAD)
@pytest.mark.parametrize("partitions", [1, 4])
def test_a_bad_row_is_an_error_with_file_row_and_remedy_and_leaves_nothing(tmp_path, reason, partitions):
    source = bad_source(tmp_path, reason)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=BAD[reason][1]) as error:
        prepare(source, tmp_path / "out", policy=BadRows(**{reason: "error"}), partitions=partitions)
    assert f"--bad-rows {reason}=drop" in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_row_is_dropped_and_counted(tmp_path, reason):
    policy = BadRows(**{reason: "drop"})
    path = prepare(bad_source(tmp_path, reason), tmp_path / "out", split="leave_one_out", policy=policy)
    dataset = Dataset.open(path)
    assert dataset.manifest["counts"]["dropped"] == {reason: 1}
    assert dataset.manifest["counts"]["kept"] == {}
    extra = [BAD[reason][0][0]] if reason == "duplicate_event" else []
    assert sequences(dataset, "test") == oracle([*GOOD, *extra], "leave_one_out")["test"], "the first one stays"


@pytest.mark.parametrize("reason", ["nan_label", "unknown_item", "duplicate_event"])
def test_a_bad_row_is_kept_and_counted(tmp_path, reason):
    policy = BadRows(**{reason: "keep"})
    path = prepare(bad_source(tmp_path, reason), tmp_path / "out", split="leave_one_out", policy=policy)
    dataset = Dataset.open(path)
    assert dataset.manifest["counts"]["kept"] == {reason: 1}
    assert dataset.manifest["counts"]["events"] == len(GOOD) + len(BAD[reason][0])
    _, history = sequences(dataset, "test")["u1"]
    if reason == "nan_label":
        assert history[0][2] is None
        assert dataset.manifest["counts"]["exposures"] == len(GOOD)
    if reason == "unknown_item":
        assert history[0][0] == "new"
        assert dataset.items.to_pylist()[-1] == {"item_id": 16, "raw_item_id": "new", "title": ""}


def test_times_in_other_units_are_named(tmp_path):
    for power, unit in ((3, "milliseconds"), (6, "microseconds"), (9, "nanoseconds")):
        source = memory_source(tmp_path, [*GOOD, ("u1", "i1", 5, 1_700_000_000 * 10**power)], ITEMS)
        with pytest.raises(ValueError, match=rf"row 13: the time .* beyond 2099 .* it looks like {unit}"):
            prepare(source, tmp_path / "out")


def test_an_unknown_item_of_zeros_alone_is_named(tmp_path):
    for item in ("0", "000", ".0"):
        source = memory_source(tmp_path, [*GOOD, ("u1", item, 5, 99)], ITEMS)
        with pytest.raises(ValueError, match=rf"row 13: item '{item}' is not in the item file"):
            prepare(source, tmp_path / "out")


def test_a_long_cell_is_cut_in_messages(tmp_path):
    source = memory_source(tmp_path, [*GOOD, ("u1", "x" * 100_000, 5, 99)], ITEMS)
    with pytest.raises(ValueError, match=r"row 13: item 'xxx.*\.\.\. is not in the item file") as found:
        prepare(source, tmp_path / "out")
    assert len(str(found.value)) < 1_000


def item_source(folder, pairs):
    return memory_source(folder, [(f"u{n % 3}", f"i{n % 3}", 5, n) for n in range(30)], pairs)


def test_a_repeated_item_with_another_text_is_an_error_or_dropped(tmp_path):
    rows = [("i0", "a"), ("i1", "b"), ("i2", "c"), ("i1", "b"), ("i1", "other")]
    with pytest.raises(ValueError, match=r"items\.csv, row 5: item 'i1' came before with another text"):
        prepare(item_source(tmp_path, rows), tmp_path / "out")
    path = prepare(item_source(tmp_path, rows), tmp_path / "out", policy=BadRows(duplicate_item="drop"))
    assert Dataset.open(path).items["title"].to_pylist() == ["a", "b", "c"]
    assert Dataset.open(path).manifest["counts"]["dropped"] == {"duplicate_item": 1, "repeated_item_row": 1}


def test_an_item_without_text_is_an_error_kept_or_dropped_with_its_events(tmp_path):
    rows = [("i0", "a"), ("i1", " "), ("i2", None), ("i3", "d")]
    source = item_source(tmp_path, rows)
    with pytest.raises(ValueError, match=r"items\.csv, row 2: item 'i1' has no text in \('title',\)"):
        prepare(source, tmp_path / "out", policy=BadRows(item_without_text="error"))
    kept = Dataset.open(prepare(source, tmp_path / "kept", policy=BadRows(largest_share=0.5)))
    assert kept.items["title"].to_pylist() == ["a", "", "", "d"]
    assert kept.manifest["counts"]["kept"] == {"item_without_text": 2}
    dropped = Dataset.open(
        prepare(source, tmp_path / "out", policy=BadRows(item_without_text="drop", largest_share=1.0))
    )
    assert dropped.items["raw_item_id"].to_pylist() == ["i0", "i3"]
    assert dropped.manifest["counts"]["dropped"] == {"event_of_dropped_item": 20, "item_without_text": 2}
    assert dropped.manifest["counts"]["events"] == 10


def test_too_many_events_of_dropped_items_name_the_only_remedy_that_there_is(tmp_path):
    policy = BadRows().changed({"item_without_text": "drop"}, chosen=True)
    with pytest.raises(ValueError, match=r"event_of_dropped_item: 20 of 30 rows .*, allow a larger share") as error:
        prepare(item_source(tmp_path, [("i0", "a"), ("i1", ""), ("i2", "")]), tmp_path / "out", policy=policy)
    assert "in the mapping" not in str(error.value)


def test_an_item_without_id_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"items\.csv, row 2: the item id is missing"):
        prepare(item_source(tmp_path, [("i0", "a"), (None, "b")]), tmp_path / "out")


def test_an_unknown_policy_is_an_error():
    with pytest.raises(ValueError, match=r"policy bad_time='keep': choose one of error, drop"):
        BadRows(bad_time="keep")
