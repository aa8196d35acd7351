"""bench_curves: along the catalogue the work is the same, and the curves are drawn."""

from pathlib import Path

import pytest

from tests.helpers.scripts import bench_module, tiny_result

bench_curves = bench_module("bench_curves")


@pytest.mark.slow
def test_bench_curves_ends_with_its_json_and_draws_the_curves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "curves.json"
    bench_curves.main(["--tiny", "--out", str(out)])
    result = tiny_result("curves", out, capsys.readouterr().out)
    assert {"step_catalogue_flat", "step_per_token_history"} <= set(result["ratios"])
    small, large = result["curves"]["catalogue"]
    assert small["catalogue"] < large["catalogue"]
    assert {name: small[name] for name in ("unique_items", "item_tokens", "flops")} == {
        name: large[name] for name in ("unique_items", "item_tokens", "flops")
    }
    assert result["plots"] == ["curves.png", "curves.svg"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "curves.svg").read_text()
