"""Cuts a batch into padded blocks for `modules/hstu/eager.py`: buckets of sequences, and chunks of their rows.

Legend: S packed rows (history positions, then queries), b sequences of a bucket, L its longest history, Q the most
queries of one of them, n rows without padding, M asking rows of a chunk, N keys.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from hllm_torchrec.modules.encoders.base import PackedRows
from hllm_torchrec.modules.hstu.layout import AttentionRules, Layout, divisor, place_after_context, time_bucket
from hllm_torchrec.modules.jagged import length_buckets, lengths_from_offsets

FEWEST_ROWS = 128
"""Minimum number of rows of a chunk, unless memory needs fewer; in small batches, sequences up to this length share a
bucket. Smaller pieces cost more in calls than they save."""
SHARED_CELLS = 2**17
"""Maximum number of cells (sequences x longest^2) of the bucket that all sequences up to `FEWEST_ROWS` share. In larger
batches only sequences up to `SHORT` share a bucket."""
SHORT = 32
"""Sequences up to this length share a bucket in every batch."""
CHUNKS = 8
"""Maximum number of chunks of a bucket, unless memory needs more: with 8, 9/16 of the square is computed; 7/16 is all
future."""
MOST_SCORES = 2**20
"""Maximum number of scores of a chunk, per head."""
CACHED_CELLS = 2**25
"""Maximum number of cells of a batch whose masks are cached for all layers. A cell has up to 1 byte (hidden), 2 bytes
(bucket) and, mostly for queries, 8 bytes (distance)."""
COPIES = 8
"""Copies of the time table, used by the columns in turn: many successive additions to one address are slow."""


class PairMask(NamedTuple):
    """Mask and bias indices of M rows against N keys, which are the same for all layers.

    hidden: [b or 1, M, N - num_open_keys] bool, True where the row does not see the key; it starts at key
    `num_open_keys`, as all rows see the keys before. distance: [b, M, N] int64 positions >= 0; None where rows and
    keys are both consecutive positions, so that it follows from the chunk. bucket: [b, M, N] int16, index of the time
    bucket in `COPIES` concatenated tables. Without a relative bias, distance and bucket are None.
    """

    hidden: Tensor
    num_open_keys: int
    distance: Tensor | None
    bucket: Tensor | None


@dataclass(frozen=True)
class Chunk:
    """Rows [first, end) of a bucket's history, or of its queries, against the keys [first, end) of its history."""

    is_history: bool
    rows: tuple[int, int]
    keys: tuple[int, int]
    mask: PairMask | None = None


@dataclass(frozen=True)
class PaddedBucket:
    """Sequences of similar length, padded to the longest.

    rows: [b, L] int64 packed rows of their history (a padding cell repeats a valid one); valid: [b, L] bool, None
    if nothing is padded; queries, queries_valid: the same for their queries, None if there are none.
    """

    rows: Tensor
    valid: Tensor | None
    queries: Tensor | None
    queries_valid: Tensor | None
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class BlockLayout(Layout):
    """A layout in padded buckets.

    num_without_history: number of queries whose sequence is empty; they are in no bucket. restore: [S] int64, the
    emitted row of each packed row; the buckets emit their rows one after the other (history, then queries), and the
    queries without history come last.
    """

    buckets: tuple[PaddedBucket, ...]
    num_without_history: int
    restore: Tensor


