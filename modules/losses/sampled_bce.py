"""SASRec's binary cross-entropy with sampled negatives.

    -log sigmoid(s+) - mean over k of log sigmoid(-s_k)

With one negative per position this is Eq. (6) of SASRec; the mean over K shared negatives has the same expectation
and less variance. Similarities s are scaled cosines, as in `modules/losses/objectives.py`, so a model that was trained
with either loss is served in the same way.

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
    """Compute the loss, summed over the predictions [T, D]. Arguments, masks and output are as in `info_nce`.

    positives: [T, D]; negatives: [K, D], shared; scale: [1]; target_ids [T] and negative_ids [K]: int64, for the masks.

    Memory is O(T D + K D + chunk_size K): logits and masks exist for `chunk_size` predictions at a time, and the
    backward pass recomputes them.

    Raises:
        ValueError: there are no negatives, or the chunk size is below 1.
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
            # Without checkpointing the graph would keep logits and masks of all chunks, [T, K], for the backward pass.
            part, left, largest = checkpoint(_against, query[chunk], unit, masker, start, use_reentrant=False)
            loss, effective = loss + part, effective + left.sum()
            # The accuracy is computed in the loop, because a chunk returns only each row's largest logit.
            beaten = beaten + beats(positive_logits[chunk].detach(), largest).sum()
    return InfoNceOutput(
        loss_sum=loss,
        count=torch.tensor(rows, device=predictions.device),
        effective_negatives=effective / max(rows, 1),
        accuracy=beaten / max(rows, 1),
    )


def _against(query: Tensor, unit: Tensor, masker: NegativeMask, start: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum over rows of the mean of softplus(s_k), and for each row the number of unmasked negatives [t] and
    the largest of their logits [t]. query: [t, D], the chunk that begins at prediction `start`."""
    logits, masked = query @ unit.T, masker.chunk(start, start + len(query))
    left = (~masked).sum(1)
    # softplus(s) = -log sigmoid(-s); clamp: a row without negatives has the mean 0, not 0 / 0.
    losses = F.softplus(logits).masked_fill(masked, 0.0).sum(1) / left.clamp(min=1)
    return losses.sum(), left, logits.detach().masked_fill(masked, -torch.inf).amax(1)
