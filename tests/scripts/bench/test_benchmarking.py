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


def test_a_timed_side_is_measured_by_its_clock_whatever_it_returns() -> None:
    clock = iter([1.0, 3.5])
    assert benchmarking.timed(lambda: 7.0, lambda: next(clock))() == 2.5


def test_rounds_go_on_until_enough_has_been_measured() -> None:
    times = benchmarking.alternate({"a": lambda: 0.25}, repeats=1, seconds=1.0)
    assert times["a"] == [0.25] * 4


def test_a_ratio_is_the_median_over_rounds_and_knows_the_quartiles_of_their_quotients() -> None:
    found = benchmarking.ratio([6.0, 6.4, 9.0, 30.0, 8.0], [2.0, 2.0, 3.0, 10.0, 2.0], scale=10)
    assert found == 30 and found.spread == pytest.approx((32 - 30) / 30)  # of 30, 30, 30, 32, 40
    assert benchmarking.ratio([1.0, 2.0, 4.0], [1.0, 1.0, 1.0]).spread == pytest.approx((3 - 1.5) / 2)
    assert benchmarking.ratio([3.0], [2.0]).spread is None


def test_ratios_of_rounds_that_disagree_are_refused_with_the_shares_and_the_report_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    noisy, quiet = benchmarking.ratio([1.0, 2.0, 4.0], [1.0] * 3), benchmarking.ratio([2.0, 2.1, 2.2], [1.0] * 3)
    found = {"ratios": {"noisy": noisy, "quiet": quiet, "bytes": 5.0, "left out": None}, "matmul_peak": 5e9}
    found["matmul_share"] = {"row": {"ours": 0.5}}
    options = benchmarking.arguments("A bench.")
    result = benchmarking.report("some", options.parse_args(["--quick"]), found)
    assert result["ratios"] == {"noisy": None, "quiet": 2.1, "bytes": 5.0, "left out": None}
    assert result["spreads"]["noisy"] == 0.75 and result["matmul_share"] is None
    refused, shares, printed = capsys.readouterr().out.splitlines()
    assert refused == (
        "refused: noisy: its rounds spread over 75% of their median, more than 30%; "
        "run it again with nothing else running"
    )
    assert shares.endswith("GFLOP/s: refused") and json.loads(printed)["ratios"]["noisy"] is None
    assert benchmarking.report("some", options.parse_args(["--tiny"]), found)["ratios"]["noisy"] == 2.0


def test_a_share_above_the_peak_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    found = {"ratios": {"a": 2.0}, "matmul_peak": 5e9, "matmul_share": {"row": {"plain": 0.25, "ours": 2.39}}}
    result = benchmarking.report("some", benchmarking.arguments("A bench.").parse_args([]), found)
    assert result["matmul_share"] is None and result["ratios"] == {"a": 2.0}
    assert "refused: matmul_share: 239% of the peak" in capsys.readouterr().out


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
