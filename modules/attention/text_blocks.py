"""Attention of packed texts from the rows of one product of q, k and v, with one gradient for all of them.

`BucketPlan.attend` pads, transposes and concatenates q, k and v of each bucket, and autograd adds the gradients of each
of these operations. On a CPU in bfloat16 this takes longer than the attention itself. Here one gather writes the blocks
of all buckets, with prefixes and padding, and in the backward pass one gather returns their gradients. The texts of a
bucket have the same positions, so the rotary embedding of q and k is a product with one matrix for each position:

    rotated = x cos + (x's halves exchanged, the first negated) sin = x R,  R [d, d]

Legend: S packed rows, C heads of a row of the product, U texts; of a bucket: b texts, N and M queries and keys of each;
H heads, G key-value heads, d width of a head. A block has the queries of the heads of a text that share a key-value
head, so that its keys are read once: b * G blocks of R = H / G * N rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from hllm_torchrec.modules.precision import widen

if TYPE_CHECKING:
    from hllm_torchrec.modules.attention.text import BucketPlan, TextBucket


@dataclass(frozen=True)
class BucketBlocks:
    """Blocks of a bucket: `count` = b * G with R `rows` and M `keys`, of which the first `seen` are the prefix's.

    positions: [M] int64, packed rows with the positions of the keys. bias: [b * G or 1, R, M], 0 or -inf; None: all
    keys are seen.
    """

    count: int
    rows: int
    keys: int
    seen: int
    positions: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class TextBlocks:
    """Arrangement of the rows of a product [S, C, d] as blocks; C = H + 2 G, the heads of q, k and v.

    cells: int64, row of the flattened product [S * C, d] that each row of the blocks copies: first all queries, then
    all keys, then all values, each bucket after bucket; queries and keys are sorted by position, then block, values
    by block. restored: [S * C] int64, for each row of the product, the one row of the blocks that is neither padding
    nor a copy of the prefix. mixed_cells, mixed_restored: the same for the output [S * H, d] and the rows of queries
    sorted by block. padding: int64, rows of queries that are padding, sorted by block.

    If only the last position of each text attends, its queries [U, H, d] are no part of the product: C is 2 G, the
    prefix has no queries, and mixed_cells and mixed_restored are None.
    """

    buckets: list[BucketBlocks]
    heads: int
    groups: int
    prefix: int
    cells: Tensor
    restored: Tensor
    mixed_cells: Tensor | None
    mixed_restored: Tensor | None
    padding: Tensor

    @property
    def sizes(self) -> list[int]:
        """Numbers of rows of all queries, all keys and all values."""
        queries = sum(bucket.count * bucket.rows for bucket in self.buckets)
        keys = sum(bucket.count * bucket.keys for bucket in self.buckets)
        return [queries, keys, keys]

    def queries(self, rows: Tensor) -> Iterator[Tensor]:
        """Yield the rows [b * G * R, d] of queries of each bucket."""
        yield from rows.split([bucket.count * bucket.rows for bucket in self.buckets])

    def keys(self, rows: Tensor) -> Iterator[Tensor]:
        """Yield the rows [b * G * M, d] of keys, or values, of each bucket."""
        yield from rows.split([bucket.count * bucket.keys for bucket in self.buckets])


def attend_blocks(
    product: Tensor, queries: Tensor | None, cos: Tensor, sin: Tensor, blocks: TextBlocks, scaling: float
) -> Tensor:
    """Attention of the rows of product [S, C, d]: [S, H * d]; cos and sin [S, d] of the rows' rotary angles.

    queries: [U, H, d] of each text's last position, already rotated, if only these attend; then the result is
    [U, H * d].
    """
    mixed: Tensor = _AttendBlocks.apply(product, queries, cos, sin, blocks, scaling)
    return mixed


def text_blocks(plan: "BucketPlan", heads: int, groups: int, last: bool, dtype: torch.dtype) -> TextBlocks:
    """Arrange the plan's texts as blocks of all positions, or only of the last one of each text, if `last`."""
    device = plan.position_ids.device
    first_key, shared = 0 if last else heads, heads // groups
    columns, group = first_key + 2 * groups, torch.arange(groups, device=device)
    head = torch.arange(heads, device=device).view(groups, shared)
    q_cells, mixed, q_own, k_cells, k_own, v_cells, v_own, buckets, start = [], [], [], [], [], [], [], [], 0
    for number, bucket in enumerate(plan.buckets):
        rows, own = _cells(bucket, device)
        before = torch.arange(bucket.seen, device=device)
        positions = torch.cat([before, start + torch.arange(bucket.longest, device=device)])
        rows, start = rows + start, start + bucket.count
        if last and plan.has_prefix and number == 0:
            continue
        # Dimensions in the order in which the cells are sorted: [texts, groups, heads of a group, positions].
        texts_rows, texts_own = rows[:, None, None], own[:, None, None].expand(-1, groups, shared, -1)
        keys, keys_own = torch.cat([before.expand(bucket.texts, -1), rows], 1), pad(own, (bucket.seen, 0))
        if not last:
            q_cells.append((texts_rows * columns + head[..., None]).permute(2, 3, 0, 1).flatten())
            q_own.append(texts_own.permute(2, 3, 0, 1).flatten())
            mixed.append(((texts_rows * heads + head[..., None]).flatten(), texts_own.flatten()))
        cells, keys_own = keys[:, None] * columns + first_key + group[:, None], keys_own[:, None].expand(-1, groups, -1)
        k_cells.append(cells.permute(2, 0, 1).flatten())
        k_own.append(keys_own.permute(2, 0, 1).flatten())
        v_cells.append(cells.flatten() + groups)
        v_own.append(keys_own.flatten())
        buckets.append(_bucket_blocks(bucket, positions, heads, groups, last, plan.causal, dtype))
    cells, owned = torch.cat(q_cells + k_cells + v_cells), torch.cat(q_own + k_own + v_own)
    mixed_cells = mixed_restored = None
    padding = cells[:0]
    if mixed:
        mixed_cells, mixed_own = (torch.cat(parts) for parts in zip(*mixed, strict=True))
        mixed_restored, padding = _inverse(mixed_cells, mixed_own, start * heads), (~mixed_own).nonzero().flatten()
    prefix, restored = plan.buckets[0].count if plan.has_prefix else 0, _inverse(cells, owned, start * columns)
    return TextBlocks(buckets, heads, groups, prefix, cells, restored, mixed_cells, mixed_restored, padding)


