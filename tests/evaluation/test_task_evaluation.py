"""All label columns of predictions are evaluated in one reading of the rows, each as if it were evaluated alone."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hllm_torchrec.evaluation.model_comparison import evaluate_files
from hllm_torchrec.evaluation.offline_evaluation import EvaluationSettings
from hllm_torchrec.evaluation.prediction_layout import describe_predictions
from hllm_torchrec.metrics.number_metrics import number_metrics
from tests.helpers.distributed import run_ranks
from tests.helpers.prediction_rows import ROWS, columns, write_csv, write_parquet

BINARY = tuple(f"t{number}" for number in range(5))
NUMBERS = ("watch", "price")
MEANS = ("mae", "rmse", "mean_label", "mean_prediction")
TINY = 1 << 18
"""Bytes: far less than the rows need."""
METRICS = ("auc", "auc_se", "clustered_se", "gauc", "log_loss", "calibration", "ece", "pr_auc")


def predictions(seed: int) -> dict[str, Any]:
    """Two models' rows differ by their seed, in scores only; five binary tasks and two numbers, each with its mask."""
    shared, own = np.random.default_rng(7), np.random.default_rng(seed)
    rows = columns() | {"weight": shared.choice([0.0, 0.25, 1.0, 3.0], ROWS)}
    rows["position"] = np.array(
        [int((rows["user_id"][:row] == user).sum()) for row, user in enumerate(rows["user_id"])]
    )
    rows["score"] = rows["score"] + own.normal(size=ROWS).round(1).astype(np.float32)
    del rows["other"], rows["probability"]
    for place, task in enumerate(BINARY):
        label = (shared.random(ROWS) < 0.4).astype(np.float32)
        label[rows["label"] == 0 if place % 2 else shared.random(ROWS) < 0.3] = np.nan
        score = (own.normal(size=ROWS) + np.nan_to_num(label)).round(2).astype(np.float32)
        rows |= {f"label_{task}": label, f"score_{task}": score, f"probability_{task}": 1 / (1 + np.exp(-score))}
    for task in NUMBERS:
        seconds = shared.integers(0, 30, ROWS).astype(np.float64)
        seconds[shared.random(ROWS) < 0.2] = np.nan
        found = np.nan_to_num(seconds) + own.normal(size=ROWS).round(1)
        rows |= {f"label_{task}": seconds, f"score_{task}": found, f"prediction_{task}": found}
    return rows


def of_one(rows: dict[str, Any], task: str) -> dict[str, Any]:
    """The rows of a binary task as those of a first label."""
    defined = ~np.isnan(rows[f"label_{task}"])
    shared = [name for name in rows if not name.endswith(tuple(f"_{one}" for one in (*BINARY, *NUMBERS)))]
    named = {name: rows[name] for name in shared}
    named |= {name: rows[f"{name}_{task}"] for name in ("label", "score", "probability")}
    return {name: values[defined] for name, values in named.items()}


