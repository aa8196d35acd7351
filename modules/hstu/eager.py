"""HSTU's pointwise attention by padded blocks: the eager reference, optionally with compiled inner functions.

Sequences of similar length share a bucket. A bucket's rows are processed in chunks, each against the keys that its
rows can see, so most pairs in the future (or before the window) are never computed. The backward pass is explicit: it
saves the inputs and the first `CACHED_SCORES` scores, and recomputes the other scores. Memory therefore does not grow
with the square of the length: at any time the scores of one chunk and the saved ones exist.

Legend: S packed rows (history positions, then queries), b sequences of a bucket, L its longest history, Q the most
queries of one of them, n rows without padding, M asking rows of a chunk, N keys, H heads, D and V widths of a head's
keys and values.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hllm_torchrec.modules.hstu.blocks import (
    COPIES,
    BlockLayout,
    Chunk,
    PaddedBucket,
    PairMask,
    pair_mask,
    without_padding,
)
from hllm_torchrec.modules.hstu.layout import Layout, RelativeBias, look_up, own_keys

CACHED_SCORES = 2**24
"""Maximum number of scores of a layer (all heads) that are saved for the backward pass: 64 MiB in float32."""


def block_attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, bias: Tensor | None, alpha: float) -> Tensor:
    """Attention sums before the division by n_i, over a cached history.

    q [b, M, H, D], k [b, N, H, D], v [b, N, H, V] -> [b, M, H, V]; hidden [b or 1, M, N] bool; bias [b, M, N] or None.
    """
    scores = torch.einsum("bmhd,bnhd->bhmn", q, k) * alpha
    if bias is not None:
        scores = scores + bias[:, None].to(scores.dtype)
    weights = F.silu(scores).masked_fill(hidden[:, None], 0.0)
    return torch.einsum("bhmn,bnhv->bmhv", weights, v)


class InnerFunctions(NamedTuple):
    """Elementwise functions on scores [H, b, M, N]; hidden [b or 1, M, N - open] starts at key `open`.

    weights: (scores, hidden, open) -> silu(scores), 0 where hidden. gradients: (scores, gradient of the weights,
    hidden, open) -> (weights, gradient of the scores). These are the functions that the compiled backend compiles.
    """

    weights: Callable[[Tensor, Tensor, int], Tensor]
    gradients: Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


def _weights(scores: Tensor, hidden: Tensor, first: int) -> Tensor:
    # silu makes a new tensor: the scores may be saved for the backward pass and must stay as they are.
    weights = F.silu(scores)
    weights[..., first:].masked_fill_(hidden, 0.0)
    return weights


def _gradients(scores: Tensor, received: Tensor, hidden: Tensor, first: int) -> tuple[Tensor, Tensor]:
    gradient = torch.ops.aten.silu_backward(received, scores)
    gradient[..., first:].masked_fill_(hidden, 0.0)
    return _weights(scores, hidden, first), gradient


EAGER = InnerFunctions(_weights, _gradients)


class _Part(NamedTuple):
    """Padded rows of a bucket, heads first: q, k, v [H, b, L, .]; q of the queries [H, b, Q, .] or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    queries: Tensor | None

    def rows(self, chunk: Chunk) -> Tensor:
        """The q rows of a chunk: [H, b, M, D]."""
        x = self.q if chunk.is_history else self.queries
        assert x is not None
        return x[:, :, slice(*chunk.rows)]

    def zeros(self) -> "_Part":
        """Zeros of the same shapes, to add gradients to."""
        q, k, v = (torch.zeros_like(x) for x in (self.q, self.k, self.v))
        return _Part(q, k, v, None if self.queries is None else torch.zeros_like(self.queries))


def _gather(x_SHD: Tensor, rows: Tensor) -> Tensor:
    """Gather the packed rows `rows` [b, L] of x as [H, b, L, D]."""
    gathered = x_SHD.index_select(0, rows.flatten()).view(*rows.shape, *x_SHD.shape[1:])
    return gathered.permute(2, 0, 1, 3).contiguous()


def _part(bucket: PaddedBucket, q: Tensor, k: Tensor, v: Tensor) -> _Part:
    asking = None if bucket.queries is None else _gather(q, bucket.queries)
    return _Part(_gather(q, bucket.rows), _gather(k, bucket.rows), _gather(v, bucket.rows), asking)


