"""The objectives of HLLM: Eq. (1) InfoNCE with sampled negatives, Eq. (2) classification, Eq. (3) their sum.

Legend: T predictions (packed positions of all users), t predictions of a chunk, K negatives (shared by all positions),
B users (sequences), S excluded ids (packed over users), Q exposures, N rows, D item width. Offsets are int64 [B + 1]
and start at 0. Similarities are cosines; everything here runs in at least float32, also under autocast.
"""

import functools
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
"""Smallest norm by which a vector is divided."""

MOST_LOGITS = 2**22
"""Largest number of logits that exist at a time: 16 MiB in float32."""


ROUNDING = 16
"""Relative difference up to which two logits count as equal, in units of their type's epsilon."""


class LogitScale(nn.Module):
    """Learnable temperature of s in Eq. (1): logits = scale * cosine, scale = 1 / temperature <= 100.

    The parameter is the logarithm of the scale, of shape [1] (FSDP2 refuses 0-d parameters).
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
    """Ids that are not used as negatives of a prediction: those of its own user's sequence.

    ids: int64 [S], packed by sequence; offsets: int64 [B + 1] into them; row_to_sequence: int64 [T], the
    sequence in [0, B) of each prediction.
    """

    ids: Tensor
    offsets: Tensor
    row_to_sequence: Tensor


@dataclass(frozen=True)
class InfoNceOutput:
    """Result of `info_nce`: 0-d tensors; only `loss_sum` has a gradient.

    loss_sum: sum of Eq. (1) over the T predictions. count: int64, T. effective_negatives: mean over predictions of the
    number of negatives left after masking. accuracy: share of predictions whose positive beats every negative left,
    by more than rounding. Both means are 0 when T = 0. A falling loss means little if the effective negatives fall
    as well.
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
    cosine_above: float | None = None,
    chunk_size: int | None = None,
) -> InfoNceOutput:
    """Eq. (1): -log(exp(s+) / (exp(s+) + sum_k exp(s_k))), s = scale * cosine, summed over the predictions.

    A negative is masked if its id is the target's or is in the user's own sequence. HLLM's public code masks by
    cosine > 0.99 instead (`cosine_above`, without `exclude`): when embeddings collapse, that mask hides every negative
    and the loss is 0. If no negative is left the loss is 0 (see `InfoNceOutput.effective_negatives`). A negative that
    was drawn twice counts twice, as in Eq. (1).

    Memory beyond the inputs is that of their gradients and O(T D + K chunk_size): logits and masks exist for
    `chunk_size` predictions at a time. Gradients are computed in the forward pass, while the logits exist, so the
    logits are computed once; the backward pass scales the gradients in place. (A second backward pass through the
    same graph recomputes them.) On CUDA the host waits once for the device.

    Args:
        predictions: [T, D], E' of the User LLM (of any norm).
        positives: [T, D], E of the next items, from the Item LLM.
        negatives: [K, D], E of the sampled items, K >= 1.
        scale: [1], from `LogitScale`.
        target_ids: int64 [T], ids of the positives.
        negative_ids: int64 [K].
        exclude: ids of the users' own sequences, or None to mask only the targets.
        cosine_above: also mask negatives whose cosine with the positive is above this; None: mask by ids only.
        chunk_size: predictions per chunk, >= 1; None: the most that `MOST_LOGITS` allows.

    Raises:
        ValueError: no negatives, or a chunk size below 1.
    """
    n_rows, n_negatives = predictions.shape[0], negatives.shape[0]
    if n_negatives == 0:
        raise ValueError("InfoNCE got no negatives: its loss would always be 0; sample at least one per step")
    if chunk_size is None:
        chunk_size = max(1, MOST_LOGITS // n_negatives)
    if chunk_size < 1:
        raise ValueError(f"InfoNCE chunk size is {chunk_size}: must be at least 1")
    masker = NegativeMask(target_ids, negative_ids, exclude, cosine_above)
    # In bfloat16 a cosine has 8 significant bits: positive and negatives would tie.
    with torch.autocast(device_type=predictions.device.type, enabled=False):
        dtype = functools.reduce(torch.promote_types, (x.dtype for x in (predictions, positives, negatives, scale)))
        dtype = torch.promote_types(dtype, torch.float32)
        inputs = (x.to(dtype) for x in (predictions, positives, negatives, scale))
        loss_sum, n_left, n_right = _InfoNce.apply(*inputs, masker, chunk_size, torch.is_grad_enabled())
    denominator = max(n_rows, 1)
    return InfoNceOutput(
        loss_sum=loss_sum,
        count=torch.tensor(n_rows, device=predictions.device),
        effective_negatives=n_left / denominator,
        accuracy=n_right / denominator,
    )


def binary_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Eq. (2), -(y log x + (1 - y) log(1 - x)) with x = sigmoid(logit), as a (weighted) sum over exposures.

    A sum, not a mean: the trainer divides by the global count or weight, so that every exposure has the same weight
    on ranks with different numbers of them.

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


@torch.no_grad()
def mean_cosine(x: Tensor) -> Tensor:
    """Return the mean cosine similarity over the pairs of different rows of x [N, D]: 0-d, no gradient.

    Used by the collapse alarm: near 0 for spread-out embeddings, 1 when all have the same direction. Computed as
    (|sum u|^2 - sum |u|^2) / (N (N - 1)) over unit vectors u, in O(N D); for large N this is the squared norm of
    their mean. 0 for fewer than two rows.
    """
    n = x.shape[0]
    unit = F.normalize(widen(x), dim=-1, eps=EPS)
    pairs = unit.sum(dim=0).square().sum() - unit.square().sum()
    return pairs / max(n * (n - 1), 1) if n > 1 else pairs * 0


class NegativeMask:
    """Mask of the (prediction, negative) pairs that are not used, for one chunk of predictions at a time."""

    def __init__(
        self,
        target_ids: Tensor,
        negative_ids: Tensor,
        exclude: Exclusion | None,
        cosine_above: float | None = None,
    ) -> None:
        self.cosine_above = cosine_above
        self.n_negatives = negative_ids.shape[0]
        # The same id may be drawn several times. Excluded ids are looked up by bisection, which finds only the first
        # copy of an id; `chunk` then copies that column of the mask to the columns of the other copies.
        self.in_order, self.order = negative_ids.sort(stable=True)
        first_copy = self._columns(negative_ids)
        self.copies = torch.nonzero(first_copy != torch.arange(self.n_negatives, device=first_copy.device))[:, 0]
        self.originals = first_copy[self.copies]
        self.column_of_target = self._columns(target_ids)
        self.exclude = exclude
        if exclude is not None:
            sequences = torch.arange(exclude.offsets.shape[0] - 1, device=exclude.ids.device)
            self.column_of_excluded = self._columns(exclude.ids)
            self.sequence_of_excluded = torch.repeat_interleave(
                sequences, exclude.offsets.diff(), output_size=exclude.ids.shape[0]
            )

    def _columns(self, ids: Tensor) -> Tensor:
        """Find the column of each id's first copy among the negatives; K, a spare column, if it is not among them."""
        # An id larger than all negatives would be placed at K, out of range; the comparison below then rejects it.
        place = torch.searchsorted(self.in_order, ids).clamp_(max=self.n_negatives - 1)
        return torch.where(self.in_order[place] == ids, self.order[place], self.n_negatives)

    def chunk(self, start: int, stop: int) -> Tensor:
        """Return bool [stop - start, K]: True where the pair is masked."""
        masked = self._own_sequences(start, stop)
        masked[torch.arange(stop - start, device=masked.device), self.column_of_target[start:stop]] = True
        if self.copies.numel():
            masked[:, self.copies] = masked[:, self.originals]
        return masked[:, : self.n_negatives]

    def _own_sequences(self, start: int, stop: int) -> Tensor:
        """Mask [stop - start, K + 1], True where the first copy of a negative is in the prediction's sequence."""
        n_rows, device = stop - start, self.in_order.device
        # Column K takes the writes of ids that are not negatives, so no write needs a condition (or a sync for its
        # size); `chunk` cuts it off.
        if self.exclude is None:
            return torch.zeros(n_rows, self.n_negatives + 1, dtype=torch.bool, device=device)
        # Each of the chunk's sequences uses the row of one of its predictions (the one that wrote last). One more row
        # takes the writes of all sequences that are not in the chunk.
        sequences = self.exclude.row_to_sequence[start:stop]
        row_of_sequence = sequences.new_full((self.exclude.offsets.shape[0] - 1,), n_rows)
        row_of_sequence[sequences] = torch.arange(n_rows, device=device)
        in_sequence = torch.zeros(n_rows + 1, self.n_negatives + 1, dtype=torch.bool, device=device)
        in_sequence[row_of_sequence[self.sequence_of_excluded], self.column_of_excluded] = True
        return in_sequence.index_select(0, row_of_sequence[sequences])


class _Gradients(NamedTuple):
    """Gradients of the loss sum with respect to the inputs; None where a gradient is not needed."""

    predictions: Tensor | None
    positives: Tensor | None
    negatives: Tensor | None
    scale: Tensor | None


class _InfoNce(torch.autograd.Function):
    """Return (loss_sum, negatives left, correct predictions), 0-d each; the last two without gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        predictions: Tensor,
        positives: Tensor,
        negatives: Tensor,
        scale: Tensor,
        masker: NegativeMask,
        chunk_size: int,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Inside a Function's forward gradient mode is always off, so the caller passes it in.
        wanted = tuple(grad_enabled and needed for needed in ctx.needs_input_grad[:4])
        inputs = (predictions, positives, negatives, scale)
        loss_sum, n_left, n_right, ctx.gradients = _chunked(*inputs, masker, chunk_size, wanted)
        ctx.save_for_backward(*inputs)
        ctx.masker, ctx.chunk_size, ctx.wanted = masker, chunk_size, wanted
        ctx.mark_non_differentiable(n_left, n_right)
        return loss_sum, n_left, n_right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # not kept, because autograd may change them in place
        if gradients is None:
            with torch.autocast(device_type=grad_loss.device.type, enabled=False):
                predictions, positives, negatives, scale = ctx.saved_tensors
                settings = (ctx.masker, ctx.chunk_size, ctx.wanted)
                gradients = _chunked(predictions, positives, negatives, scale, *settings)[-1]
        return *(None if grad is None else grad.mul_(grad_loss) for grad in gradients), None, None, None


def _chunked(
    predictions: Tensor,
    positives: Tensor,
    negatives: Tensor,
    scale: Tensor,
    masker: NegativeMask,
    chunk_size: int,
    wanted: tuple[bool, ...],
) -> tuple[Tensor, Tensor, Tensor, _Gradients]:
    """Return the outputs of `_InfoNce` and the gradients of the inputs that are `wanted`, computed chunk by chunk.

    Normalized copies exist for one chunk at a time. The negatives are never copied: their inverse norms scale the
    logits instead.
    """
    inverse_p, inverse_t, inverse_n = (_inverse_norm(x) for x in (predictions, positives, negatives))
    # The gradient of the scale is a by-product of that of the predictions.
    grad_p = torch.empty_like(predictions) if wanted[0] or wanted[3] else None
    grad_t = torch.empty_like(positives) if wanted[1] else None
    # A prediction and its positive are in one chunk, so their gradients are written once. All chunks share the
    # negatives, whose gradients are summed over the chunks.
    grad_n = torch.zeros_like(negatives) if wanted[2] else None
    loss_sum, scale_grad = predictions.new_zeros(()), torch.zeros_like(scale)
    n_right = torch.zeros_like(loss_sum, dtype=torch.int64)
    n_left = torch.full_like(n_right, predictions.shape[0] * negatives.shape[0])
    # One buffer for the logits of all chunks: they are overwritten with their own gradients below.
    space = predictions.new_empty(min(chunk_size, predictions.shape[0]), negatives.shape[0])
    for start in range(0, predictions.shape[0], chunk_size):
        rows = slice(start, min(start + chunk_size, predictions.shape[0]))
        unit = predictions[rows] * inverse_p[rows, None]
        query, target = unit * scale, positives[rows] * inverse_t[rows, None]
        logits = torch.mm(query, negatives.T, out=space[: unit.shape[0]]).mul_(inverse_n)
        masked = masker.chunk(rows.start, rows.stop)
        if masker.cosine_above is not None:
            masked |= torch.mm(target, negatives.T).mul_(inverse_n) > masker.cosine_above
        n_left -= masked.count_nonzero()
        losses, slopes, is_right = _softmax_(logits.masked_fill_(masked, -torch.inf), (query * target).sum(dim=-1))
        del masked  # frees it before the next chunk's mask is made
        loss_sum += losses.sum()
        n_right += is_right.count_nonzero()
        # d loss / d positive logit = -slope, and the positive logit is query . target.
        if grad_t is not None:
            torch.mul(query, -slopes[:, None], out=grad_t[rows])
        # The gradient of the negatives' unit vectors; `_through_norm_` turns it into that of the negatives.
        if grad_n is not None:
            grad_n.addmm_(logits.T, query)
        if grad_p is not None:
            # Here `logits` are gradients; with the inverse norms, `negatives` stand for their unit vectors.
            by_query = torch.mm(logits.mul_(inverse_n), negatives, out=grad_p[rows])
            by_query.addcmul_(target, slopes[:, None], value=-1)
            # query = scale * unit: the chain rule for the scale, then for the unit vector.
            scale_grad += (by_query * unit).sum()
            by_query.mul_(scale)
    gradients = _Gradients(
        _through_norm_(grad_p, predictions, inverse_p) if grad_p is not None and wanted[0] else None,
        _through_norm_(grad_t, positives, inverse_t) if grad_t is not None else None,
        _through_norm_(grad_n, negatives, inverse_n) if grad_n is not None else None,
        scale_grad if wanted[3] else None,
    )
    return loss_sum, n_left, n_right, gradients


def _softmax_(logits: Tensor, positive_logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses [t], slopes [t], and bool [t], True where the positive beats all negatives.

    slopes: negated derivatives of the losses with respect to the positive logits. `logits` [t, K] (-inf where masked)
    are replaced in place by the gradients of the losses with respect to the logits, slope * softmax.
    """
    largest = logits.amax(dim=1)
    is_right = beats(positive_logits, largest)
    # exp(logit - largest); a row without negatives is exp(-inf - 0) = 0, not exp(-inf + inf).
    largest = torch.where(largest > -torch.inf, largest, 0.0)
    total = logits.sub_(largest[:, None]).exp_().sum(dim=1)
    # -log(e^p / (e^p + e^n)) = -log sigmoid(p - n), which stays exact where all negatives are masked.
    margin = positive_logits - (largest + total.log())
    slopes = torch.sigmoid(-margin)
    logits.mul_((slopes / total.clamp(min=torch.finfo(total.dtype).tiny))[:, None])
    return -F.logsigmoid(margin), slopes, is_right


def beats(positive_logits: Tensor, largest: Tensor) -> Tensor:
    """Return bool [t], True where a positive logit is above `largest` [t] by more than rounding.

    After a collapse all embeddings are equal, and rounding, which differs between processors, decides which logit is
    larger. Such ties do not count as correct.
    """
    rounding = ROUNDING * torch.finfo(positive_logits.dtype).eps * positive_logits.abs()
    return positive_logits - rounding > largest


def _inverse_norm(x: Tensor) -> Tensor:
    """Compute 1 / max(norm, EPS) of each row: [N]."""
    return torch.linalg.vector_norm(x, dim=-1).clamp_(min=EPS).reciprocal_()


def _through_norm_(grads: Tensor, x: Tensor, inverse: Tensor) -> Tensor:
    """Turn gradients g w.r.t. u = x / max(|x|, EPS) into gradients w.r.t. x, in place: (g - u (u . g)) / |x|.

    Runs over blocks of rows, so that no temporary is as large as x.
    """
    grads.mul_(inverse[:, None])
    # Below EPS the divisor is a constant and has no gradient.
    slopes = torch.where(inverse < 1 / EPS, -inverse.square(), 0.0)
    for start in range(0, x.shape[0], 1024):
        rows = slice(start, start + 1024)
        along = (grads[rows] * x[rows]).sum(dim=-1)
        grads[rows].addcmul_(x[rows], (slopes[rows] * along)[:, None])
    return grads


class _ClampFromAbove(torch.autograd.Function):
    """min(x, limit), whose gradient above the limit is kept if a descent step would lower x, else 0.

    `torch.clamp` has gradient 0 above the limit, so a parameter that overshoots would never come back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(x >= limit)
        return x.clamp(max=limit)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (at_limit,) = ctx.saved_tensors
        # A negative gradient would make a descent step raise x: only such gradients are set to 0.
        return torch.where(at_limit & (grad < 0), 0.0, grad), None
