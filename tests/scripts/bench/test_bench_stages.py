"""bench_stages: both stages take the same batch, and what is timed of a step in groups is a whole step."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from tests.helpers import fixtures
from tests.helpers.scripts import bench_module, tiny_result

bench_stages = bench_module("bench_stages")


@pytest.fixture
def shop() -> list[str]:
    """Arguments that put the bench on the tests' shop."""
    return ["--dataset", str(fixtures.dataset().root), "--tokenizer", str(fixtures.tokenizer_dir())]


@pytest.fixture
def stages(shop: list[str], tmp_path: Path) -> Iterator[Any]:
    init_distributed()
    options = argparse.Namespace(tiny=True, quick=False, dataset=shop[1], tokenizer=shop[3])
    yield bench_stages.Stages(options, str(tmp_path))
    destroy_distributed()


def test_a_step_in_groups_moves_the_item_llm_as_a_step_in_one_does(
    stages: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, batch = stages.trainers["stage1"], stages.batch(bench_stages.Row(5, 3, False))
    fixtures.enlarge(trainer.hllm.item_llm.backbone)
    weights = {name: p.detach().clone() for name, p in trainer.hllm.named_parameters()}
    means = []
    for at_once in (600, 7):
        monkeypatch.setattr(bench_stages, "ITEMS_AT_ONCE", at_once)
        trainer.hllm.load_state_dict(weights, strict=False)
        trainer.dense_optim.state.clear()
        assert stages.step("stage1", batch) > 0
        means.append({n: trainer.dense_optim.state[p]["exp_avg"] for n, p in trainer.hllm.item_llm.named_parameters()})
    assert all(mean.any() for mean in means[0].values())
    torch.testing.assert_close(means[1], means[0], rtol=1e-3, atol=1e-6)


def test_stage_two_encodes_no_text(stages: Any) -> None:
    trainer, batch = stages.trainers["stage2"], stages.batch(bench_stages.Row(5, 3, False))
    before = [p.detach().clone() for p in trainer.hllm.item_llm.parameters()]
    stages.step("stage2", batch)
    assert trainer.experiment.item_encoder.work.tokens == 0
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.hllm.item_llm.parameters(), strict=True))


def test_generated_histories_are_long_and_half_labelled(stages: Any) -> None:
    dataset = stages.trainers["stage1"].experiment.dataset
    for piece in bench_stages.pieces_of(dataset, bench_stages.Row(90, 2, True)):
        assert piece.item_ids.size == 91 and piece.first_target == 45 and piece.item_ids.min() >= 1
        assert set(piece.item_ids[:30].tolist()).__len__() == 30  # no repeats as far as the catalogue goes
        assert (dataset.training_item_counts()[piece.item_ids] > 0).all()


def test_bench_stages_ends_with_its_json(shop: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "stages.json"
    bench_stages.main(["--tiny", *shop, "--out", str(out)])
    result = tiny_result("stages", out, capsys.readouterr().out)
    assert result["ratios"].keys() == {"stage1_vs_stage2_step", "stage1_vs_stage2_step_h12"}
    first, long = result["costs"]
    assert first["item_tokens"] > 0 and (long["history"], long["generated"]) == (12, True)
