"""The objectives of HLLM: Eq. (1) InfoNCE over the catalogue, Eq. (2) classification, Eq. (3) their sum.

Shapes: T predictions (packed positions of all users), K negatives (shared by all positions), B users
(sequences), S excluded ids (packed over users), Q exposures, D item width. Offsets are int64 [B + 1] and
start at 0. Similarities are cosines; everything here runs in at least float32, also under autocast.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hllm_torchrec.modules.precision import widen

MAX_SCALE = 100.0
"""Largest logit scale, i.e. a temperature of 0.01."""

EPS = 1e-6
"""Smallest norm a vector is divided by."""


class LogitScale(nn.Module):
    """The learnable temperature of s in Eq. (1): logits = scale * cosine, scale = 1 / temperature <= 100.

    The parameter is the scale's logarithm, of shape [1] (FSDP2 refuses 0-d parameters).
    """

    def __init__(self, temperature: float = 0.05) -> None:
        """Start at `temperature` (0.01 or more).

        Raises:
            ValueError: a temperature below 0.01.
        """
        super().__init__()
        if not temperature >= 1.0 / MAX_SCALE:
            raise ValueError(
                f"temperature is {temperature}: must be at least {1 / MAX_SCALE}, "
                f"a logit scale of at most {MAX_SCALE:g}"
            )
        self.temperature = temperature
        self.log_scale = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the scale to 1 / temperature (also after `to_empty` on a module built on the meta device)."""
        nn.init.constant_(self.log_scale, -math.log(self.temperature))

    def forward(self) -> Tensor:
        """Return the scale, at least float32 [1], in (0, 100]."""
        log_scale = widen(self.log_scale)
        clamped: Tensor = _ClampFromAbove.apply(log_scale, math.log(MAX_SCALE))
        return clamped.exp()


class Exclusion(NamedTuple):
    """For every prediction, the ids that are no negatives of it: those of its own user's sequence.

    ids: int64 [S], packed by sequence; offsets: int64 [B + 1] into them; row_to_sequence: int64 [T], the
    sequence in [0, B) of each prediction.
    """

    ids: Tensor
    offsets: Tensor
    row_to_sequence: Tensor


@dataclass(frozen=True)
class InfoNceOutput:
    """What `info_nce` returns: 0-d tensors; only `loss_sum` carries a gradient.

    loss_sum: sum of Eq. (1) over the T predictions. count: int64, T. effective_negatives: mean over
    predictions of the negatives left after masking. accuracy: share of predictions whose positive beats every
    negative left to them. Both means are 0 when T = 0. Read a falling loss beside the effective negatives.
    """

    loss_sum: Tensor
    count: Tensor
    effective_negatives: Tensor
    accuracy: Tensor


