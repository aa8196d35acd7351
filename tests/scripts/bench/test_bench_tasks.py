"""bench_tasks: the sides are one, three and eight labels of the same exposures, and eight with MMoE or evaluated."""

from pathlib import Path

import pytest

from tests.helpers.scripts import bench_module, tiny_result

bench_tasks = bench_module("bench_tasks")


def test_bench_tasks_ends_with_its_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_tasks.main(["--tiny", "--out", str(tmp_path / "tasks.json")])
    result = tiny_result("tasks", tmp_path / "tasks.json", capsys.readouterr().out)
    assert set(result["ratios"]) == {"tasks_three", "tasks_eight", "tasks_mmoe", "evaluate_eight"}
    assert result["shapes"]["exposures"] == 39  # of four users of the training part