def plan_blocks(rows: PackedRows, rules: AttentionRules) -> BlockLayout:
    """Group the sequences of a batch by length; queries are in the bucket of their history."""
    buckets, emitted, kept = [], [], 0
    lengths = lengths_from_offsets(rows.seq_offsets)
    short = lengths[lengths <= FEWEST_ROWS]
    cells = short.numel() * int(short.max()) ** 2 if short.numel() else 0
    for found in length_buckets(rows.seq_offsets, floor=FEWEST_ROWS if cells <= SHARED_CELLS else SHORT):
        asked, asked_valid = _queries_of(rows, found.sequences)
        bucket = PaddedBucket(found.rows, found.valid, asked, asked_valid, ())
        chunks = []
        for chunk in _chunks(bucket, rules):
            kept += found.rows.shape[0] * (chunk.rows[1] - chunk.rows[0]) * (chunk.keys[1] - chunk.keys[0])
            # Masks are cached while the budget lasts; beyond it every layer computes them again, which bounds memory.
            chunks.append(replace(chunk, mask=pair_mask(rows, rules, bucket, chunk)) if kept <= CACHED_CELLS else chunk)
        buckets.append(replace(bucket, chunks=tuple(chunks)))
        emitted.append(without_padding(found.rows, found.valid))
        if asked is not None:
            emitted.append(without_padding(asked, asked_valid))
    # `length_buckets` leaves out empty sequences, but their queries still need a row of output.
    empty = lengths == 0
    alone = torch.nonzero(empty[rows.sequences[rows.history :]]).flatten() + rows.history
    # `order` is the packed row of each emitted row; its inverse brings the outputs back to the packed order.
    order = torch.cat([*emitted, alone])
    restore = torch.empty_like(order)
    restore[order] = torch.arange(order.numel(), device=order.device)
    return BlockLayout(rows, rules, divisor(rows, rules), tuple(buckets), alone.numel(), restore)


