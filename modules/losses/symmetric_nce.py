"""Symmetric InfoNCE of two vectors of each row: a user's projected vector and that of a text about the user.

Legend: N rows, M candidates (the rows of all ranks), C width.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hllm_torchrec.modules.losses.objectives import EPS
from hllm_torchrec.modules.precision import widen


class SymmetricNceOutput(NamedTuple):
    """loss_sum: sum over rows of both directions, halved; count: N; effective_negatives: mean of those left."""

    loss_sum: Tensor
    count: int
    effective_negatives: Tensor


def symmetric_nce(
    a: Tensor,
    b: Tensor,
    user_ids: Tensor,
    scale: Tensor,
    everyone: tuple[Tensor, Tensor, Tensor] | None = None,
    cosine_above: float | None = None,
) -> SymmetricNceOutput:
    """1/2 sum_n [-log e^{s(a_n, b_n)} / sum_{m in A_n} e^{s(a_n, b_m)}] and the same with a and b exchanged.

    s = scale * cosine; A_n is n itself and all rows of *other users*. The published code masks candidates whose cosine
    with the positive is above .99 instead (`cosine_above`): with profiles of one language model that masks all of them,
    and reports a loss of 0.

    Args:
        a, b: [N, C], of any norm.
        user_ids: int64 [N].
        scale: [1], 1 / temperature.
        everyone: (a [M, C], b [M, C], user ids [M]) of all ranks, with the rows of this one; None: `a`, `b` themselves.
        cosine_above: mask by cosine alone instead of by user id; for comparison with the published code.
    """
    a, b = (F.normalize(widen(x), dim=-1, eps=EPS) for x in (a, b))
    all_a, all_b, all_ids = everyone if everyone is not None else (a, b, user_ids)
    all_a, all_b = (F.normalize(widen(x), dim=-1, eps=EPS) for x in (all_a, all_b))
    positive = (a * b).sum(-1, keepdim=True)
    losses, left = [], []
    for x, own, candidates in ((a, b, all_b), (b, a, all_a)):
        hidden = user_ids[:, None] == all_ids if cosine_above is None else own @ candidates.T > cosine_above
        negatives = (x @ candidates.T * scale).masked_fill(hidden, -torch.inf)
        # The positive is a column of its own: own rows of the candidates are masked with those of the same user.
        losses.append(-torch.cat([positive * scale, negatives], 1).log_softmax(1)[:, 0])
        left.append((~hidden).sum(1).to(positive.dtype))
    effective = torch.cat(left).mean() if user_ids.numel() else positive.new_zeros(())
    return SymmetricNceOutput(sum(losses).sum() / 2, user_ids.numel(), effective)  # type: ignore[union-attr]
