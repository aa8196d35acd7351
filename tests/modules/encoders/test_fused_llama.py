"""Fused Llama layers: transformers' values and gradients in double precision, and the cases that stay unfused."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hllm_torchrec.models.backbones import build_backbone
from hllm_torchrec.modules.encoders import fused_llama
from hllm_torchrec.modules.encoders.base import Queries
from hllm_torchrec.modules.encoders.fused_llama import FusedLlamaLayer
from hllm_torchrec.modules.encoders.fused_products import compiled_elementwise
from hllm_torchrec.modules.encoders.item_llm import ItemLLM
from hllm_torchrec.modules.encoders.user_llm import UserLLM
from hllm_torchrec.modules.lora import add_lora
from tests.helpers.fixtures import LLAMA, enlarge

TOKENS = torch.randint(0, 32, (40,), generator=torch.Generator().manual_seed(2))
TEXTS = torch.tensor([0, 5, 12, 12, 20, 40])
PREFIX = torch.tensor([3, 1, 4])


def built(kind: type[ItemLLM] | type[UserLLM]) -> Any:
    torch.manual_seed(0)
    model = kind(build_backbone(None, LLAMA, word_embeddings=kind is ItemLLM))
    enlarge(model)
    with torch.no_grad():  # gains of exactly 1 hide that they are multiplied into the weights
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def item_loss(model: ItemLLM) -> tuple[Tensor, Tensor]:
    out = model(TOKENS, TEXTS, PREFIX)
    return out, (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()


def user_loss(model: UserLLM) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    dtype = next(model.parameters()).dtype
    x, asked = (torch.randn(n, 24, generator=generator).to(dtype) for n in (9, 4))
    queries = Queries(asked, torch.tensor([0, 2, 3, 4]), torch.tensor([6, 1, 0, 0]), torch.zeros(4).long())
    out = torch.cat(model(x, torch.tensor([0, 6, 6, 9]), torch.arange(9), queries))
    return out, (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()


def values_and_gradients(model: nn.Module, loss_of: Callable) -> dict[str, Tensor]:
    model.zero_grad()
    out, loss = loss_of(model)
    loss.backward()
    return {"out": out.detach()} | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative_errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == expected.keys()
    return {name: float((found[name] - value).norm() / value.norm()) for name, value in expected.items()}


@pytest.mark.parametrize(("kind", "loss_of"), [(ItemLLM, item_loss), (UserLLM, user_loss)])
def test_values_and_gradients_are_those_of_transformers(
    kind: Any, loss_of: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built(kind).double()
    expected = values_and_gradients(model, loss_of)
    calls, fused_layer = [], fused_llama.fused_layer

    def in_double(*given: Any) -> Tensor:
        calls.append(given)
        return fused_layer(*given[:-1], torch.float64)

    monkeypatch.setattr(FusedLlamaLayer, "runs_fused", lambda *_: True)
    monkeypatch.setattr(fused_llama, "fused_layer", in_double)
    errors = relative_errors(values_and_gradients(model, loss_of), expected)
    assert len(calls) == LLAMA["num_hidden_layers"]
    assert max(errors.values()) < 2e-6, errors  # transformers' norms are in float32


@pytest.mark.parametrize(("kind", "loss_of"), [(ItemLLM, item_loss), (UserLLM, user_loss)])
def test_in_bfloat16_it_is_as_close_to_float32_as_the_unfused_layers(
    kind: Any, loss_of: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built(kind)
    exact = values_and_gradients(model, loss_of)
    with torch.autocast("cpu", torch.bfloat16):
        fused = relative_errors(values_and_gradients(model, loss_of), exact)
        monkeypatch.setattr(FusedLlamaLayer, "runs_fused", lambda *_: False)
        unfused = relative_errors(values_and_gradients(model, loss_of), exact)
    assert fused != unfused
    assert sum(fused.values()) < 1.5 * sum(unfused.values()) and max(fused.values()) < 0.1


@pytest.mark.long  # calls of the C++ compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_functions_are_as_close_to_float32_as_the_eager_ones() -> None:
    model = built(ItemLLM)
    exact = values_and_gradients(model, item_loss)
    with torch.autocast("cpu", torch.bfloat16):
        eager = relative_errors(values_and_gradients(model, item_loss), exact)
        for layer in model.blocks():
            layer.elementwise = compiled_elementwise()
        compiled = relative_errors(values_and_gradients(model, item_loss), exact)
    assert compiled != eager, "the layers call the compiled functions, which round less often"
    assert sum(compiled.values()) < 1.1 * sum(eager.values())


def test_only_bfloat16_on_a_cpu_runs_fused() -> None:
    model = built(ItemLLM)
    expected = values_and_gradients(model, item_loss)
    for layer in model.blocks():
        layer.__class__ = FusedLlamaLayer.__mro__[1]
    assert not any(relative_errors(values_and_gradients(model, item_loss), expected).values())


def test_frozen_weights_get_no_gradients_and_pass_them_on() -> None:
    model = built(UserLLM)
    x = torch.randn(6, 24, generator=torch.Generator().manual_seed(4)).requires_grad_()

    def gradient() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x, torch.tensor([0, 6]), torch.arange(6))[0].square().sum()
        return torch.autograd.grad(loss, x, retain_graph=True)[0]

    expected = gradient()
    model.requires_grad_(False)
    assert torch.equal(gradient(), expected)


def test_adapters_are_not_passed_over() -> None:
    model = built(UserLLM)
    layer, plan = model.blocks()[0], fused_llama.BucketPlan([], False, torch.zeros(1, 1), 0, True)
    x = torch.zeros(1, 1, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.runs_fused(x, plan)
        add_lora(model.backbone, rank=2, alpha=4.0, dropout=0.0, targets=["up_proj"])
        assert not layer.runs_fused(x, plan)
    assert not layer.runs_fused(x, plan)


def test_fake_tensors_of_estimates_run_unfused() -> None:
    layer, plan = built(UserLLM).blocks()[0], fused_llama.BucketPlan([], False, torch.zeros(1, 1), 0, True)
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        assert not layer.runs_fused(torch.zeros(1, 1, 24), plan)


def test_recomputed_activations_give_the_same_gradients() -> None:
    model = built(ItemLLM).train()
    with torch.autocast("cpu", torch.bfloat16):
        expected = values_and_gradients(model, item_loss)
        model.recompute_activations()
        found = values_and_gradients(model, item_loss)
    assert relative_errors(found, expected)["out"] == 0 and max(relative_errors(found, expected).values()) < 1e-6
