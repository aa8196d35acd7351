"""The benches of what a step waits for, of item sub-sampling and of precision, on tiny runs."""

from pathlib import Path

import pytest

from hllm_torchrec.config.loading import save_config
from tests.helpers.scripts import bench_module, tiny_result
from tests.helpers.training_fixtures import config

benchmarking = bench_module("benchmarking")


@pytest.mark.slow
def test_bench_waiting_ends_with_its_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = [{"name": "stored", "epochs": 1, "item_embeddings": "cached"}]
    save_config(config(tmp_path / "run", stages=stages), tmp_path / "tiny.yaml")
    out = tmp_path / "waiting.json"
    bench_module("bench_waiting").main(["--tiny", "--config", str(tmp_path / "tiny.yaml"), "--out", str(out)])
    result = tiny_result("waiting", out, capsys.readouterr().out)
    shares = [result["ratios"][f"{name}_share_of_step"] for name in ("batch", "table_forward")]
    assert all(0 <= share < 1 for share in shares) and sum(shares) < 1
    assert result["ratios"].keys() == {"batch_share_of_step", "table_forward_share_of_step", "overlap"}
    assert result["ratios"]["overlap"] > 0 and result["shapes"]["steps"] == 2


@pytest.mark.slow
def test_bench_subsample_ends_with_its_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_config(config(tmp_path / "run"), tmp_path / "tiny.yaml")
    out = tmp_path / "subsample.json"
    arguments = ["--tiny", "--config", str(tmp_path / "tiny.yaml"), "--share", "0.3", "--out", str(out)]
    bench_module("bench_subsample").main(arguments)
    result = tiny_result("subsample", out, capsys.readouterr().out)
    assert result["ratios"]["tokens"] > 1 and result["ratios"]["subsample"] > 0


@pytest.mark.slow
@pytest.mark.skipif(benchmarking.why_no_bf16() is not None, reason="the processor has no bfloat16")
def test_bench_precision_ends_with_its_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_config(config(tmp_path / "run"), tmp_path / "tiny.yaml")
    out = tmp_path / "precision.json"
    given = ["--tiny", "--out", str(out), "--", "--config", str(tmp_path / "tiny.yaml")]
    bench_module("bench_precision").main(given)
    result = tiny_result("precision", out, capsys.readouterr().out)
    assert result["ratios"]["precision_step"] > 0 and result["tokens"]["fp32"] == result["tokens"]["bf16"] > 0
