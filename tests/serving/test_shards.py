"""A user's requests go to one shard, whatever their form, and its events stay where they are."""

import asyncio
import json
from collections import Counter
from pathlib import Path

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client import Counter as Counted
from prometheus_client.parser import text_string_to_metric_families

from hllm_torchrec.serving.http_rules import BodyLimit
from hllm_torchrec.serving.request_schema import MAX_BODY
from hllm_torchrec.serving.shards import ask_application, merged_metrics, shard_of, state_file, user_of


@pytest.mark.parametrize("user", ["u7", "a/b", "x/events", "50%", "a%41", "\N{LATIN SMALL LETTER U WITH DIAERESIS} 1"])
def test_all_requests_of_a_user_name_the_user(user: str) -> None:
    # A server has decoded the path.
    assert user_of("GET", f"/v1/users/{user}/events", b"") == user_of("DELETE", f"/v1/users/{user}", b"") == user
    assert user_of("POST", "/v1/score", json.dumps({"user": user}).encode()) == user


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"user": null}', b'{"user": 7}', b'"u7"', b"\xff"])
def test_other_bodies_name_nobody(body: bytes) -> None:
    assert user_of("POST", "/v1/score", body) is None


def test_users_are_spread_and_stay() -> None:
    found = Counter(shard_of(f"u{number}", 3) for number in range(300))
    assert set(found) == {0, 1, 2} and min(found.values()) > 70
    assert [shard_of(user, 5) for user in ("u1", "u2", "\ud800")] == [0, 4, 4]  # by any process, at any time


def test_the_events_of_another_number_of_shards_are_not_passed_over(tmp_path: Path) -> None:
    file = state_file(tmp_path, 1, 2)
    file.touch()
    assert state_file(tmp_path, 1, 2) == file != state_file(tmp_path, 0, 2)
    with pytest.raises(ValueError, match="has the events of 2 shards: give shards=2, or another state"):
        state_file(tmp_path, 0, 3)
    assert state_file(tmp_path / "another", 0, 3).name == "shard-0-of-3.sqlite"


def test_an_application_is_asked_as_over_http() -> None:
    app = FastAPI()
    app.add_middleware(BodyLimit)

    @app.post("/echo/{name:path}")
    async def echo(name: str, request: Request) -> JSONResponse:
        body = await request.body()
        return JSONResponse([name, request.query_params["a"], request.headers["x-own"], len(body)], 201)

    scope = {"method": "POST", "path": "/echo/a/b", "query_string": b"a=1", "headers": [(b"x-own", b"2")]}
    status, headers, body = asyncio.run(ask_application(app, scope, b"xyz"))
    assert (status, json.loads(body)) == (201, ["a/b", "1", "2", 3])
    assert dict(headers)[b"content-type"] == b"application/json"
    assert asyncio.run(ask_application(app, scope, b"x" * (MAX_BODY + 1)))[0] == 413


def test_the_metrics_of_all_shards_are_told_apart() -> None:
    def metrics(requests: int) -> str:
        registry = CollectorRegistry()
        Counted("hllm_requests", "Answers", ["route"], registry=registry).labels("/v1/score").inc(requests)
        Histogram("hllm_stage_seconds", "Time", buckets=[1.0], registry=registry).observe(requests)
        return generate_latest(registry).decode()

    text = merged_metrics([metrics(3), None, metrics(5)]).decode()
    found = {family.name: family for family in text_string_to_metric_families(text)}
    counts = {
        sample.labels["shard"]: (sample.labels["route"], sample.value)
        for sample in found["hllm_requests"].samples
        if sample.name == "hllm_requests_total"
    }
    assert counts == {"0": ("/v1/score", 3.0), "2": ("/v1/score", 5.0)}
    assert found["hllm_stage_seconds"].type == "histogram"
    assert [sample.value for sample in found["hllm_shard_up"].samples] == [1.0, 0.0, 1.0]
    assert text.count("# TYPE hllm_requests_total counter") == 1  # a family once, with the samples of all shards
