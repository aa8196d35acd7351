"""Ctrl-C at the k-th file access of a job, for many k; two trainings into one folder."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hllm_torchrec.checkpoint import remote_runs
from hllm_torchrec.checkpoint.layout import checkpoints_by_step, find_damage
from hllm_torchrec.common.locks import hold_lock
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.distributed.process_group import destroy_distributed
from hllm_torchrec.launch.cli import main
from hllm_torchrec.launch.entry import INTERRUPTED
from tests.helpers.schedules import schedules
from tests.helpers.source_files import RATINGS, recbole_100k
from tests.helpers.training_fixtures import arguments, losses


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


Interrupted = Callable[[list[str], Path, int, Callable[[], object]], Iterator[tuple[int, int]]]


@pytest.fixture
def interrupted(capsys: pytest.CaptureFixture[str]) -> Interrupted:
    """Yields (k, status) of a command that is interrupted before its k-th file access; it must say so in one line."""

    def each(words: list[str], folder: Path, stride: int, fresh: Callable[[], object]) -> Iterator[tuple[int, int]]:
        def press() -> None:
            signal.raise_signal(signal.SIGINT)

        for k, status in schedules(lambda: main(words), press, folder, fresh, stride):
            destroy_distributed()
            said = capsys.readouterr().err
            assert "Traceback" not in said, (k, said)
            if status != 0:  # what was pressed too late comes to nothing
                assert status == INTERRUPTED, (k, status, said)
                assert len([line for line in said.splitlines() if words[0] in line]) == 1, (k, said)
            assert isinstance(status, int)
            yield k, status

    return each


def test_prepare_leaves_nothing_behind(tmp_path: Path, interrupted: Interrupted) -> None:
    (tmp_path / "source").mkdir()
    source = recbole_100k(tmp_path / "source", RATINGS)
    words = ["prepare", "--source", "ml-100k", "--path", str(source), "--output", str(tmp_path / "out" / "data")]
    fresh = lambda: shutil.rmtree(tmp_path / "out", ignore_errors=True)  # noqa: E731
    for k, status in interrupted(words, tmp_path, 23, fresh):
        left = [path.name for path in (tmp_path / "out").iterdir()] if (tmp_path / "out").exists() else []
        assert left in ([], ["data"]), k
        if left or status == 0:
            Dataset.open(tmp_path / "out" / "data")


@pytest.mark.slow
def test_training_saves_or_has_not_begun_and_goes_on_as_if_nothing_had_been(
    tmp_path: Path, interrupted: Interrupted, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"max_steps": 4, "evaluation__checkpoint_every": 2, "resume": True}
    assert main(["train", *arguments(tmp_path / "whole", **options)]) == 0
    right, statuses = losses(tmp_path / "whole"), []
    words = ["train", *arguments(tmp_path / "out" / "run", **options)]
    fresh = lambda: shutil.rmtree(tmp_path / "out", ignore_errors=True)  # noqa: E731
    for k, status in interrupted(words, tmp_path / "out", 53, fresh):
        statuses.append(status)
        saved = checkpoints_by_step(tmp_path / "out" / "run" / "checkpoints")
        if (tmp_path / "out" / "run" / "log.jsonl").exists() and losses(tmp_path / "out" / "run"):
            assert saved, k
        assert not [path for path in saved if find_damage(path)], k
        assert main(words) == 0, (k, capsys.readouterr().err)
        destroy_distributed()
        assert losses(tmp_path / "out" / "run") == right, k
        assert not [path for path in (tmp_path / "out" / "run" / "checkpoints").iterdir() if "tmp" in path.name], k
    assert statuses.count(INTERRUPTED) >= 2


# --- one run, one job ------------------------------------------------------------------------------------


def test_a_second_training_into_the_same_folder_is_one_line_that_names_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(remote_runs, "LOCK_WAIT", 0.0)
    run = tmp_path / "run"
    run.mkdir()
    with hold_lock(run / ".lock", "the first"):
        assert main(["train", *arguments(run, max_steps=1, resume=True)]) == 2
        said = f"output: {run}: another process trains into it, and two runs would be mixed (process {os.getpid()} on "
        assert said in capsys.readouterr().err
        assert sorted(path.name for path in run.iterdir()) == [".lock", ".lock.holder"]
    destroy_distributed()
    assert main(["train", *arguments(run, max_steps=1, resume=True)]) == 0
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == [".lock"]


def test_a_training_that_finds_a_mistake_leaves_no_folder(tmp_path: Path) -> None:
    assert main(["train", *arguments(tmp_path / "run", data__dataset=tmp_path / "nowhere")]) == 2
    assert not (tmp_path / "run").exists()