def evaluate(paths: dict[str, Path], paired: bool, weighted: bool = True, **settings: Any) -> dict[str, Any]:
    off = {"timestamp": "NONE"} | ({} if weighted else {"weight": "NONE"})
    models, layout = describe_predictions(paths, columns=off, slices=["country"])
    return evaluate_files(models, layout, EvaluationSettings(**settings), paired=paired)[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("predictions")
    return {name: write_parquet(predictions(seed), root / name, files=2) for seed, name in enumerate("ab")}


@pytest.fixture
def rows_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Number of rows of each record batch that is decoded."""
    read, decode = [], pq.ParquetFile.iter_batches

    def counted(self: pq.ParquetFile, *args: Any, **kwargs: Any) -> Iterator[pa.RecordBatch]:
        for batch in decode(self, *args, **kwargs):
            read.append(len(batch))
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    yield read


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_eight_label_columns_are_evaluated_in_one_pass_as_if_each_were_alone(
    folders: dict[str, Path], tmp_path: Path, rows_read: list[int], paired: bool, weighted: bool
) -> None:
    found = evaluate(folders, paired, weighted)
    assert sum(rows_read) == 2 * ROWS  # the rows of two models, each once
    every = {name: predictions(seed) for seed, name in enumerate("ab")}
    for task in BINARY:
        alone = {name: write_parquet(of_one(rows, task), tmp_path / task / name) for name, rows in every.items()}
        expected, own = evaluate(alone, paired, weighted), found["tasks"][task]
        assert {key: own[key] for key in ("rows", "users", "reference", "weighted", "models", "paired")} == {
            key: expected[key] for key in ("rows", "users", "reference", "weighted", "models", "paired")
        }  # to the last bit
        assert math.isfinite(own["models"]["b"]["gauc"]) and "country=de" in own["models"]["a"]["slices"]
    for task in NUMBERS:
        label, weight = every["a"][f"label_{task}"], every["a"]["weight"] if weighted else np.ones(ROWS)
        kept = ~np.isnan(label) & (weight > 0)
        for name, rows in every.items():
            numbers = number_metrics(label[kept], rows[f"prediction_{task}"][kept], weight[kept])
            assert found["tasks"][task]["models"][name] == pytest.approx(numbers, rel=1e-12)
    first = {
        name: write_parquet({key: rows[key] for key in rows if "_t" not in key and "watch" not in key}, tmp_path / name)
        for name, rows in every.items()
    }
    assert evaluate(first, paired, weighted)["models"] == found["models"]


def test_what_does_not_fit_is_read_again_from_where_it_was_spilled(
    folders: dict[str, Path], tmp_path: Path, rows_read: list[int]
) -> None:
    (tmp_path / "spill").mkdir()
    found = evaluate(folders, True, memory=TINY, spill=str(tmp_path / "spill"))
    assert sum(rows_read) == 2 * ROWS and found["memory"]["spilled"] > 0
    assert list((tmp_path / "spill").iterdir()) == []
    expected = evaluate(folders, True)
    for task in BINARY:
        own, other = (one["tasks"][task]["models"]["b"] for one in (found, expected))
        assert [own[key] for key in METRICS] == pytest.approx([other[key] for key in METRICS], rel=1e-12)
        assert own["slices"]["country=fr"]["auc"] == pytest.approx(other["slices"]["country=fr"]["auc"], rel=1e-12)
    watch, other = (one["tasks"]["watch"]["models"]["a"] for one in (found, expected))
    assert watch == pytest.approx(other, rel=1e-12)


def evaluate_on_ranks(folders: dict[str, Path], memory: int = 1 << 30) -> dict[str, Any]:
    no_slices = dict.fromkeys(("timestamp", "history_length", "item_is_cold"), "NONE")
    models, layout = describe_predictions(folders, columns=no_slices)
    return evaluate_files(models, layout, EvaluationSettings(memory=memory), paired=True)[0]


@pytest.mark.slow
def test_ranks_agree_and_read_each_row_once_between_them(folders: dict[str, Path], tmp_path: Path) -> None:
    one, two = run_ranks(evaluate_on_ranks, 2, folders)
    assert one == two
    expected = evaluate(folders, True)
    for task in BINARY:
        assert one["tasks"][task]["paired"]["b"]["clustered_low"] == pytest.approx(
            expected["tasks"][task]["paired"]["b"]["clustered_low"], abs=1e-12
        )
    assert one["tasks"]["watch"]["models"]["a"]["xauc"] == pytest.approx(
        expected["tasks"]["watch"]["models"]["a"]["xauc"], abs=1e-12
    )


@pytest.mark.slow
def test_numbers_of_more_rows_than_fit_are_ranked_on_a_sample(folders: dict[str, Path]) -> None:
    few, every = (evaluate_on_ranks(folders, memory)["tasks"]["watch"] for memory in (1 << 16, 1 << 30))
    assert few["rows"] == every["rows"] > 700 and 200 < few["rows_ranked"] <= 512 and "rows_ranked" not in every
    for name in "ab":
        own, whole = few["models"][name], every["models"][name]
        assert [own[key] for key in MEANS] == pytest.approx([whole[key] for key in MEANS], rel=1e-12)
        for key in ("spearman", "xauc"):
            assert own[key] != whole[key] and own[key] == pytest.approx(whole[key], abs=0.01)


BAD: dict[str, tuple[Any, str]] = {
    "label_t0": (pa.array(["no"] * ROWS), "column 'label_t0' is string; it must hold numbers"),
    "probability_t1": (np.full(ROWS, 1.5), "column 'probability_t1' is 1.5; a probability lies in 0..1"),
    "label_t2": (np.full(ROWS, 2.0), "column 'label_t2' is 2; a label is 0 or 1"),
    "prediction_watch": (np.full(ROWS, np.nan), "column 'prediction_watch' is nan; it must be a number"),
}


@pytest.mark.parametrize("column", BAD)
def test_a_bad_value_of_a_task_is_named(tmp_path: Path, column: str) -> None:
    values, message = BAD[column]
    folder = write_parquet(predictions(0) | {column: values}, tmp_path / "rows")
    with pytest.raises(ValueError, match=message):
        evaluate({"a": folder}, False)


def test_labels_of_a_task_differ_between_models(folders: dict[str, Path], tmp_path: Path) -> None:
    other = predictions(1)
    other["label_watch"] = np.where(other["label_watch"] == 3, 4, other["label_watch"])
    paths = {"a": folders["a"], "b": write_parquet(other, tmp_path / "b")}
    with pytest.raises(ValueError, match="column 'label_watch' is 4; it differs from the files of 'a'"):
        evaluate(paths, True)


def test_tasks_of_a_csv_file_are_those_of_parquet(tmp_path: Path) -> None:
    rows = {name: values for name, values in predictions(0).items() if "_t" not in name or "t0" in name}
    empty = {name: pa.array(np.where(np.isnan(v), None, v)) for name, v in rows.items() if name.startswith("label_")}
    written = write_csv(rows | {name: values.cast(pa.float64()) for name, values in empty.items()}, tmp_path / "a.csv")
    found, expected = (evaluate({"a": path}, False)["tasks"] for path in (written, write_parquet(rows, tmp_path / "a")))
    assert found["t0"]["models"]["a"]["auc"] == expected["t0"]["models"]["a"]["auc"]
    assert found["watch"]["models"]["a"] == pytest.approx(expected["watch"]["models"]["a"], rel=1e-6)


def test_labels_that_are_booleans_with_gaps_are_defined_where_they_are_known(tmp_path: Path) -> None:
    rows = predictions(0)
    words = [None if math.isnan(value) else value == 1 for value in rows["label_t0"].tolist()]
    same = [write_parquet(rows | {"label_t0": column}, tmp_path / name) for name, column in
            (("float", rows["label_t0"]), ("bool", pa.array(words)))]  # fmt: skip
    one, two = (evaluate({"a": folder}, False)["tasks"]["t0"] for folder in same)
    assert one == two


def test_a_tiny_file_of_very_many_equal_rows_is_read_in_bounded_memory(tmp_path: Path) -> None:
    rows = 3_000_000
    label = pa.concat_arrays(
        [pa.repeat(pa.scalar(1.0, pa.float32()), 1), pa.repeat(pa.scalar(0.0, pa.float32()), rows - 1)]
    )
    table = pa.table([label, pa.repeat(pa.scalar(0.5, pa.float32()), rows)], ["label", "score"])
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=rows)
    assert (tmp_path / "rows.parquet").stat().st_size < 25_000
    del label, table
    models, layout = describe_predictions({"a": tmp_path / "rows.parquet"})
    pool, before = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        found = evaluate_files(models, layout, EvaluationSettings(memory=1 << 24), paired=False)[0]
    finally:
        pa.set_memory_pool(before)
    assert found["rows"] == rows and found["models"]["a"]["auc"] == 0.5 and found["models"]["a"]["positives"] == 1
    assert 0 < pool.max_memory() < 1 << 22, "batches of 2^14 rows, not the row group"
