"""Cross-entropy of tokens over a vocabulary, computed in chunks of rows: the logits of all rows never exist at once.

Legend: Y rows, y rows of a chunk, C width, V words.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hllm_torchrec.modules.losses.objectives import MOST_LOGITS


def token_nll(hidden: Tensor, head: Tensor, targets: Tensor, chunk_size: int | None = None) -> Tensor:
    """-log softmax(hidden @ head^T)[target] of each row: [Y] float32, or float64 of float64 inputs.

    Memory beyond the inputs and their gradients is O(chunk_size V). Gradients are computed in the forward pass, while
    the logits exist; the gradient of `head` is computed for rows of equal weight. If the rows turn out to have
    different weights, the backward pass computes the logits again for the gradient of `head`.

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


def _add_product(d_head: Tensor, slope: Tensor, hidden: Tensor) -> None:
    """Add slope^T @ hidden, of a chunk's slope [y, V] and hidden [y, C], to d_head [V, C]."""
    if hidden.dtype == d_head.dtype and not torch.is_autocast_enabled(hidden.device.type):
        d_head.addmm_(slope.to(hidden.dtype).T, hidden)  # without a copy of [V, C]
    else:
        d_head += (slope.to(hidden.dtype).T @ hidden).to(d_head.dtype)


def _is_uniform(grad: Tensor) -> bool:
    """Return whether all rows have one weight; True for fake tensors (`hllm plan`), which have no values."""
    return type(grad) is not Tensor or not grad.numel() or bool((grad == grad[0]).all())


class _TokenNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, chunk_size: int) -> Tensor:
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        losses, slopes = [], []
        d_head = torch.zeros_like(head) if needs_head else None
        cast = head.to(hidden.dtype)  # once for all chunks: it may be the largest weight of the model
        for h, t in zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True):
            nll, slope = _probabilities(h, cast, t)
            losses.append(nll)
            if needs_hidden:
                slopes.append(slope.to(h.dtype) @ cast)
            if d_head is not None:
                _add_product(d_head, slope, h)
        empty = hidden.new_empty(0, dtype=torch.promote_types(hidden.dtype, torch.float32))
        ctx.chunk_size, ctx.d_head = chunk_size, d_head
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
        d_head, ctx.d_head = ctx.d_head, None  # changed in place; a second backward pass computes it again
        if d_head is not None and _is_uniform(grad):
            return d_hidden, d_head.mul_(grad[:1]) if grad.numel() else d_head, None, None
        d_head, cast = torch.zeros_like(head), head.to(hidden.dtype)
        parts = (x.split(ctx.chunk_size) for x in (hidden, targets, grad))
        for h, t, g in zip(*parts, strict=True):
            _, slope = _probabilities(h, cast, t)
            _add_product(d_head, slope * g[:, None], h)
        return d_hidden, d_head, None, None
