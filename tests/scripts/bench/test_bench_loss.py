"""bench_loss: both sides are the same loss, the memory is really measured, and the JSON has what it must."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.distributed import forks
from tests.helpers.scripts import SCRIPTS, bench_module, tiny_result

bench_loss = bench_module("bench_loss")


def test_the_plain_loss_is_the_modules() -> None:
    bench_loss.check_equal(bench_loss.example((60, 200, 16)))


def test_the_example_has_masked_negatives() -> None:
    inputs = bench_loss.example((60, 200, 16))
    assert torch.isin(inputs["negative_ids"], inputs["exclude"].ids).any()


def measured(shape: tuple[int, int, int], answer: Any) -> None:
    answer.send(bench_loss.measure("plain", shape))


def test_peak_memory_is_that_of_the_side_measured() -> None:
    shape = (256, 16384, 16)  # 16 MiB of logits, 1 MiB of negatives
    logits = 4 * shape[0] * shape[1]
    context = forks()  # a process of its own, as the bench's, without its imports
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=measured, args=(shape, theirs))
    process.start()
    assert ours.poll(120)
    assert 2 * logits < ours.recv() < 8 * logits
    process.join()


@pytest.mark.slow
def test_bench_loss_ends_with_its_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "loss.json"
    bench_loss.main(["--tiny", "--out", str(out)])
    result = tiny_result("loss", out, capsys.readouterr().out)
    assert set(result["ratios"]) == {"loss_memory", "loss_speed", "loss_speed_k408"}
    assert result["shapes"]["loss"] == {"T": 60, "K": 200, "D": 16}
    assert all(0 < share < 1 for sides in result["matmul_share"].values() for share in sides.values())


@pytest.mark.long
def test_the_script_starts_itself_again_under_its_allocator_setting(tmp_path: Path) -> None:
    script, out = SCRIPTS / "bench" / "bench_loss.py", tmp_path / "loss.json"
    command = [sys.executable, str(script), "--tiny", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert tiny_result("loss", out, done.stdout)["allocator"]["MALLOC_MMAP_MAX_"] == "0"
