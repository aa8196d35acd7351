"""The last layer runs over the rows that are read alone, and nobody can tell from values or gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hllm_torchrec.models.backbones import build_backbone
from hllm_torchrec.modules.attention.last_layer import supports_last_layer_rows
from hllm_torchrec.modules.encoders.item_llm import ItemLLM
from tests.helpers.fixtures import BERT, LLAMA, enlarge

TEXTS = [[4, 9, 1], [], [7], [2, 2, 30, 11, 5, 8, 3], [], [6, 1]]
PREFIX = torch.tensor([3, 14, 15])
HAS_PREFIX = torch.tensor([True, True, False, True, False, True])
QWEN = {**LLAMA, "model_type": "qwen3", "head_dim": 6}
"""A relative of Llama's that norms its queries and keys."""


def models(shape: dict[str, Any]) -> tuple[ItemLLM, ItemLLM]:
    """The same weights: with the last layer cut down to what is read, and whole."""
    torch.manual_seed(0)
    cut = ItemLLM(enlarge(build_backbone(None, shape)))
    whole = ItemLLM(build_backbone(None, shape))
    whole.load_state_dict(cut.state_dict())
    whole.reads_rows = False
    assert cut.reads_rows
    return cut, whole


def inputs(prefix: bool) -> tuple[Tensor, ...]:
    lengths = torch.tensor([0, *map(len, TEXTS)])
    packed = torch.tensor([t for text in TEXTS for t in text], dtype=torch.int32), lengths.cumsum(0)
    return (*packed, PREFIX, HAS_PREFIX) if prefix else packed


def gradients(model: ItemLLM, rows: Tensor) -> dict[str, Tensor]:
    weights = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    (rows * weights).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("shape", [LLAMA, QWEN], ids=["llama", "qwen3"])
def test_values_and_gradients_are_those_of_the_whole_layer(
    shape: dict[str, Any], prefix: bool, recompute: bool
) -> None:
    cut, whole = models(shape)
    if recompute:
        cut.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    found, expected = cut(*inputs(prefix)), whole(*inputs(prefix))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    own, theirs = gradients(cut, found), gradients(whole, expected)
    assert own.keys() == theirs.keys()
    torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", [False, True])
def test_the_last_feed_forward_block_sees_one_row_of_each_item(prefix: bool) -> None:
    cut, _ = models(LLAMA)
    rows: list[int] = []
    for layer in cut.backbone.layers:
        layer.mlp.register_forward_hook(lambda module, args, out: rows.append(out.shape[1]))
    cut(*inputs(prefix))
    tokens = sum(map(len, TEXTS)) + len(TEXTS) + (len(PREFIX) if prefix else 0)
    assert rows == [tokens] * (len(rows) - 1) + [len(TEXTS)]


def test_only_models_that_read_one_row_of_a_layer_that_is_known_do_so() -> None:
    assert not ItemLLM(build_backbone(None, LLAMA), "mean").reads_rows
    assert not ItemLLM(build_backbone(None, BERT), "item", causal=False).reads_rows
    assert not supports_last_layer_rows(build_backbone(None, BERT)) and supports_last_layer_rows(
        build_backbone(None, QWEN)
    )
