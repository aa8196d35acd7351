import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hllm_torchrec.data.predictions import read_predictions
from hllm_torchrec.evaluation.model_comparison import compare, evaluate_files, metrics_table
from hllm_torchrec.evaluation.offline_evaluation import EvaluationSettings
from hllm_torchrec.evaluation.prediction_layout import describe_predictions
from hllm_torchrec.metrics.auc import delong_test, roc_auc
from hllm_torchrec.metrics.bootstrap import percentile_interval, user_bootstrap
from tests.helpers.distributed import run_ranks
from tests.helpers.metric_oracles import ranking_metrics, standard_slices

ROWS = 600


def columns(noise: float = 1.0, seed: int = 0) -> dict[str, Any]:
    """Predictions of a model on 600 exposures of 40 users; only the scores depend on the arguments."""
    random = np.random.default_rng(0)
    labels = (random.random(ROWS) < 0.4).astype(np.float32)
    lengths = random.integers(0, 300, ROWS).astype(np.int32)
    cold = random.random(ROWS) < 0.1
    logits = labels - 0.5 + noise * np.random.default_rng(seed).normal(size=ROWS)
    return {
        "user_id": np.arange(ROWS) % 40 + 1,
        "position": (np.arange(ROWS) // 40).astype(np.int32),
        "item_id": random.integers(1, 100, ROWS),
        "timestamp": np.arange(ROWS),
        "label": labels,
        "score": logits.astype(np.float32),
        "probability": (1 / (1 + np.exp(-logits))).astype(np.float32),
        "history_length": lengths,
        "item_is_cold": cold,
    }


def write(directory: Path, values: dict[str, Any], parts: int = 1) -> Path:
    directory.mkdir()
    rows = pa.table(values)
    size = -(-len(rows) // parts)
    for part in range(parts):
        pq.write_table(rows.slice(part * size, size), directory / f"part-{part:05d}.parquet")
    return directory


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    shuffled = np.random.default_rng(5).permutation(ROWS)
    worse = {name: values[shuffled] for name, values in columns(2.0, seed=1).items()}
    return {
        "hllm": write(tmp_path / "hllm", columns(), parts=3),
        "worse": write(tmp_path / "worse", worse),
        "scores only": write(tmp_path / "scores", columns(3.0, seed=2) | {"probability": pa.nulls(ROWS, pa.float32())}),
    }


def test_metrics_json_holds_what_the_single_functions_say(models: dict[str, Path]) -> None:
    metrics = compare(models, split="valid", draws=100, seed=3)
    reference, worse = columns(), columns(2.0, seed=1)
    slices = standard_slices(reference["history_length"], reference["item_is_cold"])
    draws = user_bootstrap(
        reference["label"], {"a": reference["score"], "b": worse["score"]}, reference["user_id"], 100, seed=3
    )
    own = ranking_metrics(
        reference["label"], reference["score"], reference["probability"], reference["user_id"], slices
    )
    low, high = percentile_interval(draws["a"])
    found, expected = metrics["models"]["hllm"], own | {"bootstrap_low": low, "bootstrap_high": high}
    for name, block in expected.pop("slices").items():
        assert found["slices"][name] == pytest.approx(block), name
    assert {name: found[name] for name in expected} == pytest.approx(expected)  # summed in another order
    test = delong_test(reference["label"], worse["score"], reference["score"])
    bounds = percentile_interval(draws["b"] - draws["a"])
    paired = metrics["paired"]["worse"]
    assert paired["clustered_low"] < paired["difference"] < paired["clustered_high"] < 0
    assert paired["gauc_low"] < paired["gauc_difference"] < paired["gauc_high"] < 0
    assert {
        name: value for name, value in paired.items() if not name.startswith(("clustered", "gauc"))
    } == pytest.approx(
        {
            "difference": test.difference,
            "delong_low": test.low,
            "delong_high": test.high,
            "delong_p": test.p_value,
            "bootstrap_low": bounds[0],
            "bootstrap_high": bounds[1],
        }
    )
    assert metrics["paired"]["worse"]["delong_high"] < 0
    assert set(metrics["paired"]) == {"worse", "scores only"}
    assert (metrics["schema_version"], metrics["split"], metrics["reference"]) == (2, "valid", "hllm")
    assert (metrics["rows"], metrics["users"]) == (ROWS, 40)


def test_the_result_is_valid_json_and_repeats_with_its_seed(models: dict[str, Path]) -> None:
    first, second = (compare(models, draws=50, seed=seed) for seed in (1, 1))
    assert first["memory"].pop("peak") > 0 and second["memory"].pop("peak") > 0  # of the process
    assert json.dumps(first, allow_nan=False) == json.dumps(second, allow_nan=False)
    assert compare(models, draws=50, seed=2)["paired"] != first["paired"]


def test_curves_for_the_report_agree_with_the_metrics(models: dict[str, Path]) -> None:
    metrics = compare(models, draws=10)
    roc = metrics["curves"]["hllm"]["roc"]
    area = np.trapezoid(roc["true_positive_rate"], roc["false_positive_rate"])
    assert area == pytest.approx(roc_auc(columns()["label"], columns()["score"]), abs=2e-3)
    bins = metrics["curves"]["hllm"]["reliability"]
    gaps = abs(np.subtract(bins["observed_rate"], bins["mean_probability"]))
    assert np.average(gaps, weights=bins["rows"]) == pytest.approx(metrics["models"]["hllm"]["ece"], abs=1e-4)
    assert metrics["curves"]["scores only"]["reliability"] is None
    assert metrics["models"]["scores only"]["log_loss"] is None


def test_one_model_alone_has_no_paired_differences(models: dict[str, Path]) -> None:
    metrics = compare({"hllm": models["hllm"]}, draws=10)
    assert metrics["paired"] == {}
    assert "reference" in metrics_table(metrics)


def test_the_table_is_short_and_sorted_by_auc(models: dict[str, Path]) -> None:
    metrics = compare({name: models[name] for name in ("worse", "hllm", "scores only")}, draws=50)
    lines = metrics_table(metrics).splitlines()
    assert lines[0] == "test: 600 exposures of 40 users"
    assert lines[1].split("  ")[0] == "model"
    assert "difference to worse [95% by users]" in lines[1]
    assert [line.split("  ")[0] for line in lines[3:]] == ["hllm", "worse", "scores only"]
    hllm = metrics["models"]["hllm"]
    assert f"{hllm['auc']:.4f} [{hllm['auc_low']:.4f}, {hllm['auc_high']:.4f}]" in lines[3]
    assert f"{metrics['paired']['hllm']['difference']:+.4f} [+" in lines[3]
    assert lines[5].endswith("n/a")


def test_predictions_of_several_files_are_sorted_by_exposure(models: dict[str, Path]) -> None:
    predictions = read_predictions(models["worse"])
    keys = list(zip(predictions.user_id.tolist(), predictions.position.tolist()))
    assert keys == sorted(keys)
    expected = read_predictions(models["hllm"])
    np.testing.assert_array_equal(predictions.item_id, expected.item_id)
    assert predictions.label.dtype == np.float64 and predictions.item_is_cold.dtype == np.bool_


def test_missing_exposures_are_counted_with_an_example(models: dict[str, Path], tmp_path: Path) -> None:
    fewer = write(tmp_path / "fewer", {name: values[3:] for name, values in columns().items()})
    with pytest.raises(
        ValueError,
        match="predictions of 'fewer' miss 3 of the 600 exposures of 'hllm' and have 0 that 'hllm' misses, "
        "for example user_id 1, position 0",
    ):
        compare(models | {"fewer": fewer})
    moved = columns()
    moved["position"] = moved["position"] + (moved["user_id"] == 7)
    other = "'moved' miss 1 of the 600 .* have 1 that 'hllm' misses, .*user_id 7, position 0"
    with pytest.raises(ValueError, match=other):
        compare(models | {"moved": write(tmp_path / "moved", moved)})


@pytest.mark.parametrize("column", ["label", "item_id"])
def test_another_label_or_item_of_an_exposure_is_named(models: dict[str, Path], tmp_path: Path, column: str) -> None:
    other = columns()
    other[column][42] = 1 - other[column][42]
    message = f"part-00000.parquet: row 42: column '{column}' is .*; it differs from the files of 'hllm'; predict with"
    with pytest.raises(ValueError, match=message):
        compare(models | {"other": write(tmp_path / "other", other)})


def test_an_exposure_that_appears_twice_is_named(tmp_path: Path) -> None:
    doubled = {name: np.concatenate([values, values[81:83]]) for name, values in columns().items()}
    directory = write(tmp_path / "doubled", doubled, parts=2)
    message = "part-00001.parquet: row 299: an exposure is repeated, one of 2: user_id 2, position 2; each may appear"
    with pytest.raises(ValueError, match=message):
        compare({"doubled": directory})


def test_a_directory_without_predictions_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere is not a file or a directory with .parquet"):
        compare({"a": tmp_path / "nowhere"})


@pytest.mark.parametrize("name", ["score", "position", "label"])
def test_a_missing_column_is_named_with_its_file(tmp_path: Path, name: str) -> None:
    values = columns()
    del values[name]
    with pytest.raises(ValueError, match=f"no column '{name}'.*; it has user_id, "):
        compare({"a": write(tmp_path / "model", values)})


def test_without_a_column_that_gives_slices_these_are_left_out(tmp_path: Path) -> None:
    values = columns()
    del values["history_length"]
    slices = compare({"a": write(tmp_path / "model", values)}, draws=0)["models"]["a"]["slices"]
    assert "item_cold" in slices and not any(name.startswith("history") for name in slices)


@pytest.mark.parametrize(
    ("name", "said"), [("label", "nan; it must be a number"), ("user_id", "null; it is part of the key")]
)
def test_a_null_is_named_with_file_column_and_row(tmp_path: Path, name: str, said: str) -> None:
    values = pa.array([None if row == 450 else value for row, value in enumerate(columns()[name].tolist())])
    directory = write(tmp_path / "model", columns() | {name: values}, parts=2)
    with pytest.raises(ValueError, match=f"part-00001.parquet: row 150: column '{name}' is {said}"):
        compare({"a": directory})


def test_users_must_be_numbers_or_text(tmp_path: Path) -> None:
    values = columns()
    with pytest.raises(ValueError, match="part-00000.parquet: column 'user_id' is double; it must hold whole numbers"):
        compare({"a": write(tmp_path / "model", values | {"user_id": values["user_id"].astype(float)})})
    texts = [f"user {user:02d}" for user in values["user_id"]]
    named = compare({"a": write(tmp_path / "texts", values | {"user_id": texts})}, draws=0)
    numbered = compare({"a": write(tmp_path / "numbers", values)}, draws=0)
    assert named["models"]["a"]["gauc"] == pytest.approx(numbered["models"]["a"]["gauc"], abs=1e-12)


def test_probabilities_for_some_rows_only_are_refused(tmp_path: Path) -> None:
    some = pa.array([None if row < 5 else 0.5 for row in range(ROWS)], pa.float32())
    with pytest.raises(ValueError, match="part-00000.parquet: row 0: column 'probability' is nan; it must be a number"):
        compare({"a": write(tmp_path / "model", columns() | {"probability": some})})


def test_a_nan_score_stops_the_comparison(tmp_path: Path) -> None:
    values = columns()
    values["score"][0] = np.nan
    with pytest.raises(ValueError, match="part-00000.parquet: row 0: column 'score' is nan"):
        compare({"model": write(tmp_path / "model", values)})


def test_predictions_in_memory_have_all_columns(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no column score; it has user_id"):
        read_predictions(write(tmp_path / "a", {name: v for name, v in columns().items() if name != "score"}))


def on_rank(directories: dict[str, Path], scratch: Path, memory: int) -> dict[str, Any]:
    models, layout = describe_predictions(directories, slices=["country"])
    settings = EvaluationSettings(memory=memory, draws=20, spill=str(scratch))
    try:
        return evaluate_files(models, layout, settings, paired=True, train=[str(directories["hllm"])])[0]
    except ValueError as error:
        return {"error": str(error)}


@pytest.mark.slow
def test_ranks_and_memory_change_nothing(models: dict[str, Path], tmp_path: Path) -> None:
    """Rows of three models in three orders, sent to the rank of their user, on disk and in several buckets."""
    countries = np.random.default_rng(1).choice(["de", "fr"], ROWS)
    with_slices = {"hllm": write(tmp_path / "sliced", columns() | {"country": countries}, parts=3)} | models
    with_slices["hllm"] = tmp_path / "sliced"
    expected = on_rank(with_slices, tmp_path, 1 << 30)
    assert "country=fr" in expected["models"]["worse"]["slices"] and expected["memory"]["spilled"] == 0
    for found in [*run_ranks(on_rank, 2, with_slices, tmp_path, 1 << 16), on_rank(with_slices, tmp_path, 1 << 16)]:
        assert found["memory"]["spilled"] > 0
        for key in ("rows", "users", "exposures", "bootstrap"):
            assert found[key] == expected[key]
        for name, block in expected["models"].items():
            slices, others = (dict(each["models"][name]["slices"]) for each in (expected, found))
            assert others == {key: pytest.approx(value, abs=1e-12) for key, value in slices.items()}
            plain = {key: value for key, value in block.items() if key not in ("slices", "recall_at_precision")}
            assert {key: found["models"][name][key] for key in plain} == pytest.approx(plain, abs=1e-12)
        for name, pair in expected["paired"].items():
            assert found["paired"][name] == pytest.approx(pair, abs=1e-12)


@pytest.mark.slow
def test_exposures_that_one_rank_misses_stop_all(models: dict[str, Path], tmp_path: Path) -> None:
    fewer = write(tmp_path / "fewer", {name: values[3:] for name, values in columns().items()})
    for found in run_ranks(on_rank_without_slices, 2, models | {"fewer": fewer}):
        assert "the predictions of 'fewer' miss" in found and "on rank" in found
    empty = write(tmp_path / "cut", columns())
    (empty / "part-00000.parquet").write_bytes(b"PAR1")
    for found in run_ranks(on_rank_without_slices, 2, models | {"cut": empty}):
        assert "part-00000.parquet cannot be read as Parquet" in found


def on_rank_without_slices(directories: dict[str, Path]) -> str:
    with pytest.raises(ValueError) as raised:
        compare(directories, draws=0)
    return str(raised.value)
