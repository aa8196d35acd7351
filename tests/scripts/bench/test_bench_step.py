"""bench_step: the plain counterpart computes our step, in values and gradients, and is counted right."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import AdamW

from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.training.loss import LossWeights, micro_batch_loss, step_counts
from tests.helpers import fixtures
from tests.helpers.scripts import bench_module, tiny_result

bench_step = bench_module("bench_step")
plain_hllm = bench_module("plain_hllm")


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments that put the bench on the tests' shop, which has other text columns."""
    monkeypatch.setattr(bench_step, "TEXT_KEYS", ("title", "brand"))
    return ["--dataset", str(fixtures.dataset().root), "--tokenizer", str(fixtures.tokenizer_dir())]


@pytest.fixture
def compare(shop: list[str], tmp_path: Path) -> Iterator[Any]:
    """Makes a `Comparison` of a row, with weights large enough to matter."""
    options = argparse.Namespace(tiny=True, compile=False, dataset=shop[1], tokenizer=shop[3])
    init_distributed()

    def make(row: Any) -> Any:
        torch.manual_seed(0)
        made = bench_step.Comparison(row, options, "fp32", str(tmp_path / "run"))
        fixtures.enlarge(made.trainer.hllm.item_llm.backbone)
        fixtures.enlarge(made.trainer.hllm.user.backbone)
        for model in made.models.values():
            model.copy_weights(made.trainer.hllm)
        return made

    yield make
    destroy_distributed()


def assert_same_gradients(model: nn.Module, optimizer: AdamW, other: nn.Module, other_optimizer: AdamW) -> None:
    """After one step of each. The update itself has Adam's size whatever the gradient's; the mean does not."""
    others = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        if name.startswith("heads"):
            continue  # no gradient reaches them
        means = [opt.state[p]["exp_avg"] for opt, p in ((optimizer, parameter), (other_optimizer, others[name]))]
        assert means[0].any(), name
        torch.testing.assert_close(*means, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("repeats", [True, False])
def test_the_plain_counterpart_has_our_loss_and_gradients(compare: Any, repeats: bool) -> None:
    made = compare(bench_step.Row(19, 5, repeats))
    assert made.padding > 0, "or left padding is not tested"
    hllm, batch, plain = made.trainer.hllm, made.batch, made.models["plain"]
    weights = LossWeights.of(made.trainer.config)
    ours, _ = micro_batch_loss(made.trainer.model(batch), step_counts([batch]), weights, encodes_items=True)
    ours.backward()
    loss = plain(made.plain)
    loss.backward()
    torch.testing.assert_close(loss, ours)
    pairs = {"item_llm": hllm.item_llm.backbone, "user_llm": hllm.user.backbone, "logit_scale": hllm.logit_scale}
    for name, module in pairs.items():
        others = dict(getattr(plain, name).named_parameters())
        for key, parameter in module.named_parameters():
            torch.testing.assert_close(others[key].grad, parameter.grad, rtol=1e-3, atol=1e-5, msg=f"{name}.{key}")
    torch.testing.assert_close(plain.item_token.grad, hllm.item_llm.item_token.grad, rtol=1e-3, atol=1e-5)


def test_groups_of_items_make_the_same_step(compare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_step, "ITEMS_AT_ONCE", 12)
    made = compare(bench_step.Row(5, 3))
    assert len(made.groups) == 3
    whole, grouped = made.models["plain"], made.models["plain_nohead"]
    loss = bench_step.plain_step(whole, made.plain, made.optimizers["plain"])
    again, seconds = bench_step.plain_step_in_groups(grouped, made.plain, made.groups, made.optimizers["plain_nohead"])
    assert loss == pytest.approx(again, rel=1e-6) and seconds > 0
    assert_same_gradients(whole, made.optimizers["plain"], grouped, made.optimizers["plain_nohead"])


def test_our_groups_of_items_make_the_same_step(compare: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = compare(bench_step.Row(5, 3, repeats=False))
    monkeypatch.setattr(bench_step, "UNIQUE_AT_ONCE", 15)
    grouped = compare(bench_step.Row(5, 3, repeats=False))
    assert (whole.item_groups, grouped.item_groups) == (1, 3)
    for made in (whole, grouped):
        assert made._ours() > 0
    assert grouped.losses["ours"] == pytest.approx(whole.losses["ours"], rel=1e-6)
    assert grouped.shapes()["tokens_ours"] == pytest.approx(whole.shapes()["tokens_ours"], abs=30)  # a prefix, if any
    assert_same_gradients(
        whole.trainer.hllm, whole.trainer.dense_optim, grouped.trainer.hllm, grouped.trainer.dense_optim
    )


def test_other_losses_stop_the_bench(compare: Any) -> None:
    made = compare(bench_step.Row(5, 3))
    made.losses = {"ours": 2.0, "plain": 2.01}
    with pytest.raises(AssertionError, match="not the same step"):
        made.check_losses(1e-4)


def test_pieces_end_where_their_users_do_and_are_at_least_half_full() -> None:
    pieces = list(plain_hllm.pieces_of(fixtures.dataset(), history=9))
    lengths = {len(items) for _, items, _ in pieces}
    assert min(lengths) == 5 and max(lengths) == 10
    last = {user: times[-1] for user, _, times in reversed(pieces)}
    for piece in fixtures.pieces("train"):
        if piece.item_ids.size >= 10:
            assert last[piece.user_id] == piece.timestamps[-1]


def test_padding_and_negatives_are_items_that_the_piece_does_not_hold() -> None:
    for sample in plain_hllm.draw_samples(fixtures.dataset(), history=9, users=6):
        assert sample.positives.size == sample.negatives.size == 10
        assert not np.isin(sample.items, [*sample.padding, *sample.negatives]).any()


@pytest.mark.slow
def test_bench_step_ends_with_its_json(
    shop: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_step, "TINY", (bench_step.Row(5, 3),))
    out = tmp_path / "step.json"
    bench_step.main(["--tiny", "--out", str(out), *shop])
    result = tiny_result("step", out, capsys.readouterr().out)
    bf16 = bench_module("benchmarking").why_no_bf16() is None
    names = {f"step_{p}_h5_b3{h}" for p in ("fp32", "bf16") for h in ("", "_nohead")} | {"step_bf16_h5_b3_fused"}
    assert set(result["ratios"]) == names
    assert (result["ratios"]["step_bf16_h5_b3"] is None) == (not bf16) == bool(result["left_out"])
    row = result["shapes"]["step_fp32_h5_b3"]
    assert row["item_occurrences"] == 3 * 2 * 6 and row["unique_items"] < row["item_occurrences"]
    assert row["tokens_ours"] < row["tokens_plain"]
    assert row["loss"]["plain"] == pytest.approx(row["loss"]["ours"], rel=1e-4)