def _queries_of(rows: PackedRows, sequences: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return packed rows [b, Q] and valid [b, Q] of the queries of `sequences` [b]; (None, None) without queries."""
    counts = lengths_from_offsets(rows.query_offsets)[sequences]
    most = int(counts.max())
    if most == 0:
        return None, None
    cells = torch.arange(most, device=counts.device).expand(counts.numel(), -1)
    # Padding cells may run beyond the last query of the batch: the clamp keeps them valid indices.
    index = (rows.query_offsets[sequences][:, None] + cells).clamp(max=rows.visible.numel() - 1)
    return index + rows.history, cells < counts[:, None]


def _chunks(bucket: PaddedBucket, rules: AttentionRules) -> Iterator[Chunk]:
    """Cut the rows of a bucket into chunks, each with the range of keys that its rows can see."""
    b, longest = bucket.rows.shape
    most = max(1, MOST_SCORES // (b * longest))
    step = min(most, max(FEWEST_ROWS, -(-longest // CHUNKS)))
    for first in range(0, longest, step):
        end = min(first + step, longest)
        # With a context prefix the keys begin at 0 even under a window, as every row sees the context.
        seen_from = 0 if rules.window is None or rules.prefix else max(0, first - rules.window + 1)
        # A row sees keys up to its own position; a chunk that starts inside the prefix sees all of the context's keys.
        last_of_context = longest if rules.context_sees_all else rules.prefix
        seen_to = end if first >= rules.prefix else min(longest, max(end, last_of_context))
        yield Chunk(True, (first, end), (seen_from, seen_to))
    # Queries are in no order of position, so their chunks have all keys, and the mask hides those not seen.
    number = 0 if bucket.queries is None else bucket.queries.shape[1]
    for first in range(0, number, most):
        yield Chunk(False, (first, min(first + most, number)), (0, longest))


def pair_mask(rows: PackedRows, rules: AttentionRules, bucket: PaddedBucket, chunk: Chunk) -> PairMask:
    """Compute the mask and the bias indices of a chunk."""
    keys, valid = bucket.rows[:, slice(*chunk.keys)], bucket.valid
    if not chunk.is_history:
        assert bucket.queries is not None
        return _pair_mask(rows, rules, bucket.queries[:, slice(*chunk.rows)], keys, chunk, None)
    asking = bucket.rows[:, slice(*chunk.rows)]
    return _pair_mask(rows, rules, asking, keys, chunk, None if valid is None else valid[:, slice(*chunk.keys)])


def _pair_mask(
    rows: PackedRows, rules: AttentionRules, asking: Tensor, keys: Tensor, chunk: Chunk, keys_valid: Tensor | None
) -> PairMask:
    """Compute the mask of packed rows `asking` [b, M] against `keys` [b, N]; keys_valid: [b, N] or None."""
    columns = torch.arange(*chunk.keys, device=keys.device)
    if rules.context_sees_all:
        return _mask_with_seeing_context(rows, rules, asking, keys, chunk, keys_valid)
    if chunk.is_history and not rules.prefix:
        # Row i of each sequence is its position i, so one mask serves all; right padding is always in the future.
        place = torch.arange(*chunk.rows, device=keys.device)[None, :, None]
        hidden = columns > place
    else:
        place = rows.positions[asking][:, :, None]
        # A query sees the columns before its position, a history row its own column too.
        hidden = columns >= place + int(chunk.is_history)
    distance = place - columns
    if rules.window is not None:
        hidden = hidden | ((distance >= rules.window) & (columns >= rules.prefix))
    if rules.prefix and chunk.is_history:
        # Context positions see one another, later ones included. In a sequence shorter than the prefix this would show
        # padding, which is no longer in the future of every row, so it is hidden explicitly.
        hidden = hidden & ~((place < rules.prefix) & (columns < rules.prefix))
        if keys_valid is not None:
            hidden = hidden | ~keys_valid[:, None, :]
    plain = chunk.is_history and not rules.prefix and rules.window is None
    # In a plain causal chunk all rows see the keys before the chunk's first row: no mask is stored for those.
    first_hidden = chunk.rows[0] - chunk.keys[0] if plain else 0
    hidden = hidden[..., first_hidden:]
    if rules.last_bucket is None:
        return PairMask(hidden, first_hidden, None, None)
    bucket = _time_buckets(rows, rules.last_bucket, asking, keys)
    return PairMask(hidden, first_hidden, None if chunk.is_history else distance.clamp(min=0), bucket)


def _mask_with_seeing_context(
    rows: PackedRows, rules: AttentionRules, asking: Tensor, keys: Tensor, chunk: Chunk, keys_valid: Tensor | None
) -> PairMask:
    """`_pair_mask` for the public code's mask of a prefix (`HSTUShape.prefix_mask`)."""
    position = rows.positions[asking][:, :, None]
    columns = torch.arange(*chunk.keys, device=keys.device)
    place = place_after_context(position, chunk.is_history, rules.prefix)
    distance = place - place_after_context(columns, True, rules.prefix)
    hidden = distance <= 0
    if rules.window is not None:
        hidden = hidden | (distance >= rules.window)
    if chunk.is_history:
        hidden = hidden & (position != columns) & (place > 0)
        if keys_valid is not None:
            hidden = hidden | ~keys_valid[:, None, :]
    else:
        # A history shorter than the context has padding at place 0, which a query would take for context.
        hidden = hidden | (columns >= position)
    if rules.last_bucket is None:
        return PairMask(hidden, 0, None, None)
    return PairMask(hidden, 0, distance.clamp(min=0), _time_buckets(rows, rules.last_bucket, asking, keys))


def _time_buckets(rows: PackedRows, last: int, asking: Tensor, keys: Tensor) -> Tensor:
    """Compute the bucket of each pair's time difference, in `COPIES` tables: [b, M, N] int16."""
    gap = rows.asked_at[asking][:, :, None] - rows.times[keys][:, None, :]
    # Neighboring columns use different copies of the table (see `COPIES`); at most 8 x 1,025 fits in int16.
    copy = torch.arange(keys.shape[1], device=keys.device) % COPIES * (last + 1)
    return time_bucket(gap, last).add_(copy.to(torch.int16))


class Pairs(NamedTuple):
    """Pairs against a cached history: hidden [1, M, N] bool; distance int64 and bucket int16 likewise, or None."""

    hidden: Tensor
    distance: Tensor | None
    bucket: Tensor | None


def pairs_without_own_keys(rows: PackedRows, rules: AttentionRules, asking: Tensor, keys: Tensor) -> Pairs:
    """Compute the pairs of the packed rows `asking` [M] of one sequence and its first N history positions `keys` [N].

    A row's own key is hidden, as for queries: its contribution is added separately (there is no normalizer).
    """
    chunk = Chunk(False, (0, asking.numel()), (0, keys.numel()))
    marks = _pair_mask(rows, rules, asking[None], keys[None], chunk, None)
    # The cache looks up a single table: undo the offsets of the copies.
    bucket = None if rules.last_bucket is None or marks.bucket is None else marks.bucket % (rules.last_bucket + 1)
    return Pairs(marks.hidden, marks.distance, bucket)


def without_padding(x: Tensor, valid: Tensor | None) -> Tensor:
    """Drop the padding of x [b, L, ...]: [n, ...]."""
    return x.flatten(0, 1) if valid is None else x[valid]
