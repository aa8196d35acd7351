"""Cross-entropy of tokens over a vocabulary, computed in chunks of rows: the logits of all rows never exist at once.

Legend: Y rows, C width, V words.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hllm_torchrec.modules.losses.objectives import MOST_LOGITS


def token_nll(hidden: Tensor, head: Tensor, targets: Tensor, chunk_size: int | None = None) -> Tensor:
    """-log softmax(hidden @ head^T)[target] of each row: [Y] float32, or float64 of float64 inputs.

    Memory beyond the inputs and their gradients is O(chunk_size V). The gradient of `hidden` is computed in the
    forward pass, while the logits exist. If `head` needs a gradient, the backward pass computes the logits again.

    Args:
        hidden: [Y, C] last hidden states; Y = 0 is allowed.
        head: [V, C] weight of the vocabulary head.
        targets: int64 [Y].
        chunk_size: rows per chunk, >= 1; None: as many as `MOST_LOGITS` logits allow.

    Raises:
        ValueError: the chunk size is below 1.
    """
    if chunk_size is None:
        chunk_size = max(1, MOST_LOGITS // head.shape[0])
    if chunk_size < 1:
        raise ValueError(f"the chunk size of the token loss is {chunk_size}: must be at least 1")
    nll: Tensor = _TokenNll.apply(hidden, head, targets, chunk_size)
    return nll


def _probabilities(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """nll [y] of a chunk, and d nll / d logits [y, V] = softmax - one-hot; at least float32."""
    logits = hidden @ head.T
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    nll = -log_p.gather(1, targets[:, None])[:, 0]
    slope = log_p.exp_()
    slope.scatter_add_(1, targets[:, None], slope.new_full((targets.numel(), 1), -1.0))
    return nll, slope


class _TokenNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, chunk_size: int) -> Tensor:
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        losses, slopes = [], []
        cast = head.to(hidden.dtype)  # once for all chunks: it may be the largest weight of the model
        for h, t in zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True):
            nll, slope = _probabilities(h, cast, t)
            losses.append(nll)
            if needs_hidden:
                slopes.append(slope.to(h.dtype) @ cast)
        empty = hidden.new_empty(0, dtype=torch.promote_types(hidden.dtype, torch.float32))
        ctx.chunk_size = chunk_size
        ctx.save_for_backward(
            torch.cat([hidden[:0], *slopes]) if needs_hidden else None,
            *((hidden, head, targets) if needs_head else (None, None, None)),
        )
        return torch.cat([empty, *losses])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        slopes, hidden, head, targets = ctx.saved_tensors
        d_hidden = None if slopes is None else slopes * grad[:, None].to(slopes.dtype)
        if head is None:
            return d_hidden, None, None, None
        d_head, cast = torch.zeros_like(head), head.to(hidden.dtype)
        parts = (x.split(ctx.chunk_size) for x in (hidden, targets, grad))
        for h, t, g in zip(*parts, strict=True):
            _, slope = _probabilities(h, cast, t)
            d_head += ((slope * g[:, None]).to(h.dtype).T @ h).to(head.dtype)
        return d_hidden, d_head, None, None
