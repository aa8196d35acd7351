"""Whatever a client sends, the service answers with a status that its OpenAPI document names, and never with 500.

HLLM_FUZZ_REQUESTS=10000 sends so many; the default is small.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from hllm_torchrec.data.event_log import EventLog
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.models.assembly import build_experiment
from hllm_torchrec.serving.app import create_app
from hllm_torchrec.serving.batch_scorer import BatchScorer
from hllm_torchrec.serving.engine import Engine
from hllm_torchrec.serving.micro_batches import BatchLimits
from hllm_torchrec.serving.service import Service
from tests.helpers import served_runs

REQUESTS = int(os.environ.get("HLLM_FUZZ_REQUESTS", "120"))
SECRET = {"Authorization": "Bearer a secret of ours", "Content-Type": "application/json"}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
IDS = st.sampled_from(["s1", "s2", "s39"])
ODD = st.sampled_from(["nope", "", "s1\x00", "\N{ELECTRIC LIGHT BULB}" * 300, "\ud800", "-1"])
SECONDS = st.sampled_from([0, 1_400_000_000, 1_410_000_000, 4_102_444_799])
EVENTS = st.lists(
    st.fixed_dictionaries(
        {"item": IDS, "timestamp": st.just(1_400_000_000)},
        optional={"label": st.sampled_from([None, 0, 0.5, 1]), "action": st.sampled_from([None, "5"])},
    ),
    min_size=1,
    max_size=3,
)
BODIES: dict[str, Any] = {
    "/v1/score": {"user": IDS, "candidates": st.lists(IDS, min_size=1, max_size=4), "time": SECONDS, "history": EVENTS},
    "/v1/recommend": {
        "user": IDS,
        "top": st.integers(1, 50),
        "time": SECONDS,
        "filters": st.dictionaries(st.just("genres"), st.lists(st.sampled_from(["noir", "x"]), max_size=2)),
    },
    "/v1/events": {"user": st.sampled_from(["u3", "somebody"]), "events": EVENTS},
    "/v1/items": {
        "items": st.lists(
            st.fixed_dictionaries({"item": st.sampled_from(["n1", "n2", "s1"]), "text": st.just({"title": "word1"})}),
            min_size=1,
            max_size=2,
            unique_by=lambda item: item["item"],
        )
    },
}
WRONG = ODD | JSON | st.sampled_from([-1, 2**70, 4_102_444_800, 1e400, [], [[]], [{}], {"x": ["y"]}])


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("fuzz")
    changed = served_runs.settings("early", folder, optim__ema=0.0)
    scorer = BatchScorer(build_experiment(changed, init_distributed()), journal=folder / "new_items.jsonl")
    log = EventLog(folder / "events.sqlite")
    service = Service(Engine(scorer, log), BatchLimits(deadline=60.0), "a secret of ours")
    with TestClient(create_app(service, None), raise_server_exceptions=False) as made:
        yield made
    log.close()
    destroy_distributed()


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, bytes]:
    path = draw(st.sampled_from(list(BODIES)))
    body: Any = draw(st.fixed_dictionaries(BODIES[path]))
    if draw(st.booleans()):  # one wrong value, at the top or within a list
        name = draw(st.sampled_from([*body, "another"]))
        inner = body.get(name)
        if isinstance(inner, list) and draw(st.booleans()):
            place = inner[0] if isinstance(inner[0], dict) else inner
            place[draw(st.sampled_from(list(place))) if isinstance(place, dict) else 0] = draw(WRONG)
        else:
            body[name] = draw(WRONG)
    if draw(st.integers(0, 19)) == 0:
        return path, draw(st.binary(max_size=20) | JSON.map(lambda value: json.dumps(value).encode()))
    return path, json.dumps(body).encode("utf-8", "surrogatepass")


@pytest.mark.slow
def test_no_request_is_answered_with_500(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    seen: Counter[int] = Counter()

    @settings(
        max_examples=REQUESTS,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(requests())
    def send(request: tuple[str, bytes]) -> None:
        path, content = request
        answer = client.post(path, content=content, headers=SECRET)
        named = {int(status) for status in document["paths"][path]["post"]["responses"]}
        assert answer.status_code in named, (path, content, answer.text)
        assert answer.status_code == 200 or list(answer.json()) == ["error"]
        seen[answer.status_code] += 1

    send()
    assert seen[200] > 0.1 * REQUESTS and seen[422] > 0.1 * REQUESTS, seen


@pytest.mark.parametrize("path", ["/v1/users/%00", "/v1/users/%ff%fe", "/v1/users/" + "x" * 300, "/v1/users/a/b"])
def test_names_of_users_in_paths_may_be_anything(client: TestClient, path: str) -> None:
    assert client.delete(path, headers=SECRET).status_code in (200, 404, 422)
