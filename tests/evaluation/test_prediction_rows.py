import csv
import decimal
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hllm_torchrec.common.hashing import hash_columns
from hllm_torchrec.evaluation.prediction_files import (
    RowReader,
    are_absent,
    find_files,
    fingerprint_files,
    identities,
    seconds_of,
)
from hllm_torchrec.evaluation.prediction_layout import ColumnLayout, PredictionModel
from hllm_torchrec.evaluation.prediction_rows import PredictionRows, known_items
from hllm_torchrec.evaluation.row_batch import RowBatch
from hllm_torchrec.metrics.group_auc import NO_USER, ROWS_WITHOUT_USER
from tests.helpers.prediction_rows import ROWS, columns, write_csv, write_parquet

EVERY = ColumnLayout(weight="weight", user="user_id", item="item_id", slices=("country",))
MODEL = ("score", "probability")


def opened(path: Path, scratch: Path, layout: ColumnLayout = EVERY, model: Sequence[str] = MODEL) -> PredictionRows:
    return PredictionRows([PredictionModel("a", (path,), *model)], layout, scratch)


def all_batches(rows: PredictionRows, ranks: int = 1, size: int = 100) -> list[RowBatch]:
    return [read.first for rank in range(ranks) for read in rows.read(rank, ranks, size)]


@pytest.mark.parametrize(("ranks", "size", "files"), [(1, 5000, 1), (3, 64, 2), (7, 333, 5)])
def test_every_row_comes_once_and_in_order(tmp_path: Path, ranks: int, size: int, files: int) -> None:
    rows = opened(write_parquet(columns(), tmp_path / "rows", files=files), tmp_path)
    batches = all_batches(rows, ranks, size)
    assert max(len(batch.is_positive) for batch in batches) <= size
    scores = np.concatenate([batch.scores["a"] for batch in batches])
    np.testing.assert_array_equal(scores, columns()["score"])
    assert scores.dtype == np.float32 and rows.rows == ROWS


def test_csv_rows_are_those_of_parquet(tmp_path: Path) -> None:
    (one,) = all_batches(opened(write_csv(columns(), tmp_path / "a.csv"), tmp_path), size=ROWS)
    (other,) = all_batches(opened(write_parquet(columns(), tmp_path / "a"), tmp_path), size=ROWS)
    np.testing.assert_array_equal(one.is_positive, other.is_positive)
    np.testing.assert_array_equal(one.weights, other.weights)
    assert one.scores["a"] == pytest.approx(other.scores["a"], abs=1e-6)
    np.testing.assert_array_equal(one.users, other.users)
    np.testing.assert_array_equal(one.keys, other.keys)
    assert sorted(one.slices[0][0]) == sorted(other.slices[0][0]) == ["country=de", "country=fr", "country=it"]


