"""bench_loss: both sides are the same loss, the memory is really measured, and the JSON has what it must."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.scripts import SCRIPTS, bench_module, tiny_result

bench_loss = bench_module("bench_loss")


def test_the_plain_loss_is_the_modules() -> None:
    bench_loss.check_equal(bench_loss.example((60, 200, 16)))


def test_the_example_has_masked_negatives() -> None:
    inputs = bench_loss.example((60, 200, 16))
    assert torch.isin(inputs["negative_ids"], inputs["exclude"].ids).any()


@pytest.mark.slow
def test_peak_memory_is_that_of_the_side_measured() -> None:
    shape = (256, 16384, 16)  # 16 MiB of logits, 1 MiB of negatives
    logits = 4 * shape[0] * shape[1]
    assert 2 * logits < bench_loss.peak_bytes("plain", shape) < 8 * logits


@pytest.mark.slow
def test_bench_loss_ends_with_its_json(tmp_path: Path) -> None:
    """As a user runs it: the script starts itself again under its allocator setting."""
    script, out = SCRIPTS / "bench" / "bench_loss.py", tmp_path / "new" / "loss.json"
    command = [sys.executable, str(script), "--tiny", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = tiny_result("loss", out, done.stdout)
    assert result["allocator"]["MALLOC_MMAP_MAX_"] == "0"
    assert set(result["ratios"]) == {"loss_memory", "loss_speed", "loss_speed_k408"}
    assert result["shapes"]["loss"] == {"T": 60, "K": 200, "D": 16}
    assert all(0 < share < 1 for sides in result["matmul_share"].values() for share in sides.values())
