"""bench_candidates: every way gives the same candidates, and the JSON has the ratios asked of it."""

from pathlib import Path

import pytest
import torch

from tests.helpers.scripts import bench_module, tiny_result

bench_candidates = bench_module("bench_candidates")


@pytest.mark.slow
def test_bench_candidates_ends_with_its_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "candidates.json"
    bench_candidates.main(["--tiny", "--out", str(out)])
    result = tiny_result("candidates", out, capsys.readouterr().out)
    for name in ("hstu", "llm"):
        assert {f"candidates_vs_each_{name}", f"candidates_vs_packed_{name}"} <= set(result["ratios"])
        points = result["encoders"][name]["points"]
        assert [(p["history"], p["candidates"]) for p in points] == [(6, 3), (6, 8), (12, 3), (12, 8)]
        head = points[-1]
        assert head["seconds"]["each"] == pytest.approx(head["times"]["each"][0] * 8 / head["each_extrapolated_from"])
        used = result["encoders"][name]["memory"]
        small, _, large = used["by_micro_batch"].values()
        assert small < large  # memory is the micro-batch's
        few, many = used["by_candidates"].values()
        assert many - few <= 24 * 16 * 4 + 1024  # four times the candidates: their outputs alone


def test_the_bench_stops_where_sides_differ() -> None:
    with pytest.raises(AssertionError, match="not close"):
        bench_candidates.check(torch.ones(2), torch.zeros(2))


def test_peak_bytes_counts_what_is_alive_at_a_time() -> None:
    def run() -> torch.Tensor:
        first = torch.ones(1000)
        second = first + 1
        del first
        return second * 2

    assert 8000 <= bench_candidates.peak_bytes(run) < 9000
