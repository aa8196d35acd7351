"""Items encoded in groups, whose activations the backward pass makes again, and by a quantized Item LLM."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from hllm_torchrec.models import item_encoder
from hllm_torchrec.models.backbones import build_backbone
from hllm_torchrec.models.item_encoder import ItemEncoder
from hllm_torchrec.modules.encoders.item_llm import ItemLLM
from hllm_torchrec.planning.activations import saved_tensor_bytes
from tests.helpers import fixtures
from tests.helpers.distributed import run_ranks
from tests.helpers.training_fixtures import config, losses, train, weights

CPU = torch.device("cpu")


def item_llm(dropout: float = 0.0) -> ItemLLM:
    torch.manual_seed(0)
    model = ItemLLM(build_backbone(None, {**fixtures.LLAMA, "attention_dropout": dropout}))
    fixtures.enlarge(model.backbone)
    return model


@pytest.mark.parametrize("share_prefix", [False, True])
def test_values_and_gradients_are_those_of_all_items_at_once(share_prefix: bool) -> None:
    ids, found = torch.tensor([7, 0, 12, 3, 25, 31, 4, 18, 9, 40, 17]), {}
    for at_once in (0, 3):
        model = item_llm()
        encoder = ItemEncoder(fixtures.token_store(), CPU, share_prefix, at_once)
        rows = encoder(model, ids)
        (rows * torch.arange(ids.numel())[:, None]).sum().backward()
        found[at_once] = rows, {name: p.grad for name, p in model.named_parameters()}, encoder.work
    torch.testing.assert_close(found[3][0], found[0][0], rtol=1e-5, atol=1e-6)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[3][1][name], gradient, rtol=1e-4, atol=1e-4, msg=name)
    assert found[3][2] == found[0][2], "recomputation is no work of the model"


def test_only_one_groups_activations_exist_at_a_time() -> None:
    ids, kept_bytes = torch.arange(1, 37), {}
    for at_once in (0, 4):
        model = item_llm()
        with saved_tensor_bytes(model) as kept:
            ItemEncoder(fixtures.token_store(), CPU, items_at_once=at_once)(model, ids)
        kept_bytes[at_once] = sum(kept.values())
    assert kept_bytes[4] < 0.1 * kept_bytes[0]


def test_dropout_is_drawn_alike_when_activations_are_made_again() -> None:
    """Else the gradient would be of another function than the loss."""
    model = item_llm(dropout=0.5).train()
    encoder, ids = ItemEncoder(fixtures.token_store(), CPU, items_at_once=2), torch.tensor([1, 5, 9, 12, 20])
    weighting, found = torch.randn(5, model.width), []
    order = encoder.costs(ids).argsort(descending=True, stable=True)
    for recomputed in (True, False):
        torch.manual_seed(3)
        if recomputed:
            rows = encoder(model, ids)
        else:
            parts = [encoder.encode(model, part) for part in ids[order].tensor_split(3)]
            rows = torch.cat(parts)[order.argsort()]
        torch.manual_seed(99)  # what is drawn between the passes does not matter
        (rows * weighting).sum().backward()
        found.append((rows.detach(), model.item_token.grad, model.backbone.layers[0].self_attn.q_proj.weight.grad))
        model.zero_grad()
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)


def in_groups(output: Path) -> dict[str, Any]:
    """On two ranks, replicated and sharded: what a run with groups ends with, and one without."""
    found: dict[str, Any] = {}
    for dense in ("ddp", "fsdp"):
        for at_once in (0, 3):
            run = output / f"{dense}-{at_once}"
            settings = {"parallel__dense": dense, "item_llm__items_at_once": at_once, "optim__item_llm_lr": 1e-3}
            found[run.name] = weights(train(config(run, max_steps=4, **settings)))
    return found


@pytest.mark.slow
def test_ranks_with_different_numbers_of_items_run_as_many_groups(tmp_path: Path) -> None:
    for found in run_ranks(in_groups, 2, tmp_path):
        for dense in ("ddp", "fsdp"):
            for name, weight in found[f"{dense}-0"].items():
                torch.testing.assert_close(found[f"{dense}-3"][name], weight, rtol=1e-3, atol=2e-4, msg=name)
    assert losses(tmp_path / "ddp-3") == pytest.approx(losses(tmp_path / "ddp-0"), rel=1e-4)
    assert losses(tmp_path / "fsdp-3") == pytest.approx(losses(tmp_path / "ddp-0"), rel=1e-4)


def test_a_quantized_item_llm_says_how_much_it_differs_and_follows_its_weights(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = item_llm().requires_grad_(False), torch.arange(1, 9)
    plain, quantizing = (ItemEncoder(fixtures.token_store(), CPU, quantizes=value) for value in (False, True))
    first = quantizing.encode(model, ids)
    assert re.search(r"item_llm in int8: cosine with float32 over \d+ items: mean 0\.99\d+, least 0\.", told(capsys))
    assert torch.cosine_similarity(first, plain.encode(model, ids)).min() > 0.99
    assert torch.equal(quantizing.encode(model, ids), first) and not told(capsys)
    with torch.no_grad():
        model.item_token.add_(1)
    assert not torch.equal(quantizing.encode(model, ids), first) and "cosine" in told(capsys)
    monkeypatch.setattr(item_encoder, "LEAST_COSINE", 1.0)
    with torch.no_grad():
        model.item_token.add_(1)
    with pytest.raises(ValueError, match="int8: the least cosine with float32 is .* write quantization: none"):
        quantizing.encode(model, ids)


def told(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    return captured.out + captured.err
