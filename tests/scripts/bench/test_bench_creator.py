"""`bench_creator`: both sides of a ratio give the same results, noisy ratios are left out, lookups are measured."""

from pathlib import Path

import pytest

from tests.helpers.scripts import bench_module, tiny_result

bench_creator = bench_module("bench_creator")


@pytest.mark.slow
def test_bench_creator_ends_with_its_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_creator.main(["--tiny", "--out", str(tmp_path / "creator.json")])
    result = tiny_result("creator", tmp_path / "creator.json", capsys.readouterr().out)
    named = set(result["ratios"]) | set(result["left_out"])
    assert named == set(result["measured"]) and {"item_kv", "per_user_vs_per_cluster", "train_step_memory"} <= named
    assert result["lookup"]["titles"] == 200 and result["lookup"]["microseconds"] > 0


def test_a_ratio_is_that_of_pairs_of_times_and_none_if_these_spread() -> None:
    found = bench_creator.ratio_of_times({"slow": [6.0, 6.2, 9.0], "fast": [2.0, 2.0, 3.0]}, scale=10)
    assert found["ratio"] == 30 and found["seconds"] == {"slow": 6.2, "fast": 2.0}
    spread = bench_creator.ratio_of_times({"one": [1.0, 2.0, 4.0], "other": [1.0, 1.0, 1.0]})
    assert "ratio" not in spread and "more than 30% apart" in spread["left_out"]