BAD = {
    "score": (math.nan, r"row 7.*: column 'score' is nan; it must be a number \(infinities are allowed"),
    "label": (0.5, "row 7.*: column 'label' is 0.5; a label is 0 or 1"),
    "weight": (-1.0, r"row 7.*: column 'weight' is -1; a weight is 0 \(the row is skipped\) or lies in"),
    "probability": (1.5, "row 7.*: column 'probability' is 1.5; a probability lies in 0..1"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_value_is_named_with_file_and_row(tmp_path: Path, name: str) -> None:
    value, message = BAD[name]
    values = columns()
    values[name] = values[name].astype(np.float64)
    values[name][607] = value  # row 7 of the second of two files
    folder = write_parquet(values, tmp_path / "rows", files=2)
    with pytest.raises(ValueError, match=f"^{folder}/1.parquet: {message}"):
        all_batches(opened(folder, tmp_path), ranks=3)
    file = write_csv({column: entries[600:] for column, entries in values.items()}, tmp_path / "rows.csv")
    with pytest.raises(ValueError, match=rf"^{file}: {message}".replace("row 7", r"row 7 \(line 9\)")):
        all_batches(opened(file, tmp_path))


def test_a_null_is_named_with_file_and_row(tmp_path: Path) -> None:
    values: dict[str, Any] = columns(30)
    values["score"] = pa.array([None if row == 12 else 0.5 for row in range(30)], pa.float32())
    with pytest.raises(ValueError, match="0.parquet: row 12: column 'score' is nan"):
        all_batches(opened(write_parquet(values, tmp_path / "rows"), tmp_path))


def test_infinite_and_denormal_scores_are_rows_like_any_other(tmp_path: Path) -> None:
    values = columns(6) | {"score": np.array([np.inf, -np.inf, 1e-45, -1e-45, 0.0, -0.0], np.float32)}
    (batch,) = all_batches(opened(write_parquet(values, tmp_path / "rows"), tmp_path))
    assert batch.scores["a"].tolist() == values["score"].tolist() and batch.scores["a"][2] > 0


def test_items_that_training_does_not_know_are_cold(tmp_path: Path) -> None:
    rows = columns(200)
    train = write_csv({"item_id": rows["item_id"][:30]}, tmp_path / "train.csv")
    warm = known_items([train], "item_id", tmp_path)
    assert warm.tolist() == sorted(set(rows["item_id"][:30].tolist()))
    layout = ColumnLayout(item="item_id")
    found = PredictionRows([PredictionModel("a", (write_parquet(rows, tmp_path / "rows"),))], layout, tmp_path, warm)
    (batch,) = all_batches(found, size=200)
    (names, codes) = batch.slices[0]
    assert names == ["item_cold", "item_warm"]
    np.testing.assert_array_equal(codes == 0, ~np.isin(rows["item_id"], rows["item_id"][:30]))


def test_items_are_sliced_by_their_training_events(tmp_path: Path) -> None:
    rows = columns(200)
    counts = np.arange(int(rows["item_id"].max()) + 1) % 30
    path = write_parquet(rows, tmp_path / "rows")
    layout = ColumnLayout(item="item_id")
    found = PredictionRows([PredictionModel("a", (path,))], layout, tmp_path, item_events=counts)
    ((names, codes),) = all_batches(found, size=200)[0].slices
    assert names == ["item_events_0", "item_events_1-5", "item_events_6-20", "item_events_21+"]
    of_rows = counts[rows["item_id"]]
    for code, (low, high) in enumerate([(0, 0), (1, 5), (6, 20), (21, 30)]):
        np.testing.assert_array_equal(codes == code, (of_rows >= low) & (of_rows <= high))


def test_a_null_flag_is_named(tmp_path: Path) -> None:
    values = columns(20) | {"item_is_cold": pa.array([True] * 19 + [None])}
    rows = opened(write_parquet(values, tmp_path / "rows"), tmp_path, ColumnLayout(item_is_cold="item_is_cold"))
    with pytest.raises(ValueError, match="0.parquet: row 19: column 'item_is_cold' is nan; write true or false"):
        all_batches(rows)


def test_models_must_have_the_same_rows(tmp_path: Path) -> None:
    rows = columns(50)
    a = write_parquet(rows, tmp_path / "a")
    shorter = write_parquet({name: values[:49] for name, values in rows.items()}, tmp_path / "shorter")
    models = [PredictionModel("a", (a,)), PredictionModel("b", (shorter,))]
    with pytest.raises(ValueError, match="'b' has 49 rows, 'a' 50; models are compared row by row"):
        PredictionRows(models, ColumnLayout(), tmp_path)
    rows["label"][20] = 1 - rows["label"][20]
    other = write_parquet(rows, tmp_path / "other")
    with pytest.raises(ValueError, match="other/0.parquet: row 20: column 'label' is .; it differs from the files"):
        all_batches(
            PredictionRows([PredictionModel("a", (a,)), PredictionModel("b", (other,))], ColumnLayout(), tmp_path)
        )


@pytest.mark.parametrize("column", ["user_id", "item_id"])
@pytest.mark.parametrize("as_text", [False, True])
def test_models_must_have_the_same_ids_in_each_row(column: str, as_text: bool, tmp_path: Path) -> None:
    def both() -> PredictionRows:
        other = {**values, column: values[column].astype(str)} if as_text else values
        files = write_parquet(columns(), tmp_path / "a"), write_parquet(other, tmp_path / "b", files=2)
        models = [PredictionModel(name, (file,)) for name, file in zip("ab", files)]
        return PredictionRows(models, ColumnLayout(user="user_id", item="item_id"), tmp_path)

    values = columns()
    assert sum(len(batch.keys) for batch in all_batches(both())) == ROWS
    values[column][900] += 1
    message = rf"b/1\.parquet: row 300: column '{column}' is .*, not .*; it differs from the files of 'a'; "
    with pytest.raises(ValueError, match=message):
        all_batches(both())


@pytest.mark.parametrize("kind", [np.int8, np.int32, np.int64, np.uint64, np.float16, np.float32, np.float64, bool])
def test_scores_of_every_type_keep_their_order(kind: type, tmp_path: Path) -> None:
    values = columns()
    values["score"] = (np.arange(ROWS) % 97 - (0 if kind in (np.uint64, bool) else 48)).astype(kind)
    if kind in (np.int64, np.uint64, np.float64):
        values["score"][0] = 2**53 - 1
    read = np.concatenate([b.scores["a"] for b in all_batches(opened(write_parquet(values, tmp_path / "a"), tmp_path))])
    np.testing.assert_array_equal(np.argsort(read, kind="stable"), np.argsort(values["score"], kind="stable"))


@pytest.mark.parametrize("low", [-(2**63), -(2**53) - 3, 2**53, 2**60 + 1, 2**63 - ROWS, 2**64 - ROWS])
@pytest.mark.parametrize("is_csv", [False, True])
def test_whole_scores_of_64_bits_keep_their_order(low: int, is_csv: bool, tmp_path: Path) -> None:
    values, order = columns(), np.random.default_rng(0).permutation(ROWS)
    exact = [low + int(place) for place in order]
    values["score"] = np.array(exact, np.uint64 if low + ROWS > 2**63 else np.int64)
    path = write_csv(values, tmp_path / "a.csv") if is_csv else write_parquet(values, tmp_path / "a")
    read = np.concatenate([batch.scores["a"] for batch in all_batches(opened(path, tmp_path))])
    assert read.dtype == np.int64
    np.testing.assert_array_equal(np.argsort(read), np.argsort(order))


def test_decimals_keep_their_order_or_are_refused(tmp_path: Path) -> None:
    digits = [1, 3, 2, -5]
    scores = [decimal.Decimal(f"0.{10**17 + digit:018}") for digit in digits]  # equal as float64
    for number, (part, kind) in enumerate([(scores[:2], pa.decimal128(38, 18)), (scores[2:], pa.decimal128(20, 19))]):
        rows = {"label": [0.0, 1.0], "score": pa.array(part, kind)}
        pq.write_table(pa.table(rows), tmp_path / f"{number}.parquet")
    (batch,) = all_batches(opened(tmp_path, tmp_path, ColumnLayout(), ("score", None)))
    assert np.argsort(batch.scores["a"]).tolist() == np.argsort(digits).tolist()
    pq.write_table(
        pa.table({"label": [0.0, 1.0], "score": pa.array([1, 10], pa.decimal128(38, 18))}), tmp_path / "1.parquet"
    )
    with pytest.raises(ValueError, match=r"column 'score' .* beyond 64 bits.*write it as float64"):
        all_batches(opened(tmp_path, tmp_path, ColumnLayout(), ("score", None)))


def test_whole_scores_that_fractions_round_are_named(tmp_path: Path) -> None:
    values = columns()
    values["score"] = np.array(["0.5"] * ROWS, object)
    values["score"][7] = str(2**60 + 1)
    with pytest.raises(ValueError, match=r"row 7.*: column 'score' is .*with fractions, whole numbers from 2\^53"):
        all_batches(opened(write_csv(values, tmp_path / "a.csv"), tmp_path))


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_text_files_are_read_in_the_dialects_of_tables(separator: str, tmp_path: Path) -> None:
    rows = [("label", "score", "user_id"), ("1", "0.5", f"a{separator}b"), ("0", "0.25", "007"), ("1", "", "c")]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-16") as file:
        csv.writer(file, delimiter=separator).writerows(rows)
    reader = RowReader([tmp_path / "a.csv"], ["label", "score", "user_id"], tmp_path, ["score"])
    (table,) = reader.batches(0, reader.rows, 100)
    assert table.to_pydict() == {
        "label": [1, 0, 1],
        "score": [0.5, 0.25, None],
        "user_id": [f"a{separator}b", "007", "c"],
    }


def test_numbered_files_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        (tmp_path / f"q-{number}.csv").write_text("label,score\n1,.5\n")
    for paths in ([tmp_path], [tmp_path / "q-*.csv"]):
        assert [path.name for path in find_files(paths)] == ["q-1.csv", "q-2.csv", "q-10.csv"]


def test_files_and_columns_that_are_not_there_are_named(tmp_path: Path) -> None:
    folder = write_parquet(columns(10), tmp_path / "rows")
    with pytest.raises(ValueError, match=r"0.parquet has no column 'scor' \(did you mean 'score'\?\); it has label"):
        PredictionRows([PredictionModel("a", (folder,), "scor")], ColumnLayout(), tmp_path)
    with pytest.raises(ValueError, match=r"column 'country' is string; it must hold numbers"):
        all_batches(PredictionRows([PredictionModel("a", (folder,), "country")], ColumnLayout(), tmp_path))
    with pytest.raises(ValueError, match="nowhere is not a file or a directory with .parquet, .csv"):
        find_files([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match=r"those in its subfolders are read by a pattern: '.*/\*/\*\.parquet'"):
        find_files([tmp_path])
    (tmp_path / "rows[1]").mkdir()  # no pattern: it exists
    odd = write_parquet(columns(10), tmp_path / "rows[1]")
    assert find_files([odd]) == sorted(odd.iterdir())
    with pytest.raises(ValueError, match="matches no file"):
        find_files([tmp_path / "*.csv"])
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="notes.txt is not of a kind that can be read"):
        find_files([tmp_path / "notes.txt"])
    (tmp_path / "broken.parquet").write_text("x")
    with pytest.raises(ValueError, match="broken.parquet cannot be read as Parquet"):
        RowReader([tmp_path / "broken.parquet"], ["score"], tmp_path)
    (tmp_path / "text.csv").write_text("label,score\n1,0.5\n0,high\n")
    with pytest.raises(ValueError, match="(?s)text.csv cannot be read as CSV: .*'high'"):
        PredictionRows([PredictionModel("a", (tmp_path / "text.csv",))], ColumnLayout(), tmp_path)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        (
            "timestamp",
            np.full(40, 1_700_000_000_000),
            r"row 0: column 'timestamp' is 1\.7e\+12; .*looks like milliseconds; give seconds",
        ),
        ("timestamp", np.full(40, -5), r"row 0: column 'timestamp' is -5; .*outside 1970.*--timestamp NONE"),
        ("timestamp", np.full(40, np.inf, np.float16), r"row 0: column 'timestamp' is inf; .*--timestamp NONE"),
        ("timestamp", np.full(40, np.inf), r"row 0: column 'timestamp' is inf; .*--timestamp NONE"),
        ("label", np.full(40, 0.5), r"row 0: column 'label' is 0\.5; a label is 0 or 1; remove the row"),
        ("label", np.full(40, np.nan), r"row 0: column 'label' is nan; it must be a number"),
        ("item_is_cold", np.full(40, "maybe"), r"row 0: column 'item_is_cold' is nan; write true or false"),
        ("user_id", [[1]] * 40, r"column 'user_id' of .*0\.parquet cannot be read .*it must hold numbers or text"),
    ],
)
def test_what_a_column_may_not_hold_is_named(column: str, values: Any, message: str, tmp_path: Path) -> None:
    folder = write_parquet(columns(40) | {column: values}, tmp_path / "rows")
    layout = ColumnLayout(user="user_id", timestamp="timestamp", item_is_cold="item_is_cold")
    with pytest.raises(ValueError, match=message):
        all_batches(PredictionRows([PredictionModel("a", (folder,))], layout, tmp_path))


