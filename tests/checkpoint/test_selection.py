"""Reading checkpoints while the run that writes them prunes, replaces and adds them; errors of the machine."""

import errno
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from hllm_torchrec.checkpoint.layout import prune_checkpoints, remove_checkpoint
from hllm_torchrec.checkpoint.load import best_checkpoint, latest_checkpoint, load_checkpoint, save_checkpoint
from hllm_torchrec.checkpoint.remote_runs import local_run
from hllm_torchrec.checkpoint.selection import CheckpointGone, read_checkpoint, unchanged, verify_checkpoint
from hllm_torchrec.common.atomic_files import exchange_folders
from hllm_torchrec.common.locks import Locked
from hllm_torchrec.evaluation.run_loader import find_checkpoint
from tests.helpers.schedules import schedules

METRICS = {1: 0.1, 2: 0.9, 3: 0.2, 4: 0.3, 5: 0.95, 6: 0.4}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints 1 to 6 of a run, all kept, and another one of step 2."""
    root = tmp_path_factory.mktemp("made")
    for step, metric in METRICS.items():
        _save(root / "run", step, float(step), metric)
    _save(root / "other", 2, 20.0, 0.9)
    return root


def _save(directory: Path, step: int, value: float, metric: float) -> None:
    state = {"model": {"w": torch.full((4,), value)}}
    save_checkpoint(directory, step, state, {"value": value}, keep_last=100, keep_best="max", metric=metric)


def _read(find: Callable[[], Path | None]) -> float:
    """The value of the checkpoint that `find` finds; its two parts must agree."""
    w = torch.zeros(4)
    extra = read_checkpoint(
        lambda: find() or pytest.fail("found none"), lambda path: load_checkpoint(path, {"model": {"w": w}})
    )
    assert w.tolist() == [extra["value"]] * 4
    return float(extra["value"])


class Run:
    """A run with three checkpoints, of which others are added and pruned."""

    def __init__(self, made: Path, folder: Path) -> None:
        self.made, self.folder = made, folder

    def start(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        for step in (1, 2, 3):
            self._take("run", step)

    def prune_one(self) -> None:
        remove_checkpoint(self.folder / "step-00000001")

    def go_on(self) -> None:
        """Three newer ones, and only the newest is kept, and the best."""
        for step in (4, 5, 6):
            self._take("run", step)
        prune_checkpoints(self.folder / "step-00000006", 1)

    def write_again(self) -> None:
        """A run that resumed earlier writes the best one's step again."""
        beside = self.folder / "step-00000002.tmp-0"
        shutil.copytree(self.made / "other" / "step-00000002", beside)
        assert exchange_folders(beside, self.folder / "step-00000002")
        shutil.rmtree(beside)

    def _take(self, name: str, step: int) -> None:
        # Links: a copy of the bytes is not needed, as checkpoints are never changed in place.
        shutil.copytree(self.made / name / f"step-{step:08d}", self.folder / f"step-{step:08d}", copy_function=os.link)


@pytest.mark.parametrize(
    ("action", "find", "allowed"),
    [
        ("prune_one", best_checkpoint, {2.0}),
        ("go_on", best_checkpoint, {2.0, 5.0}),
        ("write_again", best_checkpoint, {2.0, 20.0}),
        ("prune_one", latest_checkpoint, {3.0}),
        ("go_on", latest_checkpoint, {3.0, 6.0}),
    ],
)
def test_a_reader_of_a_run_that_goes_on_gets_one_whole_checkpoint(
    made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, action: str, find: Callable, allowed: set[float]
) -> None:
    run = Run(made, tmp_path / "checkpoints")
    results = dict(schedules(lambda: _read(lambda: find(run.folder)), getattr(run, action), run.folder, run.start))
    assert len(results) > 30
    assert set(results.values()) <= allowed, results
    assert "skipped" not in caplog.text


