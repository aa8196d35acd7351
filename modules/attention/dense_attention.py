"""Softmax attention over short sequences as plain batched products, with an explicit backward pass.

On a CPU in bfloat16 the backward pass of SDPA's flash kernel takes several times as long as its matrix products,
because it processes one small (sequence, head) pair after the other. Item texts are short, so bfloat16 training on a
CPU uses this module instead. The product rounds the scores to bfloat16, and the softmax is in float32, as in
transformers' eager attention.

Legend: b sequences, N queries and M keys of each, H heads, G key-value heads, D width of a head, n = b * G blocks
of R = H / G * N query rows.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hllm_torchrec.modules.precision import widen

LONGEST = 128
"""Largest number of keys of a sequence that `dense_attention` computes. From about twice this number on, SDPA is
faster; SDPA also needs no memory for the scores."""


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scaling: float, dropout: float
) -> Tensor:
    """Attention of q [b, H, N, D] over k and v [b, G, M, D] -> [b, H, N, D]; G divides H.

    `dense_attention` computes short sequences of a bfloat16 training pass on a CPU without dropout, SDPA all others.
    The arguments are those of SDPA: mask is bool, True where a query sees a key, [N, M] or [b, 1, N or 1, M].
    """
    # Fake tensors (`hllm plan`) stand for those of another device.
    trains_on_cpu = type(v) is Tensor and v.device.type == "cpu" and torch.is_grad_enabled() and dropout == 0
    if trains_on_cpu and k.shape[2] <= LONGEST and _product_dtype(v) is torch.bfloat16:
        q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
        return dense_attention(q, k, v, mask, causal, scaling)
    return scaled_dot_product_attention(
        q, k, v, mask, dropout_p=dropout, is_causal=causal, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    )


def _product_dtype(x: Tensor) -> torch.dtype:
    """Dtype in which SDPA would compute: that of autocast if it is enabled, else that of x."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scaling: float) -> Tensor:
    """Attention with the arguments of `attention`, in the dtype of q, k and v."""
    texts, heads, queries, width = q.shape
    groups, keys = k.shape[1:3]
    if causal:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril()
    # The query heads that share a key head are rows of the same block, so that its keys are read once.
    blocks = q.reshape(texts * groups, heads // groups * queries, width)
    k, v = (x.reshape(texts * groups, keys, width) for x in (k, v))
    bias = None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, float("-inf"))
        if bias.dim() == 2:
            bias = bias.repeat(heads // groups, 1).expand(texts * groups, -1, -1)
        else:
            bias = bias.expand(texts, heads, queries, keys).reshape(texts * groups, -1, keys)
    with torch.autocast(q.device.type, enabled=False):
        out: Tensor = _DenseAttention.apply(blocks, k, v, bias, scaling)
    return out.view(texts, heads, queries, width)


class _DenseAttention(torch.autograd.Function):
    """softmax(scaling * q k' + bias) v for q [n, R, D], k and v [n, M, D], bias [n, R, M]: 0 or -inf."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
        summed = q.new_empty(1, 1, 1) if bias is None else bias
        scores = torch.baddbmm(summed, q, k.transpose(1, 2), beta=int(bias is not None), alpha=scaling)
        weights = widen(scores).softmax(-1).to(v.dtype)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scaling = scaling
        return torch.bmm(weights, v)

    @staticmethod
    def backward(ctx: Any, received: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        received = received.contiguous()
        of_v = torch.bmm(weights.transpose(1, 2), received)
        of_weights, weights = widen(torch.bmm(received, v.transpose(1, 2))), widen(weights)
        # Gradient of the softmax: w * (g - sum(g * w)).
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype).mul_(ctx.scaling).to(q.dtype)
        return torch.bmm(of_scores, k), torch.bmm(of_scores.transpose(1, 2), q), of_v, None, None