def info_nce(
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
    """Eq. (1): -log(exp(s+) / (exp(s+) + sum_k exp(s_k))), s = scale * cosine, summed over the predictions.

    A negative is masked where its id is the target's or stands in the user's own sequence. HLLM's public code
    masks by cosine > 0.99 instead, which masks everything, and reports a loss of 0, once embeddings collapse.
    Where no negative is left the loss is 0 (see `InfoNceOutput.effective_negatives`). A negative drawn twice
    counts twice, as in Eq. (1).

    Memory is O(T D + K D + (T + B) chunk_size): logits and masks exist for `chunk_size` negatives at a time,
    and the backward pass computes them again.

    Args:
        predictions: [T, D], E' of the User LLM (of any norm).
        positives: [T, D], E of the next items, from the Item LLM.
        negatives: [K, D], E of the sampled items, K >= 1.
        scale: [1], from `LogitScale`.
        target_ids: int64 [T], ids of the positives.
        negative_ids: int64 [K].
        exclude: ids of the users' own sequences, or None to mask the targets alone.
        chunk_size: negatives per chunk, >= 1.

    Raises:
        ValueError: no negatives, or a chunk size below 1.
    """
    if negatives.shape[0] == 0:
        raise ValueError("InfoNCE got no negatives: its loss would always be 0; sample at least one per step")
    if chunk_size < 1:
        raise ValueError(f"InfoNCE chunk size is {chunk_size}: must be at least 1")
    n_rows = predictions.shape[0]
    with torch.autocast(device_type=predictions.device.type, enabled=False):
        query = F.normalize(widen(predictions), dim=-1, eps=EPS) * scale
        positive_logits = (query * F.normalize(widen(positives), dim=-1, eps=EPS)).sum(dim=-1)
        unit_negatives = F.normalize(widen(negatives), dim=-1, eps=EPS).to(query.dtype)
        masker = _NegativeMask(target_ids, negative_ids, exclude)
        log_sum, largest, n_left = _MaskedLogSumExp.apply(query, unit_negatives, masker, chunk_size)
        # -log(e^p / (e^p + e^n)) = -log sigmoid(p - n), which stays exact where all negatives are masked.
        loss_sum = -F.logsigmoid(positive_logits - log_sum).sum()
    denominator = max(n_rows, 1)
    return InfoNceOutput(
        loss_sum=loss_sum,
        count=torch.tensor(n_rows, device=predictions.device),
        effective_negatives=n_left.sum() / denominator,
        accuracy=(positive_logits.detach() > largest).sum() / denominator,
    )


def binary_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Eq. (2), -(y log x + (1 - y) log(1 - x)) with x = sigmoid(logit), as a (weighted) sum over exposures.

    The sum, not the mean: the trainer divides by the global count or weight, so that ranks with different
    numbers of exposures weigh them equally.

    Args:
        logits: [Q]. labels: [Q], 0 or 1 (or a probability). weights: [Q] or None for 1 each.

    Returns:
        0-d, at least float32; 0 with a gradient of 0 for Q = 0.

    Raises:
        ValueError: shapes that differ.
    """
    if logits.shape != labels.shape or (weights is not None and weights.shape != logits.shape):
        shapes = [tuple(logits.shape), tuple(labels.shape), None if weights is None else tuple(weights.shape)]
        raise ValueError(f"logits, labels and weights have shapes {shapes}: must be equal, one per exposure")
    wide = widen(logits)
    weight = None if weights is None else weights.to(wide.dtype)
    return F.binary_cross_entropy_with_logits(wide, labels.to(wide.dtype), weight=weight, reduction="sum")


def discriminative_loss(cls: Tensor, gen: Tensor, lam: float) -> Tensor:
    """Eq. (3): lambda * L_gen + L_cls, of two losses that are already normalised (each by its own count).

    Raises:
        ValueError: a negative lambda.
    """
    if not lam >= 0:
        raise ValueError(f"lambda, the weight of the generative loss, is {lam}: must be at least 0")
    return lam * gen + cls


@torch.no_grad()
def embedding_spread(x: Tensor) -> Tensor:
    """Return the mean cosine similarity over the pairs of different rows of x [N, D]: 0-d, no gradient.

    The input of the collapse alarm: near 0 for spread-out embeddings, 1 when all point the same way. Computed
    as (|sum u|^2 - sum |u|^2) / (N (N - 1)) over unit vectors u, in O(N D); for large N this is the squared
    norm of their mean. 0 for fewer than two rows.
    """
    n = x.shape[0]
    unit = F.normalize(widen(x), dim=-1, eps=EPS)
    pairs = unit.sum(dim=0).square().sum() - unit.square().sum()
    return pairs / max(n * (n - 1), 1) if n > 1 else pairs * 0


class _NegativeMask:
    """Which (prediction, negative) pairs are not negatives, for one chunk of negatives at a time."""

    def __init__(self, target_ids: Tensor, negative_ids: Tensor, exclude: Exclusion | None) -> None:
        self.target_ids = target_ids
        self.negative_ids = negative_ids
        self.exclude = exclude
        if exclude is not None:
            n_sequences = exclude.offsets.shape[0] - 1
            sequences = torch.arange(n_sequences, device=exclude.ids.device)
            self.n_sequences = n_sequences
            self.sequence_of_excluded = torch.repeat_interleave(
                sequences, exclude.offsets.diff(), output_size=exclude.ids.shape[0]
            )

    def chunk(self, start: int, stop: int) -> Tensor:
        """Return bool [T, stop - start]: True where the pair is masked. Never waits for the device."""
        ids = self.negative_ids[start:stop]
        masked = self.target_ids[:, None] == ids
        if self.exclude is None:
            return masked
        # One column per distinct id (the place of its first copy in sorted order), and one more to take the
        # writes of the excluded ids that are not in this chunk.
        in_order = ids.sort().values
        column = torch.searchsorted(in_order, self.exclude.ids).clamp_(max=ids.shape[0] - 1)
        column = torch.where(in_order[column] == self.exclude.ids, column, ids.shape[0])
        in_sequence = ids.new_zeros((self.n_sequences, ids.shape[0] + 1), dtype=torch.bool)
        in_sequence[self.sequence_of_excluded, column] = True
        columns = in_sequence[:, torch.searchsorted(in_order, ids)]
        return masked.logical_or_(columns[self.exclude.row_to_sequence])


class _MaskedLogSumExp(torch.autograd.Function):
    """log sum_k exp(query . negative_k) over the negatives left, chunk by chunk; recomputed in backward.

    Also returns, without gradient, each row's largest logit (-inf where none is left) and its number of
    negatives left.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, negatives: Tensor, masker: _NegativeMask, chunk_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        log_sum = query.new_full(query.shape[:1], -torch.inf)
        largest = log_sum.clone()
        n_left = torch.zeros_like(masker.target_ids)
        for start in range(0, negatives.shape[0], chunk_size):
            logits = _masked_logits(query, negatives, masker, start, chunk_size)
            log_sum = torch.logaddexp(log_sum, torch.logsumexp(logits, dim=1))
            largest = torch.maximum(largest, logits.amax(dim=1))
            n_left += (logits > -torch.inf).sum(dim=1)
        ctx.save_for_backward(query, negatives, log_sum)
        ctx.masker, ctx.chunk_size = masker, chunk_size
        ctx.mark_non_differentiable(largest, n_left)
        return log_sum, largest, n_left

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_sum: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        query, negatives, log_sum = ctx.saved_tensors
        grad_query = torch.zeros_like(query) if ctx.needs_input_grad[0] else None
        grad_negatives = torch.empty_like(negatives) if ctx.needs_input_grad[1] else None
        # Rows without negatives: every logit is -inf, so exp(-inf - 0) = 0 instead of exp(-inf + inf).
        log_sum = torch.where(log_sum > -torch.inf, log_sum, 0.0)[:, None]
        with torch.autocast(device_type=query.device.type, enabled=False):
            for start in range(0, negatives.shape[0], ctx.chunk_size):
                logits = _masked_logits(query, negatives, ctx.masker, start, ctx.chunk_size)
                grad_logits = logits.sub_(log_sum).exp_().mul_(grad_log_sum[:, None])
                chunk = slice(start, start + ctx.chunk_size)
                if grad_query is not None:
                    grad_query.addmm_(grad_logits, negatives[chunk])
                if grad_negatives is not None:
                    torch.mm(grad_logits.T, query, out=grad_negatives[chunk])
        return grad_query, grad_negatives, None, None


def _masked_logits(query: Tensor, negatives: Tensor, masker: _NegativeMask, start: int, chunk_size: int) -> Tensor:
    """Return the logits [T, <= chunk_size] of the chunk that starts at `start`, -inf where masked."""
    stop = min(start + chunk_size, negatives.shape[0])
    logits = query @ negatives[start:stop].T
    return logits.masked_fill_(masker.chunk(start, stop), -torch.inf)


class _ClampFromAbove(torch.autograd.Function):
    """min(x, limit), with the gradient kept wherever a descent step would lower x.

    `torch.clamp` has gradient 0 above the limit, so that a parameter one step too far never comes back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(x >= limit)
        return x.clamp(max=limit)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (at_limit,) = ctx.saved_tensors
        return torch.where(at_limit & (grad < 0), 0.0, grad), None