def test_one_that_is_named_and_goes_is_a_typed_error(made: Path, tmp_path: Path) -> None:
    run = Run(made, tmp_path / "checkpoints")
    path = run.folder / "step-00000001"
    results = schedules(lambda: _read(lambda: verify_checkpoint(path)), run.prune_one, run.folder, run.start)
    errors = [error for _, error in results if error != 1.0]
    assert {type(error) for error in errors} <= {CheckpointGone, ValueError} and len(errors) > 10
    assert not [str(error) for error in errors if "damaged" in str(error)]


def test_one_that_goes_while_it_is_read_says_so(made: Path, tmp_path: Path) -> None:
    run = Run(made, tmp_path / "checkpoints")
    run.start()
    with pytest.raises(CheckpointGone, match="step-00000001 was removed or replaced while it was read"):
        with unchanged(run.folder / "step-00000001"):
            run.prune_one()
    with pytest.raises(KeyError), unchanged(run.folder / "step-00000002"):
        raise KeyError  # the error of a checkpoint that stays


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES, errno.ENOMEM])
def test_an_error_of_the_machine_passes_no_checkpoint_over(
    made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    run = Run(made, tmp_path / "checkpoints")
    run.start()

    def fail() -> None:
        raise MemoryError if number == errno.ENOMEM else OSError(number, os.strerror(number), "a file")

    with caplog.at_level(logging.WARNING):
        results = dict(schedules(lambda: _read(lambda: latest_checkpoint(run.folder)), fail, run.folder))
    assert len(results) > 15
    for result in results.values():
        # Where a library looks whether a file exists, it may take the error for "no" and go on; never to another one.
        assert result == 3.0 or isinstance(result, MemoryError) or getattr(result, "errno", 0) == number, result
    assert sum(result != 3.0 for result in results.values()) > 10
    assert "skipped" not in caplog.text and "damaged" not in caplog.text


def _interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("what", ["load", "save"])
def test_ctrl_c_is_no_failure_of_a_checkpoint(made: Path, tmp_path: Path, what: str) -> None:
    run = Run(made, tmp_path / "checkpoints")
    run.start()

    def work() -> str:
        try:
            if what == "load":
                _read(lambda: latest_checkpoint(run.folder))
            else:
                _save(run.folder, 7, 7.0, 0.5)
        except KeyboardInterrupt:
            return "interrupted"
        return "done"

    results = [result for _, result in schedules(work, _interrupt, run.folder)]
    assert len(results) > 30 and set(results) <= {"interrupted", "done"} and results.count("interrupted") > 20
    assert latest_checkpoint(run.folder)
    assert not [path.name for path in run.folder.iterdir() if "tmp" in path.name]


# --- copies of a URL -------------------------------------------------------------------------------------


def _bring(url: str) -> None:
    """Another process of this host brings its copy up to date; it gives up if this one has the lock."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HLLM_LOCK_WAIT", "0")
        with suppress(Locked):
            local_run(url, "latest")


@pytest.mark.slow
@pytest.mark.parametrize(("which", "allowed"), [("best", {2.0, 5.0}), ("latest", {3.0, 6.0})])
def test_a_reader_of_a_copy_gets_one_whole_checkpoint_whatever_happens_at_the_url(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str, allowed: set[float]
) -> None:
    monkeypatch.setenv("HLLM_CACHE", str(tmp_path / "cache"))
    run, url = Run(made, tmp_path / "bucket" / "checkpoints"), f"file://{tmp_path}/bucket"

    def fresh() -> None:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        run.start()
        (tmp_path / "bucket" / "config.yaml").write_text("{}")

    def go_on() -> None:
        run.go_on()
        _bring(url)

    read = lambda: _read(lambda: find_checkpoint(Path(url), which))  # noqa: E731
    results = dict(schedules(read, go_on, tmp_path, fresh, stride=7))
    assert len(results) > 30
    assert set(results.values()) <= allowed, results


def test_a_record_of_a_copy_that_was_cut_is_no_obstacle(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HLLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "config.yaml").write_text("{}")
    local = local_run(f"file://{tmp_path}/bucket")
    (local / ".fetched.json").write_text('{"config.yaml": [2, ')
    assert (local_run(f"file://{tmp_path}/bucket") / "config.yaml").read_text() == "{}"
