"""Symmetric InfoNCE between two vectors per row: a user's projected vector, and the vector of a text about the user.

Legend: N rows, M candidates (the rows of all ranks), C width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hllm_torchrec.modules.losses.objectives import EPS
from hllm_torchrec.modules.precision import widen


@dataclass(frozen=True)
class SymmetricNceOutput:
    """Result of `symmetric_nce`.

    loss_sum: 0-d, half the sum over rows of the losses of both directions; count: N; effective_negatives: 0-d, mean
    number of negatives left after masking.
    """

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
    with the positive is above .99 instead (`cosine_above`). If all profiles were written by one language model, this
    masks all candidates, and the loss is 0.

    Args:
        a, b: [N, C], of any norm.
        user_ids: int64 [N].
        scale: [1], 1 / temperature.
        everyone: (a [M, C], b [M, C], user ids [M]), the rows of all ranks, including this one; None: (a, b, user_ids).
        cosine_above: mask by this cosine instead of by user id; for comparison with the published code.
    """
    a, b = (F.normalize(widen(x), dim=-1, eps=EPS) for x in (a, b))
    all_a, all_b, all_ids = everyone if everyone is not None else (a, b, user_ids)
    all_a, all_b = (F.normalize(widen(x), dim=-1, eps=EPS) for x in (all_a, all_b))
    positive = (a * b).sum(-1, keepdim=True)
    losses, left = [], []
    for x, positives, candidates in ((a, b, all_b), (b, a, all_a)):
        masked = user_ids[:, None] == all_ids if cosine_above is None else positives @ candidates.T > cosine_above
        negatives = (x @ candidates.T * scale).masked_fill(masked, -torch.inf)
        # The positive is added as a separate column, because the mask of the user's rows also masks row n itself.
        losses.append(-torch.cat([positive * scale, negatives], 1).log_softmax(1)[:, 0])
        left.append((~masked).sum(1).to(positive.dtype))
    effective = torch.cat(left).mean() if user_ids.numel() else positive.new_zeros(())
    return SymmetricNceOutput(sum(losses).sum() / 2, user_ids.numel(), effective)  # type: ignore[union-attr]
