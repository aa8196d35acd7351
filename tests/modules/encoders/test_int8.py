"""Quantized copies of an Item LLM: the products of int8 numbers, and the weights that stay as they are."""

import torch
from torch import nn

from hllm_torchrec.models.backbones import build_backbone
from hllm_torchrec.modules.encoders.int8 import Int8Linear, quantized_copy
from hllm_torchrec.modules.encoders.item_llm import ItemLLM
from tests.helpers.fixtures import LLAMA, enlarge

TOKENS, TEXTS = torch.arange(20) % 32, torch.tensor([0, 5, 12, 20])


def test_a_product_is_that_of_rounded_weights_and_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    linear, x = nn.Linear(24, 7), torch.randn(5, 24, generator=generator)
    with torch.no_grad():
        linear.weight[3] *= 100  # an output with a scale of its own
        scales = linear.weight.abs().amax(1, keepdim=True) / 127
        weights = (linear.weight / scales).round() * scales
        step = (x.max().clamp(min=0) - x.min().clamp(max=0)) / 127
        inputs = (x / step).round() * step
        expected = inputs @ weights.T + linear.bias
    error = (Int8Linear(linear)(x) - expected).abs().amax(0)
    assert (error <= 2 * step * linear.weight.abs().sum(1) / 100).all()
    assert torch.cosine_similarity(Int8Linear(linear)(x), linear(x)).min() > 0.999


def test_a_copy_embeds_nearly_the_same_and_leaves_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    model = ItemLLM(build_backbone(None, LLAMA)).eval().requires_grad_(False)
    enlarge(model)
    expected, names = model(TOKENS, TEXTS), list(model.state_dict())
    copy = quantized_copy(model)
    found = copy(TOKENS, TEXTS)
    assert not torch.equal(found, expected) and torch.cosine_similarity(found, expected).min() > 0.99
    assert torch.equal(model(TOKENS, TEXTS), expected) and list(model.state_dict()) == names
    assert copy.backbone.get_input_embeddings() is model.backbone.get_input_embeddings()
    assert sum(isinstance(part, Int8Linear) for part in copy.modules()) == 2 * 7
