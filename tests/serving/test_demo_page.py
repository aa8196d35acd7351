"""The page at / in a real browser (scripts/test.sh --extras): Chromium of the machine, or of `playwright install`."""

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.models.assembly import build_experiment
from hllm_torchrec.serving.app import create_app
from hllm_torchrec.serving.batch_scorer import BatchScorer
from hllm_torchrec.serving.engine import Engine
from hllm_torchrec.serving.micro_batches import BatchLimits
from hllm_torchrec.serving.service import Service
from tests.helpers import fixtures
from tests.helpers.served_runs import settings

playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.extras
TOKEN = "a secret of these tests"


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    experiment = build_experiment(settings("early", tmp_path, optim__ema=0.0), init_distributed())
    engine = Engine(BatchScorer(experiment, journal=tmp_path / "new.jsonl"))
    app = create_app(Service(engine, BatchLimits(deadline=60.0), TOKEN), log=None)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()
    destroy_distributed()


@pytest.mark.slow
def test_the_page_shows_a_users_history_and_recommendations(url: str) -> None:
    dataset = fixtures.dataset()
    titles = set(dataset.text(["title"])["title"].to_pylist())
    events = max(dataset.user_events(user + 1).timestamps.size for user in range(3))
    user = next(f"u{user}" for user in range(3) if dataset.user_events(user + 1).timestamps.size == events)
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page, said = browser.new_page(), []
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(url)
        page.fill("#user", user)
        page.click("button")
        page.locator("#said.wrong").wait_for()
        assert "give the service's token" in page.text_content("#said")
        page.fill("#token", TOKEN)
        page.click("button")
        page.locator("#items td").first.wait_for()
        rows = page.locator("#items tr").all_text_contents()
        assert len(rows) == 12 and all(0 < float(row[:5]) < 1 for row in rows)
        assert any(title and title in row for title in titles for row in rows)
        assert page.locator("#history tr").count() == min(20, events)
        assert f"latest of {events} events" in page.text_content("#past")
        assert page.text_content("#said").startswith("answered in ") and said == []
        browser.close()