def _cells(bucket: "TextBucket", device: torch.device) -> tuple[Tensor, Tensor]:
    """Row of each cell [b, N], counted from the bucket's first one, and whether the cell is not padding."""
    shape = bucket.texts, bucket.longest
    if bucket.cells is None or bucket.kept is None:
        return torch.arange(bucket.count, device=device).view(shape), torch.ones(shape, dtype=torch.bool, device=device)
    own = torch.zeros(bucket.cells.shape, dtype=torch.bool, device=device).index_fill_(0, bucket.kept, True)
    return bucket.cells.view(shape), own.view(shape)


def _inverse(cells: Tensor, own: Tensor, rows: int) -> Tensor:
    """Index of each row's own cell [rows]; 0 for rows without one."""
    return cells.new_zeros(rows).index_copy_(0, cells[own], own.nonzero().flatten())


def _bucket_blocks(
    bucket: "TextBucket", positions: Tensor, heads: int, groups: int, last: bool, causal: bool, dtype: torch.dtype
) -> BucketBlocks:
    queries, keys, shared = 1 if last else bucket.longest, bucket.seen + bucket.longest, heads // groups
    mask, bias = bucket.last_mask if last else bucket.mask, None
    if causal and not last and mask is None:
        mask = torch.ones(queries, keys, dtype=torch.bool).tril()
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
        if bias.dim() == 2:
            bias = bias.repeat(shared, 1)[None]
        else:
            bias = bias.expand(-1, groups, shared * queries, -1).reshape(-1, shared * queries, keys)
    return BucketBlocks(bucket.texts * groups, shared * queries, keys, bucket.seen, positions, bias)


