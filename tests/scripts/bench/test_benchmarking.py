"""What the benches share."""

import json
import time

import pytest

from tests.helpers.scripts import bench_module

benchmarking = bench_module("benchmarking")


def test_sides_alternate_after_a_warm_up_that_does_not_count() -> None:
    calls: list[str] = []
    times = benchmarking.alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, warmup=1)
    assert calls == ["a", "b"] * 3
    assert [len(values) for values in times.values()] == [2, 2]


def test_a_side_that_returns_a_number_has_timed_itself() -> None:
    times = benchmarking.alternate({"own": lambda: 7.0, "other": lambda: time.sleep(0.01)}, 3)
    assert benchmarking.medians(times)["own"] == 7.0
    assert 0.01 <= benchmarking.medians(times)["other"] < 7.0


def test_rounds_go_on_until_enough_has_been_measured() -> None:
    times = benchmarking.alternate({"a": lambda: 0.25}, repeats=1, seconds=1.0)
    assert times["a"] == [0.25] * 4


def test_a_result_without_ratios_is_a_bug_of_the_bench() -> None:
    options = benchmarking.arguments("A bench.").parse_args(["--quick"])
    with pytest.raises(AssertionError, match="a bench reports ratios"):
        benchmarking.report("none", options, {})


def test_a_report_prints_the_shares_and_then_its_json(capsys: pytest.CaptureFixture[str]) -> None:
    options = benchmarking.arguments("A bench.").parse_args([])
    found = {"ratios": {"a": 2.0}, "matmul_peak": 5e9, "matmul_share": {"row": {"plain": 0.25, "ours": 0.5}}}
    benchmarking.report("some", options, found)
    shares, result = capsys.readouterr().out.splitlines()
    assert shares == "share of the matrix-product peak, 5 GFLOP/s: row plain 25.0%, ours 50.0%"
    assert json.loads(result)["ratios"] == {"a": 2.0} and json.loads(result)["mode"] == "full"
