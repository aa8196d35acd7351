"""Checkpoints written while training goes on, and disks without room for them: nothing is lost silently."""

import re
import shutil
import subprocess
import threading
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from hllm_torchrec.checkpoint.layout import DiskFull, checkpoints_by_step
from hllm_torchrec.checkpoint.load import BackgroundWriter, latest_checkpoint, load_checkpoint, save_checkpoint
from hllm_torchrec.checkpoint.save import _PendingCheckpoint, _share_out
from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.data.loader import Loader
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.launch.train import main
from hllm_torchrec.training.trainer_setup import build_trainer
from tests.helpers.distributed import run_ranks
from tests.helpers.training_fixtures import (
    arguments,
    assert_equal_weights,
    config,
    interrupted,
    lines,
    losses,
    on_rank,
    train,
    weights,
)


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB; a checkpoint of the tiny runs has 0.6."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a tmpfs is refused here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


# --- what is written -------------------------------------------------------------------------------------


def test_what_is_written_is_the_state_at_the_call_not_the_later_one(tmp_path: Path) -> None:
    init_distributed()
    writer, w, moved = BackgroundWriter(10.0), torch.arange(4.0), threading.Event()
    plain = writer.start
    writer.start = lambda work: plain(lambda group: moved.wait(10) and work(group))  # type: ignore[method-assign]
    save_checkpoint(tmp_path, 1, {"model": {"w": w}}, {"n": 1}, background=writer)
    w.add_(100)
    moved.set()
    writer.finish()
    loaded = torch.zeros(4)
    assert load_checkpoint(tmp_path / "step-00000001", {"model": {"w": loaded}}) == {"n": 1}
    assert loaded.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_a_second_checkpoint_waits_for_the_first() -> None:
    init_distributed()
    writer, go = BackgroundWriter(10.0), threading.Event()
    writer.start(lambda group: go.wait(10))
    with pytest.raises(AssertionError, match="another checkpoint is in flight"):
        writer.start(lambda group: None)
    go.set()
    writer.finish()
    writer.finish()  # nothing to wait for


def test_what_fails_on_the_thread_is_raised_once_it_is_finished(tmp_path: Path) -> None:
    init_distributed()
    writer = BackgroundWriter(10.0)
    (tmp_path / "checkpoints").write_text("a file in the way")
    save_checkpoint(tmp_path / "checkpoints", 1, {"model": {"w": torch.ones(1)}}, {}, background=writer)
    with pytest.raises(FileExistsError):
        writer.finish()
    assert not writer.failed


def test_each_replicated_tensor_is_one_ranks_to_write() -> None:
    sizes = [{"a": 8, "b": 4, "c": 4, "d": 1}, {"a": 8, "b": 4, "c": 4, "d": 1, "mine": 1}]
    assert _share_out(sizes) == [{"a", "d"}, {"b", "c", "mine"}]


ASYNC = {"reliability__asynchronous_checkpoints": True, "evaluation__checkpoint_every": 1, "evaluation__keep_last": 100}


@pytest.mark.slow
def test_a_run_is_the_same_and_so_are_its_checkpoints(tmp_path: Path) -> None:
    options = {"max_steps": 4, "optim__ema": 0.9, "evaluation__every": 0.25}
    plain = train(config(tmp_path / "plain", **{**options, **ASYNC, "reliability__asynchronous_checkpoints": False}))
    other = train(config(tmp_path / "async", **options, **ASYNC))
    assert_equal_weights(weights(other), weights(plain))
    for one, two in zip(
        *(checkpoints_by_step(tmp_path / name / "checkpoints") for name in ("plain", "async")), strict=True
    ):
        assert one.name == two.name
        assert (one / "__0_0.distcp").read_bytes() == (two / "__0_0.distcp").read_bytes()
    assert [line["step"] for line in lines(tmp_path / "async", "checkpoint")] == [1, 2, 3, 4]
    assert not [thread for thread in threading.enumerate() if thread.name == "hllm-checkpoint"]


@pytest.mark.slow
@pytest.mark.parametrize("dense", ["ddp", "fsdp"])
def test_two_ranks_write_in_the_background_and_one_goes_on(dense: str, tmp_path: Path) -> None:
    common = {"optim__lr": 0.002, "optim__item_llm_lr": 0.002}
    train(config(tmp_path / "one", data__batch_users=4, **common))
    settings = config(tmp_path / "two", data__batch_users=2, parallel__dense=dense, **ASYNC, **common)
    run_ranks(on_rank, 2, settings)
    assert len(checkpoints_by_step(tmp_path / "two" / "checkpoints")) == 8
    cut = interrupted(tmp_path / "two", tmp_path / "cut", 4)
    train(config(cut, data__batch_users=4, resume=True, **common))
    assert lines(cut, "start")[-1]["step"] == 4
    assert losses(cut) == pytest.approx(losses(tmp_path / "one"), abs=1e-4)