@pytest.mark.parametrize(
    ("values", "column", "message"),
    [
        ([{"a": 1}], "x", "column 'x' of .* its values must be numbers or text"),
        ([[1]], "x", "column 'x' of .* its values must be numbers or text"),
        ([1], "", "has no column ''; it has label"),
        ([1], "label", "has 2 columns 'label': remove or rename all but one"),
    ],
)
def test_slices_of_odd_columns_are_named(values: list[Any], column: str, message: str, tmp_path: Path) -> None:
    name = column or "other"
    table = pa.table([pa.array([0.0, 1.0]), pa.array([0.0, 1.0]), pa.array(values * 2)], ["label", "score", name])
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=message):
        all_batches(opened(tmp_path / "rows.parquet", tmp_path, ColumnLayout(slices=(column,)), ("score",)))


def test_a_column_of_many_values_makes_no_slices(tmp_path: Path) -> None:
    from hllm_torchrec.evaluation.offline_evaluation import EvaluationSettings, evaluate_predictions

    rows = columns(500) | {"country": np.arange(500).astype(str)}
    folder = write_parquet(rows, tmp_path / "rows")
    with pytest.raises(ValueError, match="the column of 'country' has more than 400 values"):
        evaluate_predictions(opened(folder, tmp_path), EvaluationSettings())


