"""The service on a Ray cluster: a killed replica loses nothing that was acknowledged (scripts/test.sh --extras)."""

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hllm_torchrec.distributed.process_group import destroy_distributed
from hllm_torchrec.serving.load_test import HttpClient
from hllm_torchrec.serving.shards import shard_of
from tests.helpers import fixtures
from tests.helpers.distributed import ROOT
from tests.helpers.served_runs import trained

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.extras
TIME, TOKEN, PORT = fixtures.START + 10**7, "a secret of these tests", 8497


@pytest.fixture
def cluster() -> Iterator[None]:
    environment = {"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield
    ray.serve.shutdown()
    ray.shutdown()


async def post(client: HttpClient, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    status, content = await client.request("POST", path, json.dumps(body).encode())
    return status, json.loads(content)


async def load(
    users: list[str], stop: threading.Event, acknowledged: dict[str, int], failed: dict[str, list[int]]
) -> None:
    """Each user sends events and asks for scores, one after the other, until the end."""

    async def one(user: str) -> None:
        client, second = HttpClient(f"http://127.0.0.1:{PORT}", TOKEN), TIME
        while not stop.is_set():
            second += 1
            event = {"item": "s5", "timestamp": second, "label": 1, "action": "5"}
            status, _ = await post(client, "/v1/events", {"user": user, "events": [event]})
            if status == 200:
                acknowledged[user] += 1
            else:
                failed[user].append(status)
            asked = {"user": user, "candidates": ["s1", "s2"], "time": second + 1}
            status, answer = await post(client, "/v1/score", asked)
            if status != 200:
                failed[user].append(status)
            await asyncio.sleep(0.05)

    await asyncio.gather(*(one(user) for user in users))


@pytest.mark.long  # two replicas that load a model, and one of them again
def test_a_killed_replica_loses_no_acknowledged_event_and_the_other_shard_answers_all(
    cluster: None, tmp_path: Path
) -> None:
    from hllm_torchrec.serving.ray_serve import Options, application

    run, _ = trained("early")
    destroy_distributed()
    (tmp_path / "token").write_text(TOKEN)
    options = Options(run=run, state=tmp_path / "state", token_file=tmp_path / "token", checkpoint="latest")
    options.deadline_ms = 20_000
    ray.serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    ray.serve.run(application(options))
    users = [f"u{number}" for number in range(6)] + ["new"]
    assert {shard_of(user, 2) for user in users} == {0, 1}
    acknowledged, failed = dict.fromkeys(users, 0), {user: [] for user in users}  # type: ignore[var-annotated]
    client = HttpClient(f"http://127.0.0.1:{PORT}", TOKEN)
    assert asyncio.run(post(HttpClient(f"http://127.0.0.1:{PORT}"), "/v1/score", {"candidates": ["s1"]}))[0] == 401
    before = {user: asyncio.run(total(HttpClient(f"http://127.0.0.1:{PORT}", TOKEN), user)) for user in users}

    stop = threading.Event()
    loader = threading.Thread(target=lambda: asyncio.run(load(users, stop, acknowledged, failed)))
    loader.start()
    time.sleep(3)
    assert all(acknowledged.values()) and not any(failed.values())
    handle = ray.serve.get_deployment_handle("shard-0", "default")
    killed = handle.process.remote().result()
    os.kill(killed, signal.SIGKILL)
    until = time.monotonic() + 120
    while time.monotonic() < until:
        try:
            if handle.process.remote().result(timeout_s=5) != killed:
                break
        except Exception:  # it is being started
            time.sleep(0.5)
    time.sleep(3)
    stop.set()
    loader.join()
    assert handle.process.remote().result() != killed

    # Requests during the restart are queued: only those in flight at the kill, or past their deadline, are refused.
    assert set().union(*failed.values()) <= {503}
    assert not any(failed[user] for user in users if shard_of(user, 2) == 1)
    for user in users:
        lost = failed[user].count(503)  # of these the shard may have kept some without saying so
        found = asyncio.run(total(HttpClient(f"http://127.0.0.1:{PORT}", TOKEN), user)) - before[user]
        assert acknowledged[user] <= found <= acknowledged[user] + lost
    client.close()


async def total(client: HttpClient, user: str) -> int:
    status, content = await client.request("GET", f"/v1/users/{user}/events?last=1")
    assert status == 200, content
    client.close()
    return int(json.loads(content)["total"])