# --- full disks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_one_line_and_older_checkpoints_stay(
    asynchronous: bool, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {**ASYNC, "reliability__asynchronous_checkpoints": asynchronous, "max_steps": 8}
    run = small_disk / "run"
    assert main(arguments(run, **options)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    kept = [path.name for path in sorted((run / "checkpoints").iterdir())]
    last = len(kept)
    assert kept == [f"step-{step:08d}" for step in range(1, last + 1)] and 1 <= last < 8
    assert f"{run}/checkpoints/step-{last + 1:08d}: not written, the disk is full: it needs " in line
    assert "bytes, and" in line
    assert latest_checkpoint(run / "checkpoints") == run / "checkpoints" / kept[-1]


def test_a_run_may_go_on_without_a_checkpoint_but_not_without_the_last(
    small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {**ASYNC, "reliability__disk_full": "go_on"}
    (small_disk / "filling").write_bytes(bytes(1600 * 1024))
    with pytest.raises(DiskFull):
        train(config(small_disk / "run", max_steps=3, **options))
    assert len(losses(small_disk / "run")) == 3
    assert [line["step"] for line in lines(small_disk / "run", "not_saved")] == [1, 2, 3]
    assert "not written, the disk is full: it needs" in capsys.readouterr().out
    assert not list((small_disk / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize("free", [0, 8192])
def test_a_start_on_a_full_disk_is_one_line_that_names_a_path(
    free: int, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (small_disk / "filling").write_bytes(bytes(shutil.disk_usage(small_disk).free - free))
    assert main(arguments(small_disk / "run", max_steps=2)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line or "Traceback" in line]
    assert re.fullmatch(rf"train: error: \[Errno 28\] No space left on device: '{small_disk}/run/[\w./]+'", line)


class FullWhileRead(Loader):
    """A loader in whose second batch the disk `folder` has no free byte left, and in whose fifth it has room again."""

    folder = Path()

    def batches(self, epoch: int, first_step: int = 0) -> Generator[HybridBatch, None, None]:
        for number, batch in enumerate(super().batches(epoch, first_step)):
            if number == 1:
                with suppress(OSError), (self.folder / "filling").open("wb", buffering=0) as file:
                    while file.write(bytes(4096)):
                        pass
            if number == 4:
                (self.folder / "filling").unlink()
            yield batch


def test_a_run_that_may_go_on_goes_on_without_a_free_byte_and_loses_no_line(
    small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"reliability__disk_full": "go_on", "evaluation__checkpoint_every": 2, "max_steps": 6}
    trainer = build_trainer(config(small_disk / "run", **options), init_distributed())
    loader = trainer._loader(trainer.schedule.segments[0].stage)
    loader.__class__, loader.prefetch, loader.folder = FullWhileRead, 0, small_disk  # not ahead, on a thread
    trainer.run()
    assert len(losses(small_disk / "run")) == 6 and len(lines(small_disk / "run", "end")) == 1
    assert [line["step"] for line in lines(small_disk / "run", "not_saved")] == [2, 4]
    assert [path.name[-1] for path in checkpoints_by_step(small_disk / "run" / "checkpoints")] == ["6"]
    assert "Traceback" not in capsys.readouterr().err


def fill_on_rank_one(folder: Path) -> str:
    """Two ranks write more than is left, nearly all of it rank 1."""
    size = 30_000 if dist.get_rank() == 1 else 10
    state = {"model": {f"w{dist.get_rank()}": torch.ones(size)}}
    save_checkpoint(folder / "checkpoints", 1, {"model": {f"w{dist.get_rank()}": torch.ones(10)}}, {})
    try:
        save_checkpoint(folder / "checkpoints", 2, state, {})
    except Exception as error:
        return f"{getattr(error, 'kind', '')} {type(error).__name__}: {error}"
    return "saved"


def test_a_disk_that_fills_while_it_is_written_to_is_noticed_too(small_disk: Path) -> None:
    (small_disk / "filling").write_bytes(bytes(1900 * 1024))
    tensors, own = {"w": torch.ones(100_000)}, {"extra.json": {}}
    draft = _PendingCheckpoint(
        small_disk / "step-00000001", tensors, DefaultSavePlanner(), own, {}, keep_last=1, needed=0
    )
    with pytest.raises(DiskFull, match="step-00000001: not written, the disk is full"):
        draft.write()
    assert [path.name for path in small_disk.iterdir()] == ["filling"]


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_rank_is_so_for_all(small_disk: Path) -> None:
    (small_disk / "filling").write_bytes(bytes(1900 * 1024))
    outcomes = run_ranks(fill_on_rank_one, 2, small_disk)
    assert outcomes[0].startswith(" DiskFull: ")
    assert outcomes[1].startswith("DiskFull PeerFailed: rank 0 failed: DiskFull: ")
    assert [path.name for path in (small_disk / "checkpoints").iterdir()] == ["step-00000001"]
