"""The service over HTTP, in this process: scores by raw ids are those of `hllm evaluate`; bad requests are one line."""

import json
import shlex
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from starlette.testclient import TestClient

from hllm_torchrec.data.event_log import EventLog
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.launch.forget import build_parser
from hllm_torchrec.models.assembly import build_experiment
from hllm_torchrec.serving.app import create_app
from hllm_torchrec.serving.batch_scorer import BatchScorer
from hllm_torchrec.serving.engine import Engine
from hllm_torchrec.serving.micro_batches import BatchLimits
from hllm_torchrec.serving.request_schema import MAX_BODY
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
        scorer = BatchScorer(build_experiment(changed, init_distributed()), journal=tmp_path / "new_items.jsonl")
        engine = Engine(scorer, EventLog(tmp_path / "events.sqlite"))
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
        BatchScorer.of_run(run, "latest") as scorer,
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
        (
            {"history": [{"item": "s1", "timestamp": 5}, {"item": "s1", "timestamp": 4}]},
            "history, event 1: time 4 is before",
        ),
        (
            {"history": [{"item": "s1", "timestamp": 5, "label": 0.5}]},
            "body.history.0.label: Value error, must be 0 or 1",
        ),
        ({"history": [{"item": "s1", "timestamp": 5, "action": "flew"}]}, "actions of the history: 1 of 1 are not"),
        ({"history": [{"item": "nope", "timestamp": 5}]}, "items of the history: 1 of 1 are not in the dataset"),
    ],
)
def test_wrong_requests_are_answered_with_one_line(serve: Serve, change: dict[str, Any], problem: str) -> None:
    answer = serve().post("/v1/score", json={"user": "u1", "candidates": ["s1"], "time": TIME} | change)
    assert answer.status_code == 422
    assert problem in answer.json()["error"] and "\n" not in answer.json()["error"]


def test_a_body_that_is_not_declared_as_json_is_refused_with_the_reason(serve: Serve) -> None:
    given = {"content": b'{"candidates": ["s1"]}', "headers": {"content-type": "application/x-www-form-urlencoded"}}
    problem = serve().post("/v1/score", **given).json()["error"]  # what curl sends without -H
    assert problem.endswith("is application/x-www-form-urlencoded: send it with content-type: application/json")


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
    states, service.engine.states = service.engine.states, None  # a fault of ours
    answer = client.post("/v1/score", json={"user": "u1", "candidates": ["s1"], "time": TIME})
    service.engine.states = states
    assert (answer.status_code, answer.json()) == (500, {"error": "internal error"})


def test_events_items_recommendations_and_forgetting(serve: Serve) -> None:
    client, secret = serve(token="a secret of ours"), {"Authorization": "Bearer a secret of ours"}

    def post(path: str, **body: Any) -> Any:
        answer = client.post(path, json=body, headers=secret)
        assert answer.status_code == 200, answer.text
        return answer.json()

    asked = {"user": "u3", "time": TIME + 5, "candidates": ["s1", "s2"]}
    before = post("/v1/score", **asked)
    event = {"item": "s4", "timestamp": TIME, "label": 1, "action": "5"}
    assert post("/v1/events", user="u3", events=[event]) == {"kept": 1}
    after = post("/v1/score", **asked)
    assert after["events"] == before["events"] + 1 and after["scores"] != before["scores"]
    item = {"item": "n1", "text": {"title": "word1 word2"}, "features": {"genres": ["noir"]}}
    assert post("/v1/items", items=[item]) == {"added": 1} and post("/v1/items", items=[item]) == {"added": 0}
    found = post("/v1/recommend", user="u3", time=TIME + 5, top=50, filters={"genres": ["noir"]})["items"]
    assert {"item": "n1", "text": "word1 word2"}.items() <= next(one for one in found if one["item"] == "n1").items()
    assert "s4" not in {one["item"] for one in found} and len(found) > 1
    assert [one["score"] for one in found] == sorted((one["score"] for one in found), reverse=True)
    forgotten = client.delete("/v1/users/u3", headers=secret)
    assert forgotten.status_code == 200 and forgotten.json()["events"] == 1
    # The ids are words of a command, whatever characters they have.
    for user in ("u3", "-u 3'; $(x)"):
        remaining = client.delete(f"/v1/users/{quote(user)}", headers=secret).json()["remaining"]
        parsed = build_parser().parse_args(shlex.split(remaining.partition("hllm forget ")[2]))
        assert (parsed.dataset, parsed.user) == (fixtures.dataset().root, [user])
        assert ("still contain this user" in remaining) == (user == "u3")
    assert post("/v1/score", **asked)["events"] == 0


