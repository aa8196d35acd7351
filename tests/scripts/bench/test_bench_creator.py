"""`bench_creator`: both sides of a ratio give the same results, and lookups are measured."""

from pathlib import Path

import pytest

from tests.helpers.scripts import bench_module, tiny_result

bench_creator = bench_module("bench_creator")


@pytest.mark.slow
def test_bench_creator_ends_with_its_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_creator.main(["--tiny", "--out", str(tmp_path / "creator.json")])
    result = tiny_result("creator", tmp_path / "creator.json", capsys.readouterr().out)
    named = set(result["ratios"])
    assert named == set(result["measured"]) and {"item_kv", "per_user_vs_per_cluster", "train_step_memory"} <= named
    assert result["lookup"]["titles"] == 200 and result["lookup"]["microseconds"] > 0
