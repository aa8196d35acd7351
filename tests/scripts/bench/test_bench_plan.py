"""The bench of the memory estimate: it measures what it says it does."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.scripts import bench_module, tiny_result


def test_the_high_water_mark_is_of_what_was_held_since_it_was_reset() -> None:
    bench = bench_module("bench_plan")
    before = bench.settle()
    bench.reset_high_water_mark()
    held = torch.ones(40 << 18)  # 40 MiB
    del held
    mark = bench.resident("VmHWM") - before
    assert (38 << 20) < mark < (60 << 20)
    bench.settle()
    bench.reset_high_water_mark()
    assert bench.resident("VmHWM") - before < (20 << 20)


@pytest.mark.long
def test_a_tiny_comparison_on_two_ranks(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    words = [sys.executable, str(root / "scripts" / "bench" / "bench_plan.py"), "--tiny", "--out", str(out)]
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = tiny_result("plan", out, result.stdout)
    (row,) = found["rows"].values()
    assert len(row["ranks"]) == 2 and row["measured"] == max(max(rank["steps"]) for rank in row["ranks"]) > 0
    assert row["estimated"] == pytest.approx(sum(row["by_part"].values()))
    sizes = [step["events"] for rank in row["ranks"] for step in rank["sizes"]]
    assert len(sizes) >= 4 and max(sizes) > 0