def test_deleting_needs_a_token_also_on_this_machine(serve: Serve) -> None:
    answer = serve().delete("/v1/users/u3")
    assert answer.status_code == 403 and "--token-file" in answer.json()["error"]


def test_metrics_count_requests_stages_cache_and_unknown_ids(serve: Serve) -> None:
    client, body = serve(), {"user": "u3", "candidates": ["s1", "s2"], "time": TIME}
    for _ in range(3):
        client.post("/v1/score", json=body)
    client.post("/v1/score", json=body | {"candidates": ["nope"]})
    text = client.get("/metrics").text
    for line in (
        'hllm_requests_total{route="/v1/score",status="200"} 3.0',
        'hllm_requests_total{route="/v1/score",status="422"} 1.0',
        "hllm_state_cache_hits_total 3.0",
        "hllm_state_cache_misses_total 1.0",
        "hllm_unknown_ids_total 1.0",
        'hllm_stage_seconds_count{stage="queue"} 4.0',
        "hllm_score_probability_count 6.0",
        "hllm_queue_requests 0.0",
    ):
        assert line in text.splitlines(), text


def test_the_log_of_requests_names_no_user_and_no_item(tmp_path: Path) -> None:
    changed = settings("early", tmp_path, optim__ema=0.0)
    engine, lines = Engine(BatchScorer(build_experiment(changed, init_distributed()))), []
    app = create_app(Service(engine, BatchLimits(deadline=60.0), "a secret of ours"), log=lines.append)
    with TestClient(app) as client:
        client.post("/v1/score", json={"user": "u3", "candidates": ["s1"]})
        client.delete("/v1/users/u3")
        client.get("/u3")
    logged = [json.loads(line) for line in lines]
    assert [(one["method"], one["route"], one["status"]) for one in logged] == [
        ("POST", "/v1/score", 401),
        ("DELETE", "/v1/users/{user}", 401),
        ("GET", "", 404),
    ]
    assert not any(name in line for line in lines for name in ("u3", "s1", "secret"))


@pytest.mark.parametrize("user", ["a/b", "/", "x/events", "50%", "a?b#c", "ü 1", "..;"])
def test_users_of_any_id_are_shown_and_deleted(serve: Serve, user: str) -> None:
    client, token = serve(token="a secret of ours"), {"Authorization": "Bearer a secret of ours"}
    event = {"item": "s1", "timestamp": TIME - 5}
    assert client.post("/v1/events", json={"user": user, "events": [event]}, headers=token).status_code == 200
    path = f"/v1/users/{quote(user, safe='')}"
    assert client.get(f"{path}/events", headers=token).json()["total"] == 1
    assert client.delete(path, headers=token).json()["events"] == 1
    assert client.get(f"{path}/events", headers=token).json()["total"] == 0


def test_a_file_that_cannot_be_written_is_503_and_said_to_the_operator(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client = serve()
    client.app.state.service.engine.log.close()  # type: ignore[attr-defined]
    event = {"item": "s1", "timestamp": TIME - 5, "label": 1}
    answer = client.post("/v1/events", json={"user": "u3", "events": [event]})
    assert answer.status_code == 503 and "has kept nothing: try again later" in answer.json()["error"]
    assert str(tmp_path) not in answer.text and f"{tmp_path}/events.sqlite: " in capsys.readouterr().out
    assert client.post("/v1/score", json={"candidates": ["s1"], "time": TIME}).status_code == 200
