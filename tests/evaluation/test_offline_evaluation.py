"""The job over files equals the plain functions over arrays, whatever the memory, the files and the ranks."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import average_precision_score, brier_score_loss, log_loss, precision_recall_curve, roc_auc_score

from hllm_torchrec.evaluation.offline_evaluation import EvaluationSettings, evaluate_predictions
from hllm_torchrec.evaluation.prediction_layout import ColumnLayout, PredictionModel
from hllm_torchrec.evaluation.prediction_rows import PredictionRows
from hllm_torchrec.metrics.auc import delong_test, roc_auc
from tests.helpers.distributed import run_ranks
from tests.helpers.metric_oracles import gauc, ranking_metrics, standard_slices
from tests.helpers.prediction_rows import ROWS, columns, write_csv, write_parquet

TINY = 1 << 16
"""Bytes: the smallest memory that is allowed, far less than the rows need."""

EVERYTHING = ColumnLayout(
    user="user_id",
    item="item_id",
    timestamp="timestamp",
    history_length="history_length",
    item_is_cold="item_is_cold",
    slices=("country",),
)


def two_models(path: Path) -> list[PredictionModel]:
    return [PredictionModel("a", (path,), "score", "probability"), PredictionModel("b", (path,), "other")]


def run(models: list[PredictionModel], layout: ColumnLayout, scratch: Path, **settings: Any) -> dict[str, Any]:
    return evaluate_predictions(PredictionRows(models, layout, scratch), EvaluationSettings(**settings))


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parquet(columns(), tmp_path_factory.mktemp("rows"), files=3)


@pytest.fixture(scope="module", params=[1 << 30, TINY], ids=["in memory", "on disk"])
def metrics(request: pytest.FixtureRequest, parquet: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(two_models(parquet), EVERYTHING, tmp_path_factory.mktemp("s"), memory=request.param, draws=30)


def test_what_does_not_fit_goes_to_disk(metrics: dict[str, Any]) -> None:
    assert (metrics["memory"]["spilled"] > 0) == (metrics["memory"]["limit"] == TINY)


def test_one_model_equals_the_plain_functions(metrics: dict[str, Any]) -> None:
    rows, found = columns(), metrics["models"]["a"]
    slices = standard_slices(rows["history_length"], rows["item_is_cold"])
    slices |= {f"country={name}": rows["country"] == name for name in ("de", "fr", "it")}
    expected = ranking_metrics(rows["label"], rows["score"], rows["probability"], rows["user_id"], slices)
    assert found["auc"] == expected["auc"]  # to the last bit
    for name, block in expected.pop("slices").items():
        assert found["slices"][name] == pytest.approx(block, abs=1e-12), name
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert found["gauc_user_weighted"] == pytest.approx(
        gauc(rows["label"], rows["score"], rows["user_id"]).user_weighted
    )


def test_scikit_learn_agrees(metrics: dict[str, Any]) -> None:
    rows, found = columns(), metrics["models"]["a"]
    label, score, probability = rows["label"], rows["score"], rows["probability"]
    assert found["auc"] == pytest.approx(roc_auc_score(label, score), abs=1e-12)
    assert found["pr_auc"] == pytest.approx(average_precision_score(label, score), abs=1e-12)
    assert found["log_loss"] == pytest.approx(log_loss(label, probability), abs=1e-9)
    assert found["brier"] == pytest.approx(brier_score_loss(label, probability), abs=1e-12)
    precision, recall, _ = precision_recall_curve(label, score)
    for wanted, value in found["recall_at_precision"].items():
        assert value == pytest.approx(recall[precision >= float(wanted)].max(), abs=1e-12), wanted


def test_two_models_equal_delongs_test(metrics: dict[str, Any]) -> None:
    rows, found = columns(), metrics["paired"]["b"]
    expected = delong_test(rows["label"], rows["other"], rows["score"])
    names = ("difference", "delong_low", "delong_high", "delong_p")
    values = (expected.difference, expected.low, expected.high, expected.p_value)
    assert {name: found[name] for name in names} == pytest.approx(dict(zip(names, values)), abs=1e-12)
    assert found["clustered_low"] < found["difference"] < found["clustered_high"]
    assert found["bootstrap_low"] < found["difference"] < found["bootstrap_high"]


def test_slices_by_day_and_hour_hold_all_rows(metrics: dict[str, Any]) -> None:
    slices, seconds = metrics["models"]["a"]["slices"], columns()["timestamp"]
    for kind, count in (("day", len(np.unique(seconds // 86_400))), ("hour", 24)):
        sizes = [block["rows"] for name, block in slices.items() if name.startswith(f"{kind}_")]
        assert len(sizes) == count and sum(sizes) == ROWS
    first = min(name for name in slices if name.startswith("day_"))
    rows = seconds // 86_400 == seconds.min() // 86_400
    assert slices[first]["auc"] == roc_auc(columns()["label"][rows], columns()["score"][rows])
    assert first == "day_2023-11-14"


def test_curves_run_from_corner_to_corner(metrics: dict[str, Any]) -> None:
    roc, pr = metrics["curves"]["a"]["roc"], metrics["curves"]["a"]["pr"]
    x, y = np.array(roc["false_positive_rate"]), np.array(roc["true_positive_rate"])
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert (np.diff(x) >= 0).all() and (np.diff(y) >= 0).all() and len(x) > 100
    assert np.trapezoid(y, x) == pytest.approx(metrics["models"]["a"]["auc"], abs=2e-3)
    assert pr["recall"] == roc["true_positive_rate"]
    assert pr["precision"][-1] == pytest.approx(columns()["label"].mean(), abs=1e-5)


def test_rows_of_one_user_widen_the_interval(parquet: Path, tmp_path: Path) -> None:
    """Users whose rows repeat have as much information as one row each: the error grows with the square root."""
    once = columns(400) | {"user_id": np.arange(400)}
    often = {name: np.tile(values, 9) for name, values in once.items()}
    blocks = []
    for place, rows in enumerate((once, often)):
        path = write_parquet(rows, tmp_path / str(place))
        blocks.append(run([PredictionModel("a", (path,))], ColumnLayout(user="user_id"), tmp_path)["models"]["a"])
    assert blocks[1]["auc_se"] == pytest.approx(blocks[0]["auc_se"] / 3, rel=0.01)
    assert blocks[1]["clustered_se"] == pytest.approx(blocks[0]["auc_se"], rel=0.01)
    assert blocks[0]["clustered_se"] == pytest.approx(blocks[0]["auc_se"], rel=0.01)


def test_the_interval_over_users_is_like_the_bootstraps(parquet: Path, tmp_path: Path) -> None:
    block = run(two_models(parquet), ColumnLayout(user="user_id"), tmp_path, draws=400)["models"]["a"]
    width = block["clustered_high"] - block["clustered_low"]
    assert block["bootstrap_high"] - block["bootstrap_low"] == pytest.approx(width, rel=0.15)


@pytest.mark.parametrize("memory", [1 << 30, TINY])
def test_weights_equal_scikit_learn(parquet: Path, tmp_path: Path, memory: int) -> None:
    rows, layout = columns(), ColumnLayout(weight="weight", user="user_id")
    found = run(two_models(parquet), layout, tmp_path, memory=memory)
    block, weight = found["models"]["a"], rows["weight"]
    label, score, probability = rows["label"], rows["score"], rows["probability"]
    expected = {
        "auc": roc_auc_score(label, score, sample_weight=weight),
        "pr_auc": average_precision_score(label, score, sample_weight=weight),
        "log_loss": log_loss(label, probability, sample_weight=weight),
        "brier": brier_score_loss(label, probability, sample_weight=weight),
        "calibration": weight @ probability / (weight @ label),
        "gauc": gauc(label, score, rows["user_id"], weight).gauc,
    }
    assert {name: block[name] for name in expected} == pytest.approx(expected, abs=1e-9)
    assert found["weighted"] and block["bootstrap_low"] is None


def test_the_weighted_error_is_delongs_for_equal_weights_and_grows_with_their_spread(tmp_path: Path) -> None:
    rows = columns(600)
    same = write_parquet(rows | {"weight": np.full(600, 7.0)}, tmp_path / "same")
    layout = ColumnLayout(weight="weight")
    weighted, plain = (run(two_models(same), chosen, tmp_path) for chosen in (layout, ColumnLayout()))
    assert weighted["models"]["a"]["auc_se"] == pytest.approx(plain["models"]["a"]["auc_se"], rel=1e-9)
    assert weighted["paired"]["b"]["delong_p"] == pytest.approx(plain["paired"]["b"]["delong_p"], rel=1e-6)
    spread = write_parquet(rows | {"weight": np.where(np.arange(600) % 10, 0.01, 1)}, tmp_path / "spread")
    assert run(two_models(spread), layout, tmp_path)["models"]["a"]["auc_se"] > 2 * plain["models"]["a"]["auc_se"]


def test_the_weighted_interval_covers(tmp_path: Path) -> None:
    """Over repeated draws, the standard error is the spread of the AUCs."""
    random, aucs, errors = np.random.default_rng(1), [], []
    for draw in range(60):
        label = random.random(300) < 0.4
        rows = {"label": label * 1.0, "score": random.normal(size=300) + label, "weight": random.exponential(size=300)}
        path = write_parquet(rows, tmp_path / str(draw))
        block = run([PredictionModel("a", (path,))], ColumnLayout(weight="weight"), tmp_path)["models"]["a"]
        aucs.append(block["auc"])
        errors.append(block["auc_se"])
    assert np.mean(errors) == pytest.approx(np.std(aucs), rel=0.3)


def test_rows_of_weight_zero_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = columns(300)
    weight = np.where(np.arange(300) < 100, 0.0, 1.0)
    all_rows = write_parquet(rows | {"weight": weight}, tmp_path / "all")
    kept = write_parquet(
        {name: values[100:] for name, values in rows.items()} | {"weight": np.ones(200)}, tmp_path / "k"
    )
    found, expected = (
        run(two_models(path), ColumnLayout(weight="weight", user="user_id"), tmp_path) for path in (all_rows, kept)
    )
    assert found.pop("rows_without_weight") == 100 and expected.pop("rows_without_weight") == 0
    assert found == expected


@pytest.mark.parametrize("memory", [1 << 30, TINY])
def test_rows_without_a_user_are_no_user(tmp_path: Path, memory: int) -> None:
    """They count for the AUC, each by itself; GAUC and the number of users are those of the other rows."""
    rows = columns()
    anonymous = np.arange(ROWS) % 3 == 0
    table = pa.table(rows | {"user_id": pa.array(rows["user_id"], mask=anonymous)})
    pq.write_table(table, tmp_path / "some.parquet")
    alone = np.where(anonymous, 10**9 + np.arange(ROWS), rows["user_id"])
    pq.write_table(pa.table(rows | {"user_id": alone}), tmp_path / "alone.parquet")
    layout = ColumnLayout(user="user_id")
    found, expected = (
        run(two_models(tmp_path / f"{name}.parquet"), layout, tmp_path, memory=memory) for name in ("some", "alone")
    )
    assert found["users"] == len(np.unique(rows["user_id"][~anonymous]))
    assert found["rows_without_user"] == anonymous.sum() and "rows_without_user" not in expected
    known = gauc(rows["label"][~anonymous], rows["score"][~anonymous], rows["user_id"][~anonymous])
    assert found["models"]["a"]["gauc"] == pytest.approx(known.gauc, abs=1e-12)
    same = ("auc", "auc_se", "clustered_se", "clustered_low", "gauc", "gauc_user_weighted", "gauc_users")
    for key in same:
        for name in ("a", "b"):
            assert found["models"][name][key] == pytest.approx(expected["models"][name][key]), key


def test_csv_gives_what_parquet_gives(metrics: dict[str, Any], tmp_path: Path) -> None:
    path = write_csv(columns(), tmp_path / "rows.csv")
    found = run(two_models(path), EVERYTHING, tmp_path, draws=30)
    expected = metrics["models"]["a"]
    assert found["models"]["a"]["auc"] == expected["auc"]
    assert found["models"]["a"]["slices"].keys() == expected["slices"].keys()
    assert found["models"]["a"]["gauc"] == pytest.approx(expected["gauc"], abs=1e-12)


def test_models_in_files_of_their_own_with_other_row_groups(metrics: dict[str, Any], tmp_path: Path) -> None:
    rows = columns()
    own = write_parquet({"label": rows["label"], "score": rows["other"]}, tmp_path / "b", files=2, row_group=111)
    every = write_parquet(rows, tmp_path / "a")
    models = [PredictionModel("a", (every,), "score", "probability"), PredictionModel("b", (own,))]
    assert run(models, EVERYTHING, tmp_path)["paired"]["b"]["delong_p"] == metrics["paired"]["b"]["delong_p"]


def test_the_exposures_fingerprint_knows_no_order_but_every_label(parquet: Path, tmp_path: Path) -> None:
    rows, layout = columns(), ColumnLayout(user="user_id", item="item_id")
    shuffled = {name: values[np.random.default_rng(3).permutation(ROWS)] for name, values in rows.items()}
    flipped = rows | {"label": np.where(np.arange(ROWS) == 5, 1 - rows["label"], rows["label"])}
    found = [
        run([PredictionModel("a", (write_parquet(values, tmp_path / str(place)),))], layout, tmp_path)["exposures"]
        for place, values in enumerate((rows, shuffled, flipped))
    ]
    assert found[0] == found[1] != found[2]


def test_the_result_is_json(metrics: dict[str, Any]) -> None:
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_one_class_and_no_rows_have_no_auc(tmp_path: Path) -> None:
    for place, count in enumerate((40, 0)):
        rows = {name: values[:count] for name, values in columns().items()} | {"label": np.ones(count)}
        path = write_parquet(rows, tmp_path / str(place))
        block = run([PredictionModel("a", (path,), "score", "probability")], EVERYTHING, tmp_path)["models"]["a"]
        assert block["auc"] is None and block["gauc"] is None and block["rows"] == count


def share_of_ranks(folder: Path, memory: int) -> list[dict[str, Any]]:
    """Runs on each rank: without weights, and with them."""
    layouts = (replace(EVERYTHING, timestamp=None), ColumnLayout(weight="weight", user="user_id"))
    results = [run(two_models(folder), layout, folder.parent, memory=memory, draws=20) for layout in layouts]
    odd = [PredictionModel("one score", (folder,), "constant"), PredictionModel("in order", (folder,), "sorted")]
    results.append(
        run(odd, ColumnLayout(user="user_id"), folder.parent, memory=memory)
    )  # one range holds all; none overlap
    try:
        run([PredictionModel("a", (folder.parent / "bad",))], ColumnLayout(), folder.parent)
    except ValueError as error:
        results.append({"error": str(error)})
    return results


def numbers(values: Any) -> list[float]:
    """All numbers of nested mappings and lists."""
    if isinstance(values, dict):
        return [number for value in values.values() for number in numbers(value)]
    if isinstance(values, list):
        return [number for value in values for number in numbers(value)]
    return [math.nan if values is None else values] if isinstance(values, (int, float, type(None))) else []


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "memory"), [(2, 1 << 30), (4, TINY)])
def test_ranks_equal_one(parquet: Path, tmp_path: Path, ranks: int, memory: int) -> None:
    bad = columns(300)
    bad["score"][299] = math.nan  # in the last rank's share
    rows = columns() | {"constant": np.full(ROWS, 0.5, np.float32), "sorted": np.arange(ROWS) * 1.0}
    folder, broken = write_parquet(rows, tmp_path / "rows", files=2), write_parquet(bad, tmp_path / "bad")
    expected = share_of_ranks(folder, 1 << 30)
    for results in run_ranks(share_of_ranks, ranks, folder, memory):
        assert results[0]["models"]["a"]["auc"] == expected[0]["models"]["a"]["auc"]  # to the last bit
        assert results[0]["exposures"] == expected[0]["exposures"]
        assert results[2]["models"]["one score"]["auc"] == 0.5
        for found, one in zip(results[:3], expected[:3]):
            for key in ("models", "paired", "rows", "users", "bootstrap"):
                assert numbers(found[key]) == pytest.approx(numbers(one[key]), abs=1e-12, nan_ok=True), key
        assert results[3]["error"].startswith(f"{broken / '0.parquet'}: row 299: column 'score' is nan")
