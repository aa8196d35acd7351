"""A service of a run of several tasks: its probabilities are those of evaluation, and it follows what is published."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient

from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.event_log import EventLog, LoggedEvent
from hllm_torchrec.data.forgetting import Names, forget
from hllm_torchrec.distributed.process_group import destroy_distributed
from hllm_torchrec.launch.calibrate import main as calibrate
from hllm_torchrec.launch.evaluate import main as evaluate
from hllm_torchrec.serving.app import create_app
from hllm_torchrec.serving.batch_scorer import BatchScorer
from hllm_torchrec.serving.engine import Engine, ScoreRequest, Scores
from hllm_torchrec.serving.micro_batches import BatchLimits
from hllm_torchrec.serving.reload import Reloader, published
from hllm_torchrec.serving.service import Service
from tests.helpers import task_shop, training_fixtures

NOW = 1_700_000_000
CONTEXT = {"device": "phone", "place": "2", "price": 3}


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


@pytest.fixture(scope="module", params=["several tasks", "one task"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("service")
    task_shop.prepared(folder)
    tasks: dict[str, Any] = {"objective__tasks": task_shop.TASKS} if request.param == "several tasks" else {}
    settings = task_shop.SETTINGS | {"data__dataset": folder / "dataset", "objective__fusion": "early", **tasks}
    settings["data__context"] = list(CONTEXT)
    training_fixtures.train(training_fixtures.config(folder / "run", **settings))
    return folder


class Served:
    """A service of `folder`/run on `folder`/dataset."""

    def __init__(self, folder: Path) -> None:
        self.run, self.dataset = folder / "run", folder / "dataset"
        self.log = EventLog(folder / "events.sqlite")
        self.service = Service(self.load(), BatchLimits(deadline=60.0), "a secret of ours")
        self.reloader = Reloader(self.service, self.load)
        self.client = TestClient(create_app(self.service, None, self.reloader), raise_server_exceptions=False)
        self.client.headers["Authorization"] = "Bearer a secret of ours"

    def load(self) -> Engine:
        return Engine(BatchScorer.of_run(self.run, dataset=self.dataset), self.log)

    def score(self, user: str, items: list[str], time: int = NOW, **context: Any) -> dict[str, Any]:
        body = {"user": user, "candidates": items, "time": time, "context": CONTEXT | context}
        answer = self.client.post("/v1/score", json=body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found


@pytest.fixture
def served(trained: Path, tmp_path: Path) -> Iterator[Served]:
    shutil.copytree(trained, tmp_path / "copy")
    found = Served(tmp_path / "copy")
    with found.client:
        yield found
    found.log.close()


@pytest.mark.slow
def test_probabilities_are_calibrated_as_in_the_evaluation_and_a_reload_finds_the_calibration(served: Served) -> None:
    look = str(served.run), "--dataset", str(served.dataset)
    uncalibrated, before = served.score("u1", ["i1", "i2"]), published(served.run, "best", served.dataset)
    assert calibrate(["--run-dir", *look]) == 0
    assert published(served.run, "best", served.dataset) != before
    assert evaluate(["--run-dir", *look, "--split", "test", "--draws", "0", "--no-tensorboard"]) == 0
    reloaded = served.client.post("/v1/reload").json()
    assert reloaded["model"] != reloaded["previous"] and reloaded["largest_change"] > 1e-3
    calibrated = served.score("u1", ["i1", "i2"])
    assert calibrated["scores"] == uncalibrated["scores"]
    assert np.abs(np.subtract(calibrated["probabilities"], uncalibrated["probabilities"])).max() > 1e-3

    dataset = Dataset.open(served.dataset)
    users, items = (dataset.users["raw_user_id"].to_pylist(), dataset.items["raw_item_id"].to_pylist())
    values = {name: [None, *dataset.feature_values(name).to_pylist()] for name in ("device", "place")}
    for row in pq.read_table(served.run / "predictions" / "test").to_pylist()[:12]:
        extra = dataset.user_events(row["user_id"])[[row["position"]]].extra
        price = float(extra["context_price"][0])
        context: dict[str, Any] = {name: values[name][int(extra[f"context_{name}"][0])] for name in values}
        context["price"] = None if np.isnan(price) else price
        one = served.score(users[row["user_id"] - 1], [items[row["item_id"] - 1]], row["timestamp"], **context)
        assert one["scores"] == pytest.approx([row["score"]], abs=1e-5)
        assert one["probabilities"] == pytest.approx([row["probability"]], abs=1e-5)
        if one["tasks"]:
            expected = [row["probability"], row["probability_like"], row["prediction_watch"], row["prediction_stars"]]
            assert [value for (value,) in one["tasks"].values()] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_a_reload_forgets_what_the_dataset_has_forgotten(served: Served) -> None:
    if served.service.engine.scorer.experiment.config.objective.tasks:
        pytest.skip("one model is enough")
    engine = served.service.engine
    for user, item in (("u1", "i1"), ("u2", "i3"), ("u2", "i1"), ("new", "i3")):
        engine.append(user, [LoggedEvent(item, NOW - 5, 1.0)])
    unknown = served.score("nobody", ["i2"])
    assert served.score("u1", ["i2"])["events"] == task_shop.PAGES * task_shop.SLOTS + 1
    assert served.score("new", ["i2"])["events"] == 1
    dataset = Dataset.open(served.dataset)
    with_item = (dataset.user_events(5).item_ids == dataset.items["raw_item_id"].to_pylist().index("i1") + 1).sum()
    forget(served.dataset, Names(["u1", "new"], ["i1"]))
    answer = served.client.post("/v1/reload").json()
    assert answer["model"] != answer["previous"]
    forgotten = served.score("u1", ["i2"])
    assert forgotten["events"] == 0 and forgotten["scores"] == unknown["scores"]
    assert served.score("new", ["i2"])["events"] == 0
    user = dataset.users["raw_user_id"][4].as_py()
    assert served.score(user, ["i2"])["events"] == task_shop.PAGES * task_shop.SLOTS - with_item
    assert [event.item for event in served.log.of_user("u2")[0]] == ["i3"]
    assert len(served.log) == 1
    served.service.engine.append("u1", [LoggedEvent("i3", NOW - 4, 1.0)])  # the user came back
    served.client.post("/v1/reload")
    forget(served.dataset, Names(["u9"]))
    served.client.post("/v1/reload")
    assert served.score("u1", ["i2"])["events"] == 1
    served.service.engine.append("u9", [LoggedEvent("i3", NOW - 3, 1.0)])  # of whom there was no event here
    forget(served.dataset, Names(["u10"]))
    served.client.post("/v1/reload")
    assert served.score("u9", ["i2"])["events"] == 1


@pytest.mark.slow
def test_numbers_of_json_are_the_texts_of_a_categorical_value_and_infinite_ones_are_refused(served: Served) -> None:
    expected, other = served.score("u1", ["i1"], place="2"), served.score("u1", ["i1"], place="3")
    assert expected["scores"] != other["scores"]
    assert served.score("u1", ["i1"], place=2)["scores"] == expected["scores"]
    assert served.score("u1", ["i1"], place=2.0)["scores"] == expected["scores"]
    for price in (1e39, -1e300):  # beyond float32
        body = {"user": "u1", "candidates": ["i1"], "context": CONTEXT | {"price": price}}
        answer = served.client.post("/v1/score", json=body)
        assert answer.status_code == 422 and "must be a finite number, or None" in answer.json()["error"]


@pytest.mark.slow
def test_a_second_engine_of_the_log_keeps_no_event_that_was_deleted(served: Served) -> None:
    first, second = served.service.engine, served.load()
    first.append("new", [LoggedEvent("i1", NOW - 5, 1.0), LoggedEvent("i2", NOW - 4, 0.0), LoggedEvent("i3", NOW - 3)])

    def events() -> int:
        (found,) = second.score([ScoreRequest("new", ["i1"], NOW, context=CONTEXT)])
        assert isinstance(found, Scores)
        return found.events

    assert events() == 3
    assert served.log.forget_items(["i2"]) == 1
    assert events() == 2
    assert served.log.forget("new") == 2
    assert events() == 0
    first.append("new", [LoggedEvent("i3", NOW - 2)])
    assert events() == 1
    second.close()
