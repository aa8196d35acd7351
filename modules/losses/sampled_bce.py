"""SASRec's loss over sampled negatives: one binary decision for the positive, one against the negatives.

    -log sigmoid(s+) - mean over k of log sigmoid(-s_k)

With one negative a position this is the paper's Eq. (6); the mean over K shared negatives has the same
expectation and less noise. Similarities are scaled cosines, as in `modules.losses`, so that a model can be
trained with either loss and is served alike.

Shapes: T predictions, K negatives, D width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hllm_torchrec.modules.losses.objectives import EPS, Exclusion, InfoNceOutput, NegativeMask, beats
from hllm_torchrec.modules.precision import widen


def sampled_bce(
    predictions: Tensor,
    positives: Tensor,
    negatives: Tensor,
    scale: Tensor,
    *,
    target_ids: Tensor,
    negative_ids: Tensor,
    exclude: Exclusion | None = None,
    chunk_size: int = 1024,
) -> InfoNceOutput:
    """The loss summed over predictions [T, D]; arguments, masks and output are those of `losses.info_nce`.

    positives: [T, D]; negatives: [K, D], shared; scale: [1]; target_ids [T] and negative_ids [K]: int64, for the masks.

    Memory is O(T D + K D + chunk_size K): logits and masks exist for `chunk_size` predictions at a time, and the
    backward pass computes them again.

    Raises:
        ValueError: no negatives, or a chunk size below 1.
    """
    if negatives.shape[0] == 0:
        raise ValueError("the binary loss got no negatives: sample at least one per step")
    if chunk_size < 1:
        raise ValueError(f"the binary loss's chunk size is {chunk_size}: must be at least 1")
    rows = predictions.shape[0]
    with torch.autocast(device_type=predictions.device.type, enabled=False):
        query = F.normalize(widen(predictions), dim=-1, eps=EPS) * scale
        positive_logits = (query * F.normalize(widen(positives), dim=-1, eps=EPS)).sum(dim=-1)
        unit = F.normalize(widen(negatives), dim=-1, eps=EPS)
        masker = NegativeMask(target_ids, negative_ids, exclude)
        loss, effective, beaten = -F.logsigmoid(positive_logits).sum(), query.new_zeros(()), query.new_zeros(())
        for start in range(0, rows, chunk_size):
            chunk = slice(start, start + chunk_size)
            masked = masker.chunk(start, min(start + chunk_size, rows))
            part, left, largest = checkpoint(_against, query[chunk], unit, masked, use_reentrant=False)
            loss, effective = loss + part, effective + left.sum()
            beaten = beaten + beats(positive_logits[chunk].detach(), largest).sum()
    return InfoNceOutput(
        loss_sum=loss,
        count=torch.tensor(rows, device=predictions.device),
        effective_negatives=effective / max(rows, 1),
        accuracy=beaten / max(rows, 1),
    )


def _against(query: Tensor, unit: Tensor, masked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over rows of the mean of softplus(s_k), negatives left [t], and each row's largest logit [t]."""
    logits = query @ unit.T
    left = (~masked).sum(1)
    losses = F.softplus(logits).masked_fill(masked, 0.0).sum(1) / left.clamp(min=1)
    return losses.sum(), left, logits.detach().masked_fill(masked, -torch.inf).amax(1)
