"""`hllm serve` as a process: it answers on a socket, drains on SIGTERM, and goes on after a kill."""

import asyncio
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hllm_torchrec.common.token_file import is_loopback, read_token
from hllm_torchrec.data.event_log import EventLog, LoggedEvent
from hllm_torchrec.distributed.process_group import destroy_distributed
from hllm_torchrec.launch.loadtest import main as loadtest
from hllm_torchrec.launch.serve import default_state
from hllm_torchrec.lifecycle.releases import Release, publish
from hllm_torchrec.serving.load_test import HttpClient
from tests.helpers import fixtures
from tests.helpers.distributed import ROOT
from tests.helpers.jobs import Job
from tests.helpers.served_runs import trained

TIME = fixtures.START + 10**7
BODY = {"user": "u3", "candidates": ["s1", "s2"], "time": TIME}


class Running:
    """A served run on a free port, with events in a file of its own."""

    def __init__(self, run: Path, folder: Path, name: str) -> None:
        arguments = ["serve", "--run", str(run), "--checkpoint", "latest", "--port", "0", "--quiet"]
        arguments += ["--state", str(folder / "events.sqlite"), "--deadline", "60000"]
        self.job = Job("hllm_torchrec.launch.cli", arguments, ROOT, {**os.environ, "OMP_NUM_THREADS": "1"})
        until = time.monotonic() + 120
        said = Path(self.job._said.name) / "stdout"
        while not (found := re.search(r"http://\S+:\d+", said.read_text() if said.exists() else "")):
            assert time.monotonic() < until and self.job.poll() is None, name
            time.sleep(0.05)
        self.url = found[0]

    def ask(self, path: str, **body: Any) -> dict[str, Any]:
        status, content = asyncio.run(HttpClient(self.url).request("POST", path, json.dumps(body).encode()))
        assert status == 200, content
        answer: dict[str, Any] = json.loads(content)
        return answer


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


@pytest.mark.slow  # two processes that load a model
def test_a_service_keeps_what_it_acknowledged_and_drains_on_sigterm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = trained("early")
    first = Running(run, tmp_path, "first")
    before = first.ask("/v1/score", **BODY)
    event = {"item": "s5", "timestamp": TIME - 9, "label": 1, "action": "5"}
    load = ["--url", first.url, "--dataset", str(fixtures.dataset().root), "--rates", "40", "--seconds", "0.5"]
    assert loadtest([*load, "--candidates", "5", "--output", str(tmp_path / "load")]) == 0
    (result,) = json.loads((tmp_path / "load" / "loadtest.json").read_text())["results"]
    assert result["statuses"] == {"200": result["requests"]} and 0 < result["hit_rate"] <= 1
    assert 0 < result["latency_ms"]["p50"] <= result["latency_ms"]["p99.9"]
    assert (tmp_path / "load" / "loadtest.png").stat().st_size > 5000
    capsys.readouterr()
    assert loadtest([*load, "--candidates", "5", "--context", '{"devise": "phone"}']) == 0
    printed = capsys.readouterr().out
    assert (
        "statuses {'422'" in printed and "the first refused request: 422" in printed and "context 'devise'" in printed
    )
    assert "capacity, at a p99 of 50 ms: no rate meets it" in printed
    assert first.ask("/v1/events", user="u3", events=[event]) == {"kept": 1}
    after = first.ask("/v1/score", **BODY)
    assert after["events"] == before["events"] + 1 and after["scores"] != before["scores"]
    first.job.send_signal(signal.SIGKILL)
    first.job.wait()
    second = Running(run, tmp_path, "second")
    assert second.ask("/v1/score", **BODY)["scores"] == pytest.approx(after["scores"], abs=1e-5)

    async def asked_while_it_ends() -> list[int]:
        client = HttpClient(second.url)
        many = [asyncio.create_task(client.post_score(json.dumps(BODY).encode())) for _ in range(30)]
        await many[0]
        second.job.send_signal(signal.SIGTERM)
        return [await one for one in many]

    assert asyncio.run(asked_while_it_ends()) == [200] * 30
    second.job.wait()
    assert second.job.returncode == 0


def test_a_host_that_others_reach_needs_a_token(tmp_path: Path) -> None:
    assert is_loopback("localhost") and is_loopback("127.0.0.9") and is_loopback("::1")
    for host in ("0.0.0.0", "10.0.0.1", "example.org", "::"):
        with pytest.raises(ValueError, match=r"others can reach it: give --token-file"):
            read_token(None, host)
    (tmp_path / "token").write_text("0123456789abcdef\n")
    assert read_token(tmp_path / "token", "0.0.0.0") == "0123456789abcdef" and read_token(None, "::1") is None
    for text in ("", "short", "0123456789abcdef\nanother", "0123456789abcdé0"):
        (tmp_path / "token").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="one line of at least 16 printable ASCII characters"):
            read_token(tmp_path / "token", "localhost")


def test_the_events_of_a_service_outlive_the_runs_of_nights(tmp_path: Path) -> None:
    nights, alone = tmp_path / "nights", tmp_path / "alone"
    for run in (nights / "runs" / "a", nights / "runs" / "b", alone):
        run.mkdir(parents=True)
    assert default_state(alone) == alone / "serving" / "events.sqlite"
    earlier = EventLog(default_state(nights / "runs" / "a"))  # nothing is published: a run as any other
    earlier.append("u1", [LoggedEvent("s1", TIME)])
    publish(nights, Release("a", str(nights / "runs" / "a"), "shop", 1, TIME))
    with pytest.raises(ValueError, match="another service has it open"):
        default_state(nights / "current" / "run")
    earlier.close()
    state = default_state(nights / "current" / "run")
    assert state == nights / "serving" / "events.sqlite" and not any((nights / "runs" / "a" / "serving").iterdir())
    publish(nights, Release("b", str(nights / "runs" / "b"), "shop", 2, TIME))
    for run in ("current/run", "previous/run", "runs/b", "releases/b/run"):
        assert default_state(nights / run) == state
    log = EventLog(state)
    assert log.of_user("u1")[0] == [LoggedEvent("s1", TIME)]
    log.close()
    with pytest.raises(ValueError, match="no such file"):
        default_state(nights / "runs" / "c")