class _HistoryAttention(torch.autograd.Function):
    """Attention of all rows over history keys alone (a query's own key is added in `blockwise`): [S, H, V]."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        of_position: Tensor | None,
        of_time: Tensor | None,
        layout: BlockLayout,
        inner: InnerFunctions,
        keeps: bool,
    ) -> Tensor:
        """Compute chunk by chunk; `keeps`: a backward pass may follow, so save scores."""
        outputs, kept, room = [], [], CACHED_SCORES if keeps else 0
        # alpha is applied to q once, instead of to the scores, of which there are far more.
        scaled = q * layout.rules.alpha if layout.rules.alpha != 1 else q
        for bucket in layout.buckets:
            part = _part(bucket, scaled, k, v)
            of_history = part.v.new_empty(*part.q.shape[:3], v.shape[2])
            of_queries = None if part.queries is None else part.v.new_empty(*part.queries.shape[:3], v.shape[2])
            for chunk in bucket.chunks:
                marks = chunk.mask or pair_mask(layout.rows, layout.rules, bucket, chunk)
                scores = _scores(part, chunk, marks, of_position, of_time)
                weights = inner.weights(scores, marks.hidden, marks.num_open_keys)
                out = of_history if chunk.is_history else of_queries
                assert out is not None
                out[:, :, slice(*chunk.rows)] = weights @ part.v[:, :, slice(*chunk.keys)]
                # `room` never grows again, so the saved scores are those of the first chunks, in order; backward relies
                # on it.
                room -= scores.numel()
                if room >= 0:
                    kept.append(scores)
            # The order here (history, then queries, by bucket) is the one that `plan_blocks` made `restore` for.
            outputs += _emitted(bucket, of_history, of_queries)
        ctx.save_for_backward(q, k, v, of_position, of_time, *kept)
        ctx.layout, ctx.inner = layout, inner
        return _restored(outputs, v, layout) / layout.divisor.to(v.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Compute chunk by chunk; scores that were not saved are recomputed."""
        q, k, v, of_position, of_time, *kept = ctx.saved_tensors
        layout: BlockLayout = ctx.layout
        alpha, needed = layout.rules.alpha, of_position is not None and any(ctx.needs_input_grad[3:5])
        # The tables' gradients are summed over all chunks and buckets in the tables' own type.
        tables = (of_position.new_zeros(of_position.shape), of_time.new_zeros(of_time.shape)) if needed else None
        scaled, received = (q * alpha if alpha != 1 else q), grads[0] / layout.divisor.to(v.dtype)
        found: list[list[Tensor]] = [[], [], []]
        scores_kept = iter(kept)
        for bucket in layout.buckets:
            part, grad = _part(bucket, scaled, k, v), _received(bucket, received)
            sums = part.zeros()
            for chunk in bucket.chunks:
                marks = chunk.mask or pair_mask(layout.rows, layout.rules, bucket, chunk)
                scores = next(scores_kept, None)
                if scores is None:
                    scores = _scores(part, chunk, marks, of_position, of_time)
                of_scores = _add_gradients(part, sums, grad, chunk, marks, scores, ctx.inner)
                if tables is not None:
                    _add_bias_gradients(*tables, chunk, marks, of_scores)
            # Query rows are never keys here, so their rows of dk and dv are zero; `own_keys` has its own gradients.
            none_of_queries = [None if x is None else x.new_zeros(x.shape) for x in (sums.queries, grad[1])]
            for rows, parts in zip(
                found, ((sums.q, sums.queries), (sums.k, none_of_queries[0]), (sums.v, none_of_queries[1]))
            ):
                rows += _emitted(bucket, *parts)
        dq, dk, dv = (_restored(rows, x, layout) for rows, x in zip(found, (q, k, v)))
        # The scores were of q * alpha: the chain rule gives dq the same factor.
        return dq * alpha if alpha != 1 else dq, dk, dv, *(tables or (None, None)), None, None, None


