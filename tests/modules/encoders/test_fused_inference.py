"""Fused layers of inference: the plain layers' embeddings, and the models that have none."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hllm_torchrec.models.backbones import build_backbone
from hllm_torchrec.modules.encoders.fused_inference import can_run_fused, fused_inference
from hllm_torchrec.modules.encoders.item_llm import ItemLLM
from hllm_torchrec.modules.lora import add_lora
from tests.helpers.fixtures import BERT, LLAMA, enlarge

KINDS = {
    "llama": (LLAMA, "item"),
    "llama, mean": (LLAMA, "mean"),
    "llama, last": (LLAMA, "last"),
    "bert": (BERT, "mean"),
    "bert, gelu_new": (BERT | {"hidden_act": "gelu_new"}, "cls"),
}
TOKENS = torch.randint(0, 32, (40,), generator=torch.Generator().manual_seed(2))
TEXTS = torch.tensor([0, 5, 12, 13, 20, 40])


def built(shape: dict[str, Any], pooling: Any) -> ItemLLM:
    torch.manual_seed(0)
    model = ItemLLM(build_backbone(None, shape), pooling).eval()
    enlarge(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower():
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@torch.no_grad()
def embedded(model: ItemLLM) -> Tensor:
    prefix = (torch.tensor([3, 1, 4]),) if model.shares_prefix else ()
    return model(TOKENS, TEXTS, *prefix)


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_those_of_the_plain_layers(kind: str) -> None:
    model = built(*KINDS[kind])
    expected = embedded(model)
    assert can_run_fused(model)
    with fused_inference(model, torch.float32):
        torch.testing.assert_close(embedded(model), expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        with fused_inference(model, torch.bfloat16):
            fused = embedded(model)
        assert torch.cosine_similarity(fused, expected).min() > 0.999 and not torch.equal(fused, expected)
    assert torch.equal(embedded(model), expected), "the plain layers again"


def test_other_layers_and_adapters_have_none() -> None:
    assert not can_run_fused(built(LLAMA | {"model_type": "qwen3"}, "item"))
    assert not can_run_fused(built(LLAMA | {"hidden_act": "gelu"}, "item"))
    assert not can_run_fused(built(BERT | {"hidden_act": "relu"}, "mean"))
    model = built(LLAMA, "item")
    add_lora(model.backbone, rank=2, alpha=4.0, dropout=0.0, targets=["o_proj"])
    assert not can_run_fused(model)
