"""Several labels from CSV to the scorer: the columns of the mapping are named in YAML only."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import log_loss

from hllm_torchrec.evaluation.calibration import Calibrator, RunCalibration
from hllm_torchrec.launch.calibrate import calibration_summary
from hllm_torchrec.launch.calibrate import main as calibrate
from hllm_torchrec.launch.embed import main as embed
from hllm_torchrec.launch.evaluate import main as evaluate
from hllm_torchrec.launch.recommend import main as recommend
from hllm_torchrec.serving.batch_scorer import BatchScorer, Request
from hllm_torchrec.serving.engine import Engine, ScoreRequest, Scores
from hllm_torchrec.serving.scorer import Scorer, UserHistory
from tests.helpers import task_shop, training_fixtures

TEST = ["--split", "test", "--draws", "0", "--no-tensorboard"]
LIKES = ("label_like", "probability_like", "raw_probability_like")


@pytest.fixture(scope="module", params=["late", "early", "mmoe"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its predictions of the test part."""
    output = tmp_path_factory.mktemp("runs") / request.param
    fusion, towers = ("late", "mmoe") if request.param == "mmoe" else (request.param, "shared_bottom")
    settings: dict[str, Any] = task_shop.SETTINGS | {
        "data__dataset": task_shop.dataset().root,
        "objective__fusion": fusion,
        "objective__towers": towers,
        "objective__tasks": task_shop.TASKS,
    }
    training_fixtures.train(training_fixtures.config(output, **settings))
    assert evaluate([*TEST, "--run-dir", str(output)]) == 0
    return output


@pytest.mark.slow
def test_each_task_is_trained_predicted_evaluated_and_served(run: Path) -> None:
    steps, checked = training_fixtures.lines(run, "step"), training_fixtures.lines(run, "eval")[-1]
    assert 0 <= checked["auc_like"] <= 1 and checked["rmse_watch"] > 0 and 0 < checked["rmse_stars"] < 2
    for name in task_shop.TASKS:
        losses = [line[f"loss_{name}"] for line in steps]
        assert np.isfinite(losses).all() and losses[-1] < losses[0] * 1.5
    rows = pq.read_table(run / "predictions" / "test")
    metrics = json.loads((run / "metrics.json").read_text())
    like = rows["label_like"].to_numpy()
    assert np.array_equal(np.isnan(like), rows["label"].to_numpy() != 1), "a like is defined where there is a click"
    assert metrics["tasks"]["like"]["rows"] == int((~np.isnan(like)).sum())
    assert metrics["tasks"]["watch"]["rows"] == len(rows) and metrics["tasks"]["watch"]["kind"] == "number"
    watch = rows["label_watch"].to_numpy(), rows["prediction_watch"].to_numpy()
    assert metrics["tasks"]["watch"]["models"][run.name]["mae"] == pytest.approx(np.abs(watch[0] - watch[1]).mean())
    assert 1 <= rows["prediction_stars"].to_numpy().min() <= rows["prediction_stars"].to_numpy().max() <= 3


@pytest.mark.slow
def test_the_scorer_returns_what_evaluation_wrote_for_each_task(run: Path) -> None:
    rows = pq.read_table(run / "predictions" / "test").to_pylist()
    with Scorer.of_run(run) as scorer:
        dataset = scorer.experiment.dataset
        for row in rows[:6]:
            events = dataset.user_events(row["user_id"])
            seen = events[events.timestamps < row["timestamp"]]
            history = UserHistory(row["user_id"], seen.item_ids, seen.timestamps, seen.labels, seen.actions)
            found = scorer.score_tasks(history, np.array([row["item_id"]]), row["timestamp"])
            assert list(found) == ["click", "like", "watch", "stars"]
            expected = [row["probability"], row["probability_like"], row["prediction_watch"], row["prediction_stars"]]
            assert [found[name][0] for name in found] == pytest.approx(expected, rel=1e-4)
            logit = scorer.score(history, np.array([row["item_id"]]), row["timestamp"])
            assert logit == pytest.approx([row["score"]], abs=1e-5)
        batched, items = BatchScorer(scorer.experiment), np.arange(1, task_shop.ITEMS)
        first, again = (one.score_tasks(one.read(history), items, row["timestamp"]) for one in (scorer, batched))
        for name, values in first.items():
            assert again[name] == pytest.approx(values, rel=1e-4, abs=1e-6)
        logits = batched.score_batch([Request(batched.read(history), items, row["timestamp"])])[0]
        assert logits[:, 0] == pytest.approx(scorer.score(history, items, row["timestamp"]), abs=1e-5)