class _AttendBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        product: Tensor,
        queries: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        blocks: TextBlocks,
        scaling: float,
    ) -> Tensor:
        width, is_last = product.shape[2], queries is not None
        rows = product.flatten(0, 1).index_select(0, blocks.cells)
        if queries is not None:
            q_rows, (k_rows, v_rows) = queries.flatten(0, 1), rows.tensor_split(2)
        else:
            q_rows, k_rows, v_rows = rows.split(blocks.sizes)
        out, saved = torch.empty_like(q_rows), []
        parts = blocks.queries(q_rows), blocks.keys(k_rows), blocks.keys(v_rows), blocks.queries(out)
        for bucket, q, k, v, mixed in zip(blocks.buckets, *parts, strict=True):
            turns = _rotations(cos, sin, bucket.positions, product.dtype)
            k = torch.bmm(k.view(bucket.keys, bucket.count, width), turns).transpose(0, 1).contiguous()
            if is_last:
                q = q.view(bucket.count, bucket.rows, width)
            else:
                q = torch.bmm(q.view(bucket.rows, bucket.count, width), _of_queries(turns, bucket))
                q = q.transpose(0, 1).contiguous()
            v = v.view(bucket.count, bucket.keys, width)
            bias = q.new_empty(1, 1, 1) if bucket.bias is None else bucket.bias
            scores = torch.baddbmm(bias, q, k.transpose(1, 2), beta=int(bucket.bias is not None), alpha=scaling)
            weights = scores.softmax(-1)
            torch.bmm(weights, v, out=mixed.view(bucket.count, bucket.rows, width))
            saved += [q, k, v, weights, turns]
        ctx.save_for_backward(*saved)
        ctx.blocks, ctx.scaling, ctx.width = blocks, scaling, width
        if blocks.mixed_restored is not None:
            out = out.index_select(0, blocks.mixed_restored)
        return out.view(-1, blocks.heads * width)

    @staticmethod
    def backward(ctx: Any, received: Tensor) -> tuple[Tensor | None, ...]:
        blocks, scaling, width, saved = ctx.blocks, ctx.scaling, ctx.width, iter(ctx.saved_tensors)
        is_last = blocks.mixed_cells is None
        received = received.reshape(-1, width)
        if blocks.mixed_cells is not None:
            received = received.index_select(0, blocks.mixed_cells)
            received[blocks.padding] = 0
        of_rows = received.new_empty(sum(blocks.sizes), width)
        of_q, of_k, of_v = of_rows.split(blocks.sizes)
        parts = blocks.queries(received), blocks.queries(of_q), blocks.keys(of_k), blocks.keys(of_v)
        for bucket, of_mixed, to_q, to_k, to_v in zip(blocks.buckets, *parts, strict=True):
            q, k, v, weights, turns = (next(saved) for _ in range(5))
            of_mixed = of_mixed.view(q.shape)
            torch.bmm(weights.transpose(1, 2), of_mixed, out=to_v.view(v.shape))
            # Gradient of the softmax: w * (g - sum(g * w)).
            of_scores = torch.bmm(of_mixed, v.transpose(1, 2))
            of_scores = torch._softmax_backward_data(of_scores, weights, -1, weights.dtype)
            of_turned = torch.baddbmm(k, of_scores.transpose(1, 2), q, beta=0, alpha=scaling)
            back = turns.transpose(1, 2)
            torch.bmm(of_turned.transpose(0, 1), back, out=to_k.view(bucket.keys, bucket.count, width))
            if is_last:
                torch.baddbmm(q, of_scores, k, beta=0, alpha=scaling, out=to_q.view(q.shape))
            else:
                of_turned = torch.baddbmm(q, of_scores, k, beta=0, alpha=scaling).transpose(0, 1)
                torch.bmm(of_turned, _of_queries(back, bucket), out=to_q.view(bucket.rows, bucket.count, width))
        of_product = (of_rows[len(of_q) :] if is_last else of_rows).index_select(0, blocks.restored)
        of_product = of_product.view(-1, 2 * blocks.groups + (0 if is_last else blocks.heads), width)
        _add_prefix(of_product, of_k, of_v, blocks)
        return of_product, of_q.view(-1, blocks.heads, width) if is_last else None, None, None, None, None


def _rotations(cos: Tensor, sin: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrices [M, d, d] that rotate rows by the angles of cos and sin [S, d] at the positions [M]."""
    cos, sin = (angles.index_select(0, positions).to(dtype) for angles in (cos, sin))
    half, width = cos.shape[1] // 2, cos.shape[1]
    turns = cos.new_zeros(len(positions), width, width)
    turns.diagonal(0, 1, 2).copy_(cos)
    turns.diagonal(half, 1, 2).copy_(sin[:, :half])
    turns.diagonal(-half, 1, 2).copy_(-sin[:, :half])
    return turns


def _of_queries(turns: Tensor, bucket: BucketBlocks) -> Tensor:
    """Select the matrices [R, d, d] of the queries from those of all keys; heads of a block have equal matrices."""
    own = turns[bucket.seen :]
    return own.repeat(bucket.rows // len(own), 1, 1)


def _add_prefix(of_product: Tensor, of_k: Tensor, of_v: Tensor, blocks: TextBlocks) -> None:
    """Add the gradients of the copies of the prefix's keys and values to those of the prefix's rows."""
    if not blocks.prefix:
        return
    own = of_product[: blocks.prefix, -2 * blocks.groups :]
    if blocks.mixed_cells is None:
        own.zero_()  # the prefix has no block
    own_k, own_v = own.tensor_split(2, 1)
    total_k, total_v = (torch.zeros_like(part, dtype=widen(part[:0]).dtype) for part in (own_k, own_v))
    for bucket, k, v in zip(blocks.buckets, blocks.keys(of_k), blocks.keys(of_v), strict=True):
        if bucket.seen:
            k = k.view(bucket.keys, -1, blocks.groups, own.shape[2])[: bucket.seen]
            v = v.view(-1, blocks.groups, bucket.keys, own.shape[2])[:, :, : bucket.seen]
            total_k += k.sum(1, dtype=total_k.dtype)
            total_v += v.sum(0, dtype=total_v.dtype).transpose(0, 1)
    own_k += total_k
    own_v += total_v
