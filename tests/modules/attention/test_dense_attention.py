"""Dense attention of short sequences: SDPA's values and gradients in double precision, and where it is used."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hllm_torchrec.modules.attention import dense_attention as module
from hllm_torchrec.modules.attention.dense_attention import attention, dense_attention

TEXTS, QUERIES, KEYS, HEADS, WIDTH = 3, 5, 7, 4, 6


def inputs(groups: int, keys: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((TEXTS, HEADS, QUERIES, WIDTH), (TEXTS, groups, keys, WIDTH), (TEXTS, groups, keys, WIDTH))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def masks() -> dict[str, Tensor | None]:
    padded = torch.arange(KEYS) < torch.tensor([7, 4, 1])[:, None]
    return {
        "all keys": None,
        "a prefix": torch.ones(QUERIES, KEYS, dtype=torch.bool).tril(KEYS - QUERIES),
        "padding": padded[:, None, None],
        "of every text": (torch.ones(QUERIES, KEYS, dtype=torch.bool).tril(2) & padded[:, None])[:, None],
    }


def values_and_gradients(out: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return out, *torch.autograd.grad((out * weights).sum(), inputs)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("name", [*masks(), "causal"])
def test_values_and_gradients_are_those_of_sdpa(name: str, groups: int) -> None:
    causal = name == "causal"
    given, mask = inputs(groups, QUERIES if causal else KEYS), masks().get(name)
    ours = values_and_gradients(dense_attention(*given, mask, causal, 0.3), given)
    theirs = scaled_dot_product_attention(*given, mask, is_causal=causal, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(ours, values_and_gradients(theirs, given))


def test_a_bfloat16_training_pass_on_a_cpu_takes_it_and_no_other() -> None:
    def name(out: Tensor) -> str:
        edge = out.grad_fn
        while edge is not None and "View" in edge.name():
            edge = edge.next_functions[0][0]
        return "" if edge is None else edge.name()

    bf16, fp32 = inputs(4, QUERIES, torch.bfloat16), inputs(4, QUERIES, torch.float32)
    assert name(attention(*bf16, None, True, 0.3, 0.0)) == "_DenseAttentionBackward"
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = attention(*fp32, None, True, 0.3, 0.0)
    assert name(under_autocast) == "_DenseAttentionBackward" and under_autocast.dtype is torch.bfloat16
    assert "Dense" not in name(attention(*fp32, None, True, 0.3, 0.0))
    assert "Dense" not in name(attention(*bf16, None, True, 0.3, 0.1))
    with torch.no_grad():
        torch.testing.assert_close(
            attention(*bf16, None, True, 0.3, 0.0), under_autocast.detach(), rtol=0.02, atol=0.02
        )


def test_long_sequences_stay_with_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST", QUERIES - 1)
    out = attention(*inputs(4, QUERIES, torch.bfloat16), None, True, 0.3, 0.0)
    assert out.grad_fn is not None and "Dense" not in out.grad_fn.name()
