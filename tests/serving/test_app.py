"""The service over HTTP, in this process: scores by raw ids are those of `hllm evaluate`; bad requests are one line."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.models.assembly import build_experiment
from hllm_torchrec.serving.app import create_app
from hllm_torchrec.serving.engine import Engine
from hllm_torchrec.serving.micro_batches import BatchLimits
from hllm_torchrec.serving.request_schema import MAX_BODY
from hllm_torchrec.serving.scorer import Scorer
from hllm_torchrec.serving.service import Service
from tests.helpers import fixtures
from tests.helpers.served_runs import RUNS, rule, settings, trained

TIME = fixtures.START + 10**7
Serve = Callable[..., TestClient]


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts services of an untrained model, and ends them."""
    open_clients = []

    def started(limits: BatchLimits | None = None, token: str | None = None, **more: Any) -> TestClient:
        changed = settings("early", tmp_path, **{"optim__ema": 0.0, **more})
        engine = Engine(Scorer(build_experiment(changed, init_distributed())))
        client = client_of(Service(engine, limits or BatchLimits(deadline=60.0), token))
        open_clients.append(client)
        return client.__enter__()

    yield started
    for client in open_clients:
        client.__exit__(None, None, None)


def client_of(service: Service) -> TestClient:
    app = create_app(service, log=None)
    app.state.service = service
    return TestClient(app, raise_server_exceptions=False)


def raw_ids(kind: str, what: str) -> list[str]:
    dataset = fixtures.dataset(rule(kind))
    table = dataset.items if what == "item" else dataset.users
    return ["?", *table[f"raw_{what}_id"].to_pylist()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(RUNS))
def test_scores_by_raw_ids_equal_those_of_the_evaluation(kind: str) -> None:
    run, evaluated = trained(kind)
    items, users, found = raw_ids(kind, "item"), raw_ids(kind, "user"), {}
    with (
        Scorer.of_run(run, "latest") as scorer,
        client_of(Service(Engine(scorer), BatchLimits(deadline=60.0))) as client,
    ):
        for piece in fixtures.pieces("test", rule(kind)):
            exposures = piece.first_target + np.flatnonzero(~np.isnan(piece.labels[piece.first_target :]))
            for time in np.unique(piece.timestamps[exposures]):
                now = exposures[piece.timestamps[exposures] == time]
                body: dict[str, Any] = {"user": users[piece.user_id], "time": int(time)}
                body["candidates"] = [items[item] for item in piece.item_ids[now]]
                if kind == "leave one out":  # the user's events include the one that is to be predicted
                    body["history"] = events_of(piece, items, int(now[0]))
                answer = client.post("/v1/score", json=body).json()
                found |= {(piece.user_id, int(at)): score for at, score in zip(now, answer["scores"])}
    ours, theirs = (np.array([scores[key] for key in sorted(evaluated)]) for scores in (found, evaluated))
    np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=2e-5)
    assert theirs.std() > 0.01 and found.keys() == evaluated.keys()


def events_of(piece: Any, items: list[str], end: int) -> list[dict[str, Any]]:
    names = fixtures.dataset().manifest["actions"]["names"]
    rows = zip(piece.item_ids[:end], piece.timestamps[:end], piece.labels[:end], piece.actions[:end])
    return [
        {
            "item": items[item],
            "timestamp": int(second),
            "label": None if np.isnan(label) else float(label),
            "action": names.get(str(action)),
        }
        for item, second, label, action in rows
    ]


def test_a_users_history_may_come_with_the_request_and_is_not_kept(serve: Serve) -> None:
    client, items = serve(), raw_ids("early", "item")
    piece = max(fixtures.pieces("test"), key=lambda piece: piece.item_ids.size)
    user, candidates = raw_ids("early", "user")[piece.user_id], items[1:6]
    own = {"user": user, "candidates": candidates, "time": TIME}
    of_dataset = client.post("/v1/score", json=own).json()
    given = client.post("/v1/score", json=own | {"history": events_of(piece, items, len(piece.item_ids))}).json()
    assert of_dataset == given and given["events"] == len(piece.item_ids)
    other = client.post("/v1/score", json=own | {"history": []}).json()
    assert other["events"] == 0 and other["scores"] != given["scores"]
    assert client.post("/v1/score", json=own).json() == of_dataset


