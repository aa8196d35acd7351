"""Several labels from CSV to the scorer: the columns of the mapping are named in YAML only."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from hllm_torchrec.launch.evaluate import main as evaluate
from hllm_torchrec.serving.scorer import Scorer, UserHistory
from tests.helpers import task_shop, training_fixtures


@pytest.fixture(scope="module", params=["late", "early", "mmoe"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / request.param
    fusion, towers = ("late", "mmoe") if request.param == "mmoe" else (request.param, "shared_bottom")
    settings: dict[str, Any] = task_shop.SETTINGS | {
        "data__dataset": task_shop.dataset().root,
        "objective__fusion": fusion,
        "objective__towers": towers,
        "objective__tasks": task_shop.TASKS,
    }
    training_fixtures.train(training_fixtures.config(output, **settings))
    return output


def test_each_task_is_trained_predicted_evaluated_and_served(run: Path) -> None:
    steps = training_fixtures.lines(run, "step")
    for name in task_shop.TASKS:
        losses = [line[f"loss_{name}"] for line in steps]
        assert np.isfinite(losses).all() and losses[-1] < losses[0] * 1.5
    assert evaluate(["--run-dir", str(run), "--split", "test", "--draws", "0", "--no-tensorboard"]) == 0
    rows = pq.read_table(run / "predictions" / "test")
    metrics = json.loads((run / "metrics.json").read_text())
    like = rows["label_like"].to_numpy()
    assert np.array_equal(np.isnan(like), rows["label"].to_numpy() != 1), "a like is defined where there is a click"
    assert metrics["tasks"]["like"]["rows"] == int((~np.isnan(like)).sum())
    assert metrics["tasks"]["watch"]["rows"] == len(rows) and metrics["tasks"]["watch"]["kind"] == "number"
    watch = rows["label_watch"].to_numpy(), rows["prediction_watch"].to_numpy()
    assert metrics["tasks"]["watch"]["models"][run.name]["mae"] == pytest.approx(np.abs(watch[0] - watch[1]).mean())
    assert 1 <= rows["prediction_stars"].to_numpy().min() <= rows["prediction_stars"].to_numpy().max() <= 3


def test_the_scorer_returns_what_evaluation_wrote_for_each_task(run: Path) -> None:
    evaluate(["--run-dir", str(run), "--split", "test", "--draws", "0", "--no-tensorboard"])
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