def test_predictions_of_years_have_no_slices_by_day(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hllm_torchrec.evaluation.offline_evaluation import EvaluationSettings, evaluate_predictions

    rows = columns(500) | {"timestamp": 1_000_000_000 + 86_400 * np.arange(500)}
    folder = write_parquet(rows, tmp_path / "rows")
    metrics = evaluate_predictions(
        opened(folder, tmp_path, replace(EVERY, timestamp="timestamp")), EvaluationSettings()
    )
    slices = next(iter(metrics["models"].values()))["slices"]
    assert any(name.startswith("hour_") for name in slices) and not any(name.startswith("day_") for name in slices)
    assert "caution: more than 400 days: there are no slices by day" in capsys.readouterr().out


def test_settings_out_of_range_are_named(tmp_path: Path) -> None:
    from hllm_torchrec.evaluation.offline_evaluation import EvaluationSettings, evaluate_predictions

    rows = opened(write_parquet(columns(10), tmp_path / "rows"), tmp_path)
    with pytest.raises(ValueError, match="memory is 1000 bytes; at least 65536 are needed"):
        evaluate_predictions(rows, EvaluationSettings(memory=1000))
    with pytest.raises(ValueError, match="draws is -2; 0 for no bootstrap"):
        evaluate_predictions(rows, EvaluationSettings(draws=-2))


def test_categories_nulls_half_floats_and_time_zones_are_read(tmp_path: Path) -> None:
    for part in range(2):
        values: dict[str, Any] = columns(40, seed=part)
        category = [None, "x", "y"][part:] * 20
        values["country"] = pa.array(category[:40], pa.string()).dictionary_encode()
        values["user_id"] = pa.array([f"u{user}" for user in values["user_id"]]).dictionary_encode()
        values["score"] = values["score"].astype(np.float16)
        values["label"] = values["label"] == 1
        values["timestamp"] = pa.array(values["timestamp"] * 1000, pa.timestamp("ms", "Europe/Berlin"))
        write_parquet(values, tmp_path / "parts" / str(part), row_group=7)
    layout = ColumnLayout(user="user_id", timestamp="timestamp", slices=("country",))
    rows = PredictionRows(
        [PredictionModel("a", (tmp_path / "parts" / "0", tmp_path / "parts" / "1"))], layout, tmp_path
    )
    sizes: dict[str, int] = {}
    for batch in all_batches(rows, ranks=2, size=9):
        assert batch.scores["a"].dtype == np.float32 and batch.is_positive.dtype == bool
        names, codes = batch.slices[-1]
        for name, count in zip(names, np.bincount(codes, minlength=len(names))):
            sizes[name] = sizes.get(name, 0) + int(count)
        assert batch.slices[0][0][0].startswith("day_2023-11-1")
    assert sizes == {"country=None": 14, "country=x": 33, "country=y": 33}


def test_ids_of_any_kind_become_integers() -> None:
    assert identities(pa.chunked_array([[3, 3, 7]])).tolist() == [3, 3, 7]
    words = identities(pa.chunked_array([["a", "b"], ["a"]]))
    assert words[0] == words[2] != words[1]
    assert identities(pa.chunked_array([["-12", "0", "7"]])).tolist() == [-12, 0, 7]
    assert len(set(identities(pa.chunked_array([["7", "07", "7.0", "99999999999999999999"]])).tolist())) == 4
    mixed = hash_columns(np.array([1, 1, 2]), np.array([5, 6, 5]))
    assert len(set(mixed.tolist())) == 3 and hash_columns(np.array([2]), np.array([5]))[0] == mixed[2]


def test_integers_of_64_bits_are_equal_in_every_type_and_never_rows_without_a_user() -> None:
    numbers = [2**63 - 1, -(2**63), -(2**63) + 5, 2**60 + 1]
    found = identities(pa.chunked_array([numbers])).tolist()
    assert found == identities(pa.chunked_array([[str(number) for number in numbers]])).tolist()
    assert len(set(found)) == 4 and min(found) >= NO_USER + ROWS_WITHOUT_USER
    large = [2**63, 2**64 - 1]
    unsigned = identities(pa.chunked_array([pa.array(large, pa.uint64())])).tolist()
    assert unsigned == identities(pa.chunked_array([[str(number) for number in large]])).tolist()
    assert min(unsigned) >= NO_USER + ROWS_WITHOUT_USER


@pytest.mark.parametrize(
    "values",
    [
        pa.array(["a", None, "nan", "None", " ", "", "NaN"]),
        pa.array(["a", None, "nan", "None", " ", "", "NaN"]).dictionary_encode(),
        pa.array([1.0, None, float("nan")]),
        pa.array([1, None]),
    ],
)
def test_words_for_a_missing_value_are_no_user(values: pa.Array) -> None:
    assert are_absent(pa.chunked_array([values])).tolist() == [False] + [True] * (len(values) - 1)


def test_ids_that_were_rounded_are_refused(tmp_path: Path) -> None:
    rows = columns(20)
    for user, message in (("9.78014E+12", "scientific notation"), (np.float32(2**24 + 2), "rounds whole numbers")):
        rows["user_id"] = np.array([user] * 20)
        path = write_parquet(rows, tmp_path / "rows")
        with pytest.raises(ValueError, match=f"column 'user_id' of .*{message}"):
            all_batches(opened(path, tmp_path))


def test_labels_in_words_are_read_as_numbers(tmp_path: Path) -> None:
    rows = columns(20)
    rows["label"] = rows["label"] == 1
    (batch,) = all_batches(opened(write_csv(rows, tmp_path / "a.csv"), tmp_path))
    assert "true" in (tmp_path / "a.csv").read_text()
    np.testing.assert_array_equal(batch.is_positive, rows["label"])


def test_arrow_timestamps_are_seconds() -> None:
    times = pa.chunked_array([pa.array([1_700_000_000_123], pa.timestamp("ms"))])
    assert seconds_of(times).tolist() == [1_700_000_000]


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    one, two = (write_csv(columns(20), tmp_path / name) for name in ("1.csv", "2.csv"))
    assert fingerprint_files([one]) == fingerprint_files([two]) and len(fingerprint_files([one])) == 16
    assert fingerprint_files([write_csv(columns(21), tmp_path / "3.csv")]) != fingerprint_files([one])
