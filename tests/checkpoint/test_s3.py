"""A dataset, a run and two stores that live in a bucket: jobs as processes, against moto's server."""

import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hllm_torchrec.common.urls import CACHE, create_file, list_files, read_text, upload_files
from hllm_torchrec.data.remote_datasets import publish_dataset
from hllm_torchrec.store import EmbeddingStore
from tests.helpers import fixtures
from tests.helpers.jobs import Job
from tests.helpers.processes import environment
from tests.helpers.training_fixtures import arguments

pytest.importorskip("s3fs")
pytest.importorskip("moto")

SERVER = """
import sys
from moto.server import main
main(["-H", "127.0.0.1", "-p", sys.argv[1]])
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of an S3-like server."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = str(listener.getsockname()[1])
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", SERVER, port], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while True:
            with socket.socket() as caller:
                if caller.connect_ex(("127.0.0.1", int(port))) == 0:
                    break
            assert process.poll() is None and time.monotonic() < deadline, (folder / "server.log").read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def shop(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket of that name; this process and its children have the server's address and credentials."""
    import s3fs

    given = {"AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    for name, value in {**given, "AWS_DEFAULT_REGION": "us-east-1", CACHE: str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # it keeps the address and the credentials of the test before
    s3fs.S3FileSystem().makedirs("shop", exist_ok=True)


def start(job: str, given: list[str], root: Path, cwd: Path) -> Job:
    """A job as a process of its own."""
    return Job(f"hllm_torchrec.launch.{job}", given, cwd, environment(root))


def run(job: str, given: list[str], root: Path, cwd: Path) -> str:
    """Run a job to its end; what it said."""
    process = start(job, given, root, cwd)
    said = "".join(process.communicate(timeout=280))
    assert process.returncode == 0, said
    return said


@pytest.mark.slow
def test_what_goes_wrong_is_said_in_one_line(shop: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"s3://none/x: not found \(.*bucket does not exist.*\): check that the bucket"
    ):
        upload_files(fixtures.dataset().root, ["manifest.json"], "s3://none/x")
    assert read_text("s3://none/x/manifest.json") is None and list_files("s3://none/x") == {}
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(ValueError, match=r"s3://shop/x: no credentials \(.*\): set AWS_ACCESS_KEY_ID and AWS_SECRET"):
        upload_files(fixtures.dataset().root, ["manifest.json"], "s3://shop/x")


@pytest.mark.slow
def test_prepare_train_resume_evaluate_and_embed_in_a_bucket(shop: None, root: Path, tmp_path: Path) -> None:
    """A training job is killed and its host lost; another host goes on, evaluates and embeds."""
    publish_dataset(fixtures.dataset().root, "s3://shop/data")  # as `hllm prepare` does with what it has written
    given = arguments(Path("x"), data__dataset="s3://shop/data", evaluation__checkpoint_every=6)
    given = [option for option in given if not option.startswith("--output=")]
    given += ["--output=s3://shop/runs/one", "--stages=[{name: only, epochs: 3}]", "--resume=true"]
    process = start("train", given, root, tmp_path)
    deadline = time.monotonic() + 240
    while not any(name.endswith("/COMPLETE") for name in list_files("s3://shop/runs/one/checkpoints")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=9)
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    shutil.rmtree(tmp_path / "cache")
    first = max(name for name in list_files("s3://shop/runs/one/checkpoints") if name.endswith("/COMPLETE"))
    run("train", given, root, tmp_path)
    log = read_text("s3://shop/runs/one/log.jsonl") or ""
    assert '"event": "end"' in log
    starts = [int(step) for step in re.findall(r'"event": "start", "step": (\d+)', log)]
    assert starts[-1] == int(first.split("/")[0].removeprefix("step-")) > 0

    shutil.rmtree(tmp_path / "cache")
    said = run("evaluate", ["--run-dir", "s3://shop/runs/one", "--draws", "0"], root, tmp_path)
    assert "one" in said and '"auc"' in (read_text("s3://shop/runs/one/metrics.json") or "")
    assert any(name.startswith("predictions/test/part-") for name in list_files("s3://shop/runs/one"))

    stores = ["--items", "s3://shop/stores/items", "--users", "s3://shop/stores/users"]
    said = run("embed", ["--run-dir", "s3://shop/runs/one", *stores], root, tmp_path)
    items = len(fixtures.dataset().items)
    assert f"embedded {items} of {items} items" in said and "; s3://shop/stores/items is at version" in said
    store = EmbeddingStore.open("s3://shop/stores/items")
    assert len(store.snapshot()) == items and store.verify() == []
    assert len(EmbeddingStore.open("s3://shop/stores/users").snapshot()) > 0
    assert not (tmp_path / "s3:").exists()


@pytest.mark.slow
def test_a_file_is_created_by_one_job_only(shop: None) -> None:
    assert create_file("s3://shop/commits/1.json", "one") and not create_file("s3://shop/commits/1.json", "two")
    assert read_text("s3://shop/commits/1.json") == "one"
