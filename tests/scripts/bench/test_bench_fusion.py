"""bench_fusion: one pass and one by one are the same exposures."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from tests.helpers import fixtures
from tests.helpers.scripts import bench_module, tiny_result

bench_fusion = bench_module("bench_fusion")


@pytest.fixture
def comparison(tmp_path: Path) -> Iterator[Any]:
    init_distributed()
    config = bench_fusion.config_of(str(fixtures.dataset().root), bench_fusion.SMALL, str(tmp_path / "run"))
    trainer = bench_fusion.build_trainer(config, torch.device("cpu"))
    fixtures.enlarge(trainer.hllm.user.backbone)
    yield bench_fusion.Comparison(trainer, history=9, exposures=5)
    destroy_distributed()


def test_one_pass_scores_the_exposures_as_one_by_one_does(comparison: Any) -> None:
    one, each = (comparison.trainer.model(comparison.batches[side]) for side in ("one pass", "one by one"))
    assert one.logits.std() > 1e-3
    torch.testing.assert_close(one.logits, each.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(comparison.batches["one pass"].labels, comparison.batches["one by one"].labels)


def test_other_losses_stop_the_bench(comparison: Any) -> None:
    comparison.losses = {"one by one": 0.7, "one pass": 0.71}
    with pytest.raises(AssertionError, match="the losses differ"):
        comparison.check_losses()


def test_bench_fusion_ends_with_its_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "fusion.json"
    bench_fusion.main(["--tiny", "--out", str(out), "--dataset", str(fixtures.dataset().root)])
    result = tiny_result("fusion", out, capsys.readouterr().out)
    assert set(result["ratios"]) == {"fusion_one_pass_h12"}
    tokens = result["shapes"]["fusion_one_pass_h12"]["tokens"]
    assert tokens == {"one by one": 12 + 13 + 14 + 15 + 4, "one pass": 15 + 4}
