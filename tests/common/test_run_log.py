"""The run's log, TensorBoard, progress bars and provenance."""

import fcntl
import json
import os
import pty
import resource
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hllm_torchrec.common import machine
from hllm_torchrec.common import progress as progress_module
from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.common.machine import machine_info, peak_memory_bytes
from hllm_torchrec.common.progress import progress
from hllm_torchrec.common.run_log import RunLog, read_log
from hllm_torchrec.common.warning_filters import quiet_libraries
from hllm_torchrec.config.encoders import ItemLLMConfig, UserEncoderConfig
from hllm_torchrec.config.schema import Config, LogsConfig
from hllm_torchrec.models.backbones import build_backbone
from hllm_torchrec.training.wandb_sink import open_run_log

SASREC = {"width": 8, "layers": 1}


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's numbers: name -> (step, value) in order."""
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    names = events.Tags()["scalars"]
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


def test_a_line_is_one_json_object_and_its_numbers_are_in_tensorboard(tmp_path: Path) -> None:
    before = time.time()
    with RunLog(tmp_path, rank=0) as log:
        log.write("step", 3, loss=torch.tensor(0.5), rate=np.float32(2.0), note="x", done=True, none=None)
        log.write("eval", 4, auc=0.75, slices={"cold": {"auc": 0.25, "users": 7}}, counts=[1, (2, 3)])
    lines = read_log(tmp_path)
    assert before - 1 < lines[0].pop("time") < time.time() + 1
    del lines[1]["time"]
    assert lines == [
        {"event": "step", "step": 3, "loss": 0.5, "rate": 2.0, "note": "x", "done": True, "none": None},
        {
            "event": "eval",
            "step": 4,
            "auc": 0.75,
            "slices": {"cold": {"auc": 0.25, "users": 7}},
            "counts": [1, [2, 3]],
        },
    ]
    assert scalars(tmp_path) == {
        "step/loss": [(3, 0.5)],
        "step/rate": [(3, 2.0)],
        "eval/auc": [(4, 0.75)],
        "eval/slices/cold/auc": [(4, 0.25)],
        "eval/slices/cold/users": [(4, 7.0)],
    }


def test_a_line_can_be_read_before_the_log_is_closed(tmp_path: Path) -> None:
    with RunLog(tmp_path, rank=0) as log:
        log.write("step", 1, loss=1.0)
        assert read_log(tmp_path)[0]["loss"] == 1.0


def test_numbers_that_json_has_not_are_null(tmp_path: Path) -> None:
    with RunLog(tmp_path, rank=0) as log:
        log.write("step", 1, loss=float("nan"), more=[float("inf"), torch.tensor(float("-inf"))])
    line = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert line["loss"] is None
    assert line["more"] == [None, None]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run", rank=1) as log:
        log.write("step", 1, loss=1.0)
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_drops_what_it_repeats(tmp_path: Path) -> None:
    with RunLog(tmp_path, rank=0) as log:
        for step in (1, 2, 3):
            log.write("step", step, loss=float(step))
        log.write("eval", 3, auc=0.5)
        log.write("stage", 3, name="two")
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"event": "step", "st')  # a crash
    crashed = int(time.time())
    while int(time.time()) == crashed:  # TensorBoard orders files by the second in their names
        time.sleep(0.02)
    with RunLog(tmp_path, rank=0, resumed_step=2) as log:
        log.write("step", 3, loss=30.0)
    lines = [(line["event"], line["step"], line.get("loss")) for line in read_log(tmp_path)]
    assert lines == [("step", 1, 1.0), ("step", 2, 2.0), ("stage", 3, None), ("step", 3, 30.0)]
    assert scalars(tmp_path)["step/loss"] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_log_without_resuming_is_appended_to(tmp_path: Path) -> None:
    for step in (5, 1):
        with RunLog(tmp_path, rank=0) as log:
            log.write("eval", step)
    assert [line["step"] for line in read_log(tmp_path)] == [5, 1]


