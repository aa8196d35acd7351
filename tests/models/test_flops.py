"""Operation counts against PyTorch's own counter; speeds in plausible units."""

import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, PreTrainedModel

from hllm_torchrec.models.flops import flops_utilization, measured_matmul_peak
from hllm_torchrec.modules.encoders.backbone import transformer_flops_per_token

TOKENS = 7


def counted_flops(model: PreTrainedModel) -> float:
    """Operations per token of one forward pass, as PyTorch counts them (the masked half included)."""
    embeddings = torch.randn(1, TOKENS, model.config.hidden_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs_embeds=embeddings)
    return counter.get_total_flops() / TOKENS


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("head_dim", [8, 12])
def test_llama_is_counted_as_pytorch_counts_it(kv_heads: int, head_dim: int) -> None:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=10,
        attn_implementation="eager",
    )
    expected = transformer_flops_per_token(32, 80, 3, 4, kv_heads, context=TOKENS, head_dim=head_dim)
    assert counted_flops(LlamaModel(config)) == expected


def test_bert_has_two_feed_forward_matrices() -> None:
    config = BertConfig(
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=10,
        attn_implementation="eager",
    )
    expected = transformer_flops_per_token(32, 80, 2, 4, 4, context=TOKENS, gated=False)
    assert counted_flops(BertModel(config, add_pooling_layer=False)) == expected


def test_smollm2_costs_twice_its_matrices_at_no_context() -> None:
    # 106.2 million of SmolLM2-135M's parameters are in its 30 layers' matrices, the others in its vocabulary
    flops = transformer_flops_per_token(576, 1536, 30, 9, 3, context=0)
    assert flops == pytest.approx(2 * 106.17e6, rel=1e-3)


def test_the_peak_is_reached_by_the_product_it_measures() -> None:
    peak = measured_matmul_peak("cpu", torch.float32, shapes=[(256, 256, 256)], seconds=0.05)
    a = torch.rand(256, 256)
    start = time.perf_counter()
    for _ in range(20):
        a @ a
    seconds = time.perf_counter() - start
    assert 0.05 < flops_utilization(20 * 2 * 256**3, seconds, peak) < 20  # other processes may be running


def test_utilisation_is_a_share_of_the_peak() -> None:
    assert flops_utilization(5e9, 2.0, 1e10) == 0.25


@pytest.mark.parametrize(("seconds", "peak"), [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0)])
def test_nothing_measured_is_refused(seconds: float, peak: float) -> None:
    with pytest.raises(ValueError, match=r"seconds \(.*\) and peak \(.*\) must be positive"):
        flops_utilization(1.0, seconds, peak)