def test_a_new_user_is_scored_without_history(serve: Serve) -> None:
    client = serve()
    for user in ("nobody", None):
        answer = client.post("/v1/score", json={"user": user, "candidates": ["s1", "s2"], "time": TIME})
        assert answer.status_code == 200 and answer.json()["events"] == 0
        assert len(answer.json()["scores"]) == 2 and 0 < answer.json()["probabilities"][0] < 1


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"candidates": []}, "body.candidates: List should have at least 1 item"),
        ({"candidates": ["s1", 7]}, "body.candidates.1: Input should be a valid string"),
        ({"candidates": ["s1", "nope"]}, "candidates: 1 of 2 are not in the dataset: 'nope'"),
        ({"time": -1}, "body.time: Input should be greater than or equal to 0"),
        ({"usr": "u1"}, "body.usr: Extra inputs are not permitted"),
        ({"history": [{"item": "s1", "timestamp": 5}, {"item": "s1", "timestamp": 4}]}, "is before that of the prev"),
        ({"history": [{"item": "s1", "timestamp": 5, "action": "flew"}]}, "are not in the dataset: 'flew'; it has"),
    ],
)
def test_wrong_requests_are_answered_with_one_line(serve: Serve, change: dict[str, Any], problem: str) -> None:
    answer = serve().post("/v1/score", json={"user": "u1", "candidates": ["s1"], "time": TIME} | change)
    assert answer.status_code == 422
    assert problem in answer.json()["error"] and "\n" not in answer.json()["error"]


def test_bodies_are_limited_whether_or_not_they_say_their_length(serve: Serve) -> None:
    client, large = serve(), b" " * (MAX_BODY + 1)
    assert client.post("/v1/score", content=large).status_code == 413
    assert client.post("/v1/score", content=iter([large[:MAX_BODY], large[:9]])).status_code == 413
    assert client.post("/v1/score", content=b"{").status_code == 422


def test_a_token_is_needed_where_there_is_one(serve: Serve) -> None:
    client, body = serve(token="a secret of ours"), {"candidates": ["s1"], "time": TIME}
    for given in (None, "Bearer another", "a secret of ours"):
        headers = {} if given is None else {"Authorization": given}
        assert client.post("/v1/score", json=body, headers=headers).status_code == 401
    assert client.post("/v1/score", json=body, headers={"Authorization": "Bearer a secret of ours"}).status_code == 200
    assert client.get("/readyz").status_code == 200  # a balancer has no token


def test_a_full_queue_is_refused_at_once_and_a_missed_deadline_is_503(serve: Serve) -> None:
    client, body = serve(BatchLimits(requests=1, queue=2, deadline=0.2)), {"candidates": ["s1"], "time": TIME}
    service, release = client.app.state.service, threading.Event()  # type: ignore[attr-defined]
    service.batches.between_batches(release.wait)
    statuses: list[int] = []
    threads = [
        threading.Thread(target=lambda: statuses.append(client.post("/v1/score", json=body).status_code))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [429, 429, 503, 503]
    release.set()
    assert client.post("/v1/score", json=body).status_code == 200


def test_readiness_ends_before_the_service_does_and_errors_show_no_code(serve: Serve) -> None:
    client = serve()
    service = client.app.state.service  # type: ignore[attr-defined]
    assert client.get("/readyz").json()["ready"] and client.get("/healthz").status_code == 200
    service.draining = True
    assert client.get("/readyz").status_code == 503 and client.get("/healthz").status_code == 200
    service.engine.states = None  # a fault of ours
    answer = client.post("/v1/score", json={"user": "u1", "candidates": ["s1"], "time": TIME})
    assert (answer.status_code, answer.json()) == (500, {"error": "internal error"})