def test_what_the_log_cannot_hold_is_named(tmp_path: Path) -> None:
    with RunLog(tmp_path, rank=0) as log:
        with pytest.raises(ValueError, match=r"counts\[1\].x is a Tensor; the log takes text, numbers"):
            log.write("step", 1, counts=[0, {"x": torch.ones(2)}])
        with pytest.raises(ValueError, match="eval: the name 'time' is reserved by the log"):
            log.write("eval", 1, time=2.0)
    assert read_log(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB without a free byte but what its file `filling` takes."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is refused here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    filling = folder / "filling"
    with pytest.raises(OSError, match="No space left"), filling.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    return filling


def test_lines_of_a_full_disk_are_written_once_there_is_room(small_disk: Path) -> None:
    run = small_disk / "run"
    with RunLog(run, rank=0, bears_full_disk=True) as log:
        log.write("step", 1, loss=1.0)
        filling = fill(small_disk)
        for step in range(2, 100):  # more than the rest of the last block of either file
            log.write("step", step, loss=float(step), note="x" * 100)
        filling.unlink()
        log.write("step", 100, loss=100.0)
    assert [line["step"] for line in read_log(run)] == list(range(1, 101))
    in_tensorboard = dict(scalars(run)["step/loss"])
    assert {1, 100} <= in_tensorboard.keys() and all(step == loss for step, loss in in_tensorboard.items())


def test_a_full_disk_is_an_error_that_names_the_log(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OSError, match=f"No space left on device: '{small_disk}/run/log.jsonl'"):
        with RunLog(small_disk / "run", rank=0) as log:
            fill(small_disk)
            for step in range(100):
                log.write("step", step, note="x" * 1000)
    assert all(line["step"] == number for number, line in enumerate(read_log(small_disk / "run")))
    assert "Traceback" not in capsys.readouterr().err


def test_what_a_full_disk_has_not_taken_at_the_end_is_said(
    small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLog(small_disk / "run", rank=0, bears_full_disk=True) as log:
        fill(small_disk)
        for step in range(100):
            log.write("step", step, note="x" * 1000)
    written = len(read_log(small_disk / "run"))
    said = f"{small_disk}/run/log.jsonl: the disk is full: the last {100 - written} lines are missing\n"
    assert capsys.readouterr().err == said


def test_closing_twice_is_allowed(tmp_path: Path) -> None:
    log = RunLog(tmp_path, rank=0)
    log.close()
    log.close()
    assert (tmp_path / "log.jsonl").read_text() == ""


def test_off_a_terminal_progress_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress_module, "_SECONDS_BETWEEN_LINES", 0.1)
    with progress(40, "train", unit="step", initial=10) as bar:
        for _ in range(30):
            time.sleep(0.01)
            bar.update()
    error = capsys.readouterr().err
    lines = error.splitlines()
    assert "\r" not in error
    assert 2 <= len(lines) <= 8
    assert all(line.startswith("train: ") and "<" in line for line in lines)  # "[elapsed<remaining, rate]"
    assert "40/40" in lines[-1]


def test_off_a_terminal_quick_work_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(3, "train") as bar:
        bar.update(3)
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_on_a_terminal_progress_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with progress(3, "train") as bar:
            bar.update(3)
        shown = ""
        while select.select([ours], [], [], 2.0)[0] and "100%" not in shown:  # it may come in several pieces
            shown += os.read(ours, 10_000).decode()
    os.close(ours)
    assert "\rtrain: 100%" in shown


def test_off_a_terminal_weights_are_read_without_a_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    build_backbone(None, {**shape, "num_attention_heads": 1, "vocab_size": 4}).save_pretrained(tmp_path)
    quiet_libraries()
    capsys.readouterr()
    build_backbone(str(tmp_path))
    assert capsys.readouterr().err == ""


def wandb_settings(output: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("WANDB_MODE", "offline")
    part = {"item_llm": ItemLLMConfig(enabled=False), "user": UserEncoderConfig(encoder="sasrec", shape=SASREC)}
    return Config(output=str(output), logs=LogsConfig(wandb="shop"), **part)


@pytest.mark.slow
def test_weights_and_biases_get_the_same_numbers_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    settings = wandb_settings(tmp_path / "run", monkeypatch)
    for resumed in (None, 1):
        with open_run_log(settings, tmp_path / "run", 0, resumed) as log:
            log.write("step", 2, loss=0.5, note="a word")
            log.write("eval", 2, slices={"cold": {"auc": 0.75}})
    with open_run_log(settings, tmp_path / "run", 1, None) as log:
        log.write("step", 9, loss=float("nan"))
    assert [line["step"] for line in read_log(tmp_path / "run")] == [2, 2], "the resumed run repeats step 2"
    folders = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    names = {folder.name.rpartition("-")[2] for folder in folders}
    assert folders and len(names) == 1, "a resumed run is the same run"
    written = b"".join(file.read_bytes() for folder in folders for file in folder.glob("*.wandb"))
    assert all(name in written for name in (b"step/loss", b"eval/slices/cold/auc", b"sasrec"))
    assert b"a word" not in written


def test_weights_and_biases_without_its_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = wandb_settings(tmp_path / "run", monkeypatch)
    monkeypatch.setitem(sys.modules, "wandb", None)
    for rank in (0, 1):
        with pytest.raises(ConfigError, match=r"logs.wandb: 'shop': needs the package wandb: pip install .*\[wandb\]"):
            open_run_log(settings, tmp_path / "run", rank, None)


def test_other_ranks_show_no_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress_module, "_SECONDS_BETWEEN_LINES", 0.0)
    with progress(3, "train", enabled=False) as bar:
        bar.update(3)
    assert capsys.readouterr().err == ""


def test_the_machine_is_described_for_json() -> None:
    info = json.loads(json.dumps(machine_info()))
    assert (
        info["packages"]["torch"] == torch.__version__.split("+")[0] or info["packages"]["torch"] == torch.__version__
    )
    assert {"torch", "torchrec", "transformers"} <= info["packages"].keys()
    assert 1 <= info["cores"] <= (os.cpu_count() or 1)
    assert info["memory_bytes"] > 2**28
    assert info["python"] == ".".join(map(str, sys.version_info[:3]))
    assert info["cpu"]
    assert info["hllm_torchrec"]


def test_the_commit_is_the_checkouts_own_only(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "--quiet")
    assert machine._commit(tmp_path) is None  # nothing committed yet
    git("commit", "--quiet", "--allow-empty", "--message", "first")
    assert machine._commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "site-packages").mkdir()
    assert machine._commit(tmp_path / "site-packages") is None  # installed inside somebody's checkout


def test_peak_memory_is_in_bytes() -> None:
    held = np.ones(2**23)  # 64 MiB
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    peak = peak_memory_bytes()["host"]
    assert held.nbytes < resident_pages * resource.getpagesize() * 0.99 < peak
    assert peak < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