@pytest.fixture(scope="module", params=["late", "early"])
def in_context(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("context") / request.param
    settings: dict[str, Any] = task_shop.SETTINGS | {
        "data__dataset": task_shop.dataset().root,
        "data__context": ["device", "price"],
        "objective__fusion": request.param,
        "objective__position_bias": ["place"],
    }
    training_fixtures.train(training_fixtures.config(output, **settings))
    return output


@pytest.mark.slow
def test_context_of_a_request_is_what_evaluation_read(in_context: Path) -> None:
    evaluate(["--run-dir", str(in_context), *TEST])
    rows = pq.read_table(in_context / "predictions" / "test").to_pylist()
    with Scorer.of_run(in_context) as scorer:
        dataset = scorer.experiment.dataset
        devices = [None, *dataset.feature_values("device").to_pylist()]
        scored = []
        for row in rows[:8]:
            events = dataset.user_events(row["user_id"])
            seen, own = events[events.timestamps < row["timestamp"]], events[[row["position"]]]
            history = UserHistory(row["user_id"], seen.item_ids, seen.timestamps, seen.labels, seen.actions)
            price = float(own.extra["context_price"][0])
            context = {
                "device": devices[int(own.extra["context_device"][0])],
                "price": None if np.isnan(price) else price,
            }
            state, item = scorer.read(history), np.array([row["item_id"]])
            scored.append(scorer.score(state, item, row["timestamp"], context)[0])
            assert scored[-1] == pytest.approx(row["score"], abs=1e-5)
            other = context | {"price": 100.0}
            assert scorer.score(state, item, row["timestamp"], other)[0] != pytest.approx(scored[-1], abs=1e-6)
        assert scorer.unknown_context.get("device", 0) > 0, "a watch is a device of the test part only"
        before = scorer.unknown_context["device"]
        scorer.score(state, item, row["timestamp"], context | {"device": "fridge"})
        assert scorer.unknown_context["device"] == before + 1
        with pytest.raises(ValueError, match=r"the request has no 'device', which the model reads; give it in context"):
            scorer.score(state, item, row["timestamp"], {"price": 1.0})
        with pytest.raises(
            ValueError, match=r"context 'devise': the dataset has no such context \(did you mean 'device'"
        ):
            scorer.score(state, item, row["timestamp"], context | {"devise": "phone"})
        with pytest.raises(ValueError, match=r"context 'price' is 'dear'; it must be a finite number, or None"):
            scorer.score(state, item, row["timestamp"], context | {"price": "dear"})
        again = BatchScorer(scorer.experiment).score(history, item, row["timestamp"], context)
        assert again[0] == pytest.approx(row["score"], abs=1e-5)


@pytest.mark.slow
def test_recommendations_are_those_of_the_context(in_context: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, printed = ["--run", str(in_context), "--user", "u3", "--history", "0"], []
    for context in ('{"device": "phone", "price": 2}', '{"device": null, "price": 100}'):
        assert recommend([*command, "--context", context]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] != printed[1]
    assert recommend(command) == 2
    assert "the request has no 'device', which the model reads" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        recommend([*command, "--context", "device=phone"])
    assert "--context: device=phone is no JSON object" in capsys.readouterr().err


def test_vectors_of_users_say_once_that_they_have_no_context(
    in_context: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embed(["--run", str(in_context), "--users", str(tmp_path / "users")]) == 0
    said = capsys.readouterr().out.count("the context (device, price) is read as unknown")
    assert said == (in_context.name == "late"), "in early fusion a user's vector is of its last event"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["platt", "isotonic", "temperature"])
def test_calibration_is_fitted_shown_and_served(run: Path, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    if run.name != "late" and (run.name, method) != ("early", "platt"):
        pytest.skip("two models are enough")
    assert calibrate(["--run-dir", str(run), "--method", method]) == 0
    valid = pq.read_table(run / "predictions" / "valid")
    fitted = RunCalibration.load(run)
    assert fitted is not None and set(fitted.tasks) == {"", "like"}
    probability = fitted.tasks[""](valid["score"].to_numpy())
    if method != "temperature":  # they have an intercept: the sums agree on the part that they were fitted to
        assert probability.sum() == pytest.approx(valid["label"].to_numpy().sum(), rel=0.02)
    before = (
        valid["probability"].to_numpy() if "raw_probability" not in valid.column_names else valid["raw_probability"]
    )
    assert log_loss(valid["label"], probability) <= log_loss(valid["label"], np.asarray(before)) + 1e-6
    evaluate(["--run-dir", str(run), *TEST])
    content = json.loads((run / "metrics.json").read_text())
    metrics, likes = content["models"], content["tasks"]["like"]["models"]
    own = {name: pq.read_table(run / "predictions" / "test")[name].to_numpy() for name in LIKES}
    known = ~np.isnan(own["label_like"])
    assert likes.keys() == metrics.keys()
    for name, column in ((run.name, "probability_like"), (f"{run.name} (not calibrated)", "raw_probability_like")):
        expected = log_loss(own["label_like"][known], own[column][known])
        assert likes[name]["log_loss"] == pytest.approx(expected, rel=1e-4)
    assert content["tasks"]["watch"]["models"].keys() == {run.name}, "numbers are not calibrated"
    assert metrics[f"{run.name} (not calibrated)"]["auc"] == metrics[run.name]["auc"]
    assert metrics[f"{run.name} (not calibrated)"]["log_loss"] != metrics[run.name]["log_loss"]
    row = pq.read_table(run / "predictions" / "test").to_pylist()[0]
    with Scorer.of_run(run) as scorer:
        events = scorer.experiment.dataset.user_events(row["user_id"])
        seen = events[events.timestamps < row["timestamp"]]
        history = UserHistory(row["user_id"], seen.item_ids, seen.timestamps, seen.labels, seen.actions)
        found = scorer.score_tasks(history, np.array([row["item_id"]]), row["timestamp"])
    assert found["click"][0] == pytest.approx(row["probability"], rel=1e-4)
    assert found["like"][0] == pytest.approx(row["probability_like"], rel=1e-4)
    raw_user = task_shop.dataset().users["raw_user_id"][row["user_id"] - 1].as_py()
    raw_item = task_shop.dataset().items["raw_item_id"][row["item_id"] - 1].as_py()
    with BatchScorer.of_run(run) as batched:
        (scores,) = Engine(batched).score([ScoreRequest(raw_user, [raw_item], row["timestamp"])])
        assert isinstance(scores, Scores) and scores.probabilities[0] == pytest.approx(row["probability"], rel=1e-4)
    RunCalibration("0" * 16, fitted.tasks).save(run)
    with pytest.raises(ValueError, match=r"calibration\.json belongs to other weights: run `hllm calibrate` again"):
        Scorer.of_run(run)
    capsys.readouterr()
    evaluate(["--run-dir", str(run), *TEST])
    assert "caution: " in (out := capsys.readouterr().out) and "belongs to other weights" in out
    (run / "calibration.json").write_text("{}")
    assert evaluate(["--run-dir", str(run), "--split", "test", "--draws", "0"]) == 2
    (run / "calibration.json").unlink()


def test_a_calibration_that_turns_the_order_around_is_said() -> None:
    up, down = Calibrator("platt", (0.5,), (0.1,)), Calibrator("platt", (-0.5,), (0.1,))
    said = calibration_summary(RunCalibration("w", {"": up, "like": down})).splitlines()
    assert said[:2] == [
        "first label: platt, slope 0.5000, intercept +0.1000",
        "like: platt, slope -0.5000, intercept +0.1000",
    ]
    assert len(said) == 3 and "caution: the slope is not above 0" in said[2]


@pytest.mark.slow
def test_the_gate_has_a_rule_for_each_task(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if run.name != "late":
        pytest.skip("one model is enough")
    options = ["--run-dir", str(run), *TEST]
    assert evaluate(options) == 0
    before = tmp_path / "before.json"
    before.write_text((run / "metrics.json").read_text())
    gate = [*options, "--baseline", str(before), "--max-task-drop"]
    assert evaluate([*gate, "like=0", "watch=0"]) == 0
    text = capsys.readouterr().out
    assert "PASS: AUC of like by late" in text and "PASS: XAUC of watch by late" in text
    content = json.loads(before.read_text())
    own = content["tasks"]["watch"]["models"][run.name]
    own["xauc"] += 0.2
    before.write_text(json.dumps(content))
    assert evaluate([*gate, "watch=0.1"]) == 4, "XAUC has no interval"
    assert evaluate([*gate, "watch=0.3"]) == 0
    assert evaluate([*gate, "wach=0.1"]) == 2
    assert "has no task 'wach' (did you mean 'watch'?)" in capsys.readouterr().err
    assert evaluate([*gate, "watch"]) == 2 and "must be TASK=DROP" in capsys.readouterr().err
