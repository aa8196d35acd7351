"""Another model is loaded beside, compared and swapped between batches; whatever fails, the old one answers on."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

from hllm_torchrec.data.event_log import EventLog
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.models.assembly import build_experiment
from hllm_torchrec.serving.app import create_app
from hllm_torchrec.serving.batch_scorer import BatchScorer
from hllm_torchrec.serving.engine import Engine
from hllm_torchrec.serving.micro_batches import BatchLimits
from hllm_torchrec.serving.reload import Reloader, ReloadRefusedError, watch
from hllm_torchrec.serving.service import Service
from tests.helpers import fixtures
from tests.helpers.served_runs import settings

TIME = fixtures.START + 10**7
SECRET = {"Authorization": "Bearer a secret of ours"}
BODY = {"user": "u3", "candidates": ["s1", "s2", "s3"], "time": TIME}


class Shop:
    """A service, and the models that a reload may find: `shift` is added to all logits of the next one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log, self.shift, self.error = folder, EventLog(folder / "events.sqlite"), 0.0, ""
        self.service = Service(self.load(), BatchLimits(deadline=60.0), "a secret of ours")
        self.reloader = Reloader(self.service, self.load, max_change=0.2)
        self.client = TestClient(create_app(self.service, None, self.reloader), raise_server_exceptions=False)

    def load(self) -> Engine:
        if self.error:
            raise ValueError(self.error)
        experiment = build_experiment(settings("early", self.folder, optim__ema=0.0), init_distributed())
        with torch.no_grad():
            experiment.hllm.head.out.bias.add_(self.shift)
        return Engine(BatchScorer(experiment), self.log)

    def scores(self) -> np.ndarray:
        answer = self.client.post("/v1/score", json=BODY, headers=SECRET)
        assert answer.status_code == 200, answer.text
        return np.array(answer.json()["scores"])


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    made = Shop(tmp_path)
    with made.client:
        yield made
    made.log.close()
    destroy_distributed()


def test_a_new_model_takes_over_with_its_change_reported_and_events_kept(shop: Shop) -> None:
    before, shop.shift = shop.scores(), 0.1
    event = {"item": "s4", "timestamp": TIME - 9, "label": 1, "action": "5"}
    reported = shop.client.post("/v1/reload", headers=SECRET).json()
    assert reported["model"] != reported["previous"] and reported["requests"] == 1
    assert 0.01 < reported["mean_change"] <= reported["largest_change"] < 0.03
    np.testing.assert_allclose(shop.scores(), before + 0.1, atol=1e-5)
    shop.client.post("/v1/events", json={"user": "u3", "events": [event]}, headers=SECRET)
    after = shop.scores()
    assert np.abs(after - before - 0.1).max() > 1e-4  # the new model's states are told of events
    shop.shift = 0.0  # as after `hllm rollback`
    assert shop.client.post("/v1/reload", headers=SECRET).status_code == 200
    np.testing.assert_allclose(shop.scores(), after - 0.1, atol=1e-5)
    assert len(shop.log.listeners) == 1


@pytest.mark.parametrize("shift", [3.0, float("nan")])
def test_a_model_of_other_scores_is_refused_and_the_old_one_stays(shop: Shop, shift: float) -> None:
    before, shop.shift = shop.scores(), shift
    answer = shop.client.post("/v1/reload", headers=SECRET)
    assert answer.status_code == 409 and "of 1 recent requests by" in answer.json()["error"]
    assert np.array_equal(shop.scores(), before) and len(shop.log.listeners) == 1
    assert 'hllm_reloads_total{result="refused"} 1.0' in shop.client.get("/metrics").text


def test_a_model_that_does_not_load_leaves_the_old_one(shop: Shop) -> None:
    before, shop.error = shop.scores(), "runs/x has no complete checkpoint"
    answer = shop.client.post("/v1/reload", headers=SECRET)
    assert (answer.status_code, answer.json()) == (409, {"error": f"ValueError: {shop.error}"})
    assert np.array_equal(shop.scores(), before)
    assert shop.client.post("/v1/reload").status_code == 401


def test_the_watch_reloads_after_a_change_and_says_what_it_refused(shop: Shop) -> None:
    shop.scores()
    released, said, stop = [("a", 1)] * 2 + [("b", 1)] * 2 + [("c", 2)], [], threading.Event()

    def state() -> tuple[str, int]:
        if len(released) == 1:
            stop.set()
        shop.error = "damaged" if released[0][0] == "c" else ""
        return released.pop(0)

    mark = shop.service.engine.mark
    watch(shop.reloader, state, 0.001, stop, said.append)
    assert len(said) == 2 and shop.service.engine.mark != mark
    assert "largest change of a probability 0.000" in str(said[0]) and "the model stays: ValueError: damaged" in said[1]


def test_requests_during_a_reload_are_answered(shop: Shop) -> None:
    shop.scores()
    begun, go_on, load = threading.Event(), threading.Event(), shop.load

    def slow() -> Engine:
        begun.set()
        go_on.wait()
        return load()

    shop.reloader._load = slow
    thread = threading.Thread(target=shop.reloader.reload)
    thread.start()
    begun.wait()
    shop.scores()
    with pytest.raises(ReloadRefusedError, match="a reload is under way"):
        shop.reloader.reload()
    go_on.set()
    while thread.is_alive():
        shop.scores()
    thread.join()