def _received(bucket: PaddedBucket, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gather output gradients of history [H, b, L, V] and queries [H, b, Q, V] (or None), 0 at padding.

    A padding cell repeats a valid row: without the zeros that row's gradient would count more than once.
    """
    of_history = _gather(grad, bucket.rows)
    if bucket.valid is not None:
        of_history.masked_fill_(~bucket.valid[:, :, None], 0.0)
    if bucket.queries is None or bucket.queries_valid is None:
        return of_history, None
    return of_history, _gather(grad, bucket.queries).masked_fill_(~bucket.queries_valid[:, :, None], 0.0)


def _scores(part: _Part, chunk: Chunk, marks: PairMask, of_position: Tensor | None, of_time: Tensor | None) -> Tensor:
    """Compute alpha q . k + rab of a chunk: [H, b, M, N]."""
    q, keys = part.rows(chunk), part.k[:, :, slice(*chunk.keys)].transpose(-1, -2)
    if of_position is None or of_time is None:
        return q @ keys
    added = _bias(chunk, marks, of_position, of_time).to(q.dtype)
    scores = q.new_empty(*q.shape[:3], keys.shape[3])
    # baddbmm adds the bias within the matrix product, which saves a pass over the scores. Its one batch dimension is
    # the sequences: with heads folded in, the bias [b, M, N] would not broadcast, so one head at a time.
    for head in range(q.shape[0]):
        torch.baddbmm(added, q[head], keys[head], out=scores[head])
    return scores


def _bias(chunk: Chunk, marks: PairMask, of_position: Tensor, of_time: Tensor) -> Tensor:
    """Look up rab of a chunk: [b, M, N]."""
    assert marks.bucket is not None
    by_time = look_up(of_time.repeat(COPIES), marks.bucket)
    if marks.distance is not None:
        return by_time.add_(look_up(of_position, _place(of_position, marks.distance)))
    number, keys = marks.bucket.shape[1:]
    # Rows and keys are consecutive positions, so the bias of the distance is constant along diagonals (Toeplitz): a
    # strided view of M + N - 1 numbers (row i is `along` from i on) instead of M x N look-ups. Its first row is the
    # chunk's last, where distances are largest, hence the flip.
    along = of_position[_places_on_diagonals(of_position, chunk)]
    return by_time.add_(along.as_strided((number, keys), (1, 1)).flip(0))


def _place(of_position: Tensor, distance: Tensor) -> Tensor:
    return distance.clamp(max=of_position.numel() - 1)


def _places_on_diagonals(of_position: Tensor, chunk: Chunk) -> Tensor:
    """Index into the position table for each diagonal of a history chunk: [M + N - 1].

    The first is for the last row and first key (the largest distance); distances then fall by one.
    """
    farthest, nearest = chunk.rows[1] - 1 - chunk.keys[0], chunk.rows[0] - (chunk.keys[1] - 1)
    diagonals = torch.arange(farthest, nearest - 1, -1, device=of_position.device)
    # Negative distances are in the future, which is masked: any valid index will do.
    return diagonals.clamp(0, of_position.numel() - 1)


def _add_gradients(
    part: _Part,
    sums: _Part,
    received: tuple[Tensor, Tensor | None],
    chunk: Chunk,
    marks: PairMask,
    scores: Tensor,
    inner: InnerFunctions,
) -> Tensor:
    """Add the gradients of a chunk to `sums`; return the gradient of its scores [H, b, M, N]."""
    of_rows = received[0] if chunk.is_history else received[1]
    assert of_rows is not None
    grad, keys = of_rows[:, :, slice(*chunk.rows)], slice(*chunk.keys)
    weights, of_scores = inner.gradients(
        scores, grad @ part.v[:, :, keys].transpose(-1, -2), marks.hidden, marks.num_open_keys
    )
    # Keys belong to several chunks, so k and v accumulate; each row belongs to one chunk, so q is written once.
    sums.v[:, :, keys] += weights.transpose(-1, -2) @ grad
    sums.k[:, :, keys] += of_scores.transpose(-1, -2) @ part.rows(chunk)
    sums.rows(chunk).copy_(of_scores @ part.k[:, :, keys])
    return of_scores


def _add_bias_gradients(of_position: Tensor, of_time: Tensor, chunk: Chunk, marks: PairMask, of_scores: Tensor) -> None:
    """Add the gradient of a chunk's scores [H, b, M, N] to the gradients of both tables."""
    assert marks.bucket is not None
    # The bias is shared by all heads.
    by_pair = of_scores.sum(0).to(of_time.dtype)
    by_copy = of_time.new_zeros(COPIES * of_time.numel())
    by_copy.index_add_(0, marks.bucket.flatten().int(), by_pair.flatten())
    of_time += by_copy.view(COPIES, -1).sum(0)
    if marks.distance is not None:
        places = _place(of_position, marks.distance).flatten().int()
        of_position.index_add_(0, places, by_pair.flatten())
        return
    number, keys = by_pair.shape[1:]
    # Diagonals to columns: after the flip, pair (i, j) is on diagonal i + j. Padding each row by M cells and reading
    # the flat result in rows that are one cell shorter moves row i right by i: column i + j holds diagonal i + j.
    shifted = F.pad(by_pair.sum(0).flip(0), (0, number)).flatten()[:-number].view(number, keys + number - 1)
    of_position.index_add_(0, _places_on_diagonals(of_position, chunk), shifted.sum(0))


def _emitted(bucket: PaddedBucket, of_history: Tensor, of_queries: Tensor | None) -> list[Tensor]:
    """Flatten [H, b, L, V] and [H, b, Q, V] to rows [n, H, V] without padding."""
    emitted = [without_padding(of_history.permute(1, 2, 0, 3), bucket.valid)]
    if of_queries is not None:
        emitted.append(without_padding(of_queries.permute(1, 2, 0, 3), bucket.queries_valid))
    return emitted


def _restored(emitted: list[Tensor], like: Tensor, layout: BlockLayout) -> Tensor:
    """Bring emitted rows to the packed order: [S, H, V]; rows of queries without history are 0."""
    alone = like.new_zeros(layout.num_without_history, *like.shape[1:])
    return torch.cat([*emitted, alone]).index_select(0, layout.restore)


@torch.compiler.disable  # shapes differ in every batch: traced, it would be recompiled for each
def blockwise(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, bias: RelativeBias | None, inner: InnerFunctions = EAGER
) -> Tensor:
    """Compute the attention of all buckets, chunk by chunk: [S, H, V]."""
    assert isinstance(layout, BlockLayout), "planned for another backend"
    tables = (None, None) if bias is None else (bias.of_position, bias.of_time)
    # Computed in the type of the inputs: autocast would change the forward pass, but not the explicit backward.
    with torch.autocast(q.device.type, enabled=False):
        total: Tensor = _HistoryAttention.apply(q, k, v, *tables, layout, inner, torch.is_grad_enabled())
    if layout.rows.visible.numel():
        total = total + own_keys(q, k, v, layout, bias) / layout.divisor.to(total.dtype)
    return total
