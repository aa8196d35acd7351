"""How a batch is cut into padded blocks for `modules.pointwise_blocks`: buckets of sequences, chunks of their rows.

Legend: B sequences, S packed rows (T history positions, then Q queries), b sequences of a bucket, L its longest
history, M asking rows of a chunk, N keys.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from hllm_torchrec.modules.encoders.base import PackedRows
from hllm_torchrec.modules.hstu.layout import AttentionRules, Layout, divisor, time_bucket
from hllm_torchrec.modules.jagged import length_buckets, lengths_from_offsets

FEWEST_ROWS = 128
"""Rows of a chunk, and of a sequence that has a bucket of its own kind: fewer cost more in calls than they save."""
CHUNKS = 8
"""Chunks of a bucket at most, unless memory asks for more: 8 leave 56% of the square, 7 parts in 16 are future."""
MOST_SCORES = 2**20
"""Scores of a chunk, per head."""
CACHED_CELLS = 2**25
"""Cells whose marks (hidden or not, time bucket) are kept for all layers of a batch: 64 MiB and a little."""
COPIES = 8
"""Of the time table, taken by the columns in turn: adding to one address many times in a row is slow."""


class PairMask(NamedTuple):
    """What is known of the pairs of M rows and N keys before any layer.

    hidden: [b or 1, M, N - open] bool, True where a row may not look, of the keys from `num_open_keys` on (all rows see
    those before); distance: [b, M, N] int64 positions >= 0, None where rows and keys are both consecutive positions;
    bucket: [b, M, N] int16, time bucket in `COPIES` tables that follow one another. No bias: both None.
    """

    hidden: Tensor
    num_open_keys: int
    distance: Tensor | None
    bucket: Tensor | None


@dataclass(frozen=True)
class Chunk:
    """Rows `rows` (first, end) of a bucket's history, or of its queries, against keys `keys` (first, end)."""

    is_history: bool
    rows: tuple[int, int]
    keys: tuple[int, int]
    mask: PairMask | None = None


@dataclass(frozen=True)
class PaddedBucket:
    """Sequences of similar length.

    rows: [b, L] int64 packed rows of their history (a padding cell repeats a valid one); valid: [b, L] bool, None
    where nothing is padded; queries, queries_valid: the same of their queries, None where there are none.
    """

    rows: Tensor
    valid: Tensor | None
    queries: Tensor | None
    queries_valid: Tensor | None
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class BlockLayout(Layout):
    """A layout with buckets.

    restore: [S] int64, from the order in which the buckets emit rows (of each its history, then its queries),
    followed by `num_without_history` rows (queries without any history), to the packed order; num_without_history:
    their number.
    """

    buckets: tuple[PaddedBucket, ...]
    num_without_history: int
    restore: Tensor


def plan_blocks(rows: PackedRows, rules: AttentionRules) -> BlockLayout:
    """Group the sequences of a batch by length; queries stand beside their history."""
    buckets, emitted, kept = [], [], 0
    for found in length_buckets(rows.seq_offsets, floor=FEWEST_ROWS):
        asked, asked_valid = _queries_of(rows, found.sequences)
        bucket = PaddedBucket(found.rows, found.valid, asked, asked_valid, ())
        chunks = []
        for chunk in _chunks(bucket, rules):
            kept += found.rows.shape[0] * (chunk.rows[1] - chunk.rows[0]) * (chunk.keys[1] - chunk.keys[0])
            chunks.append(replace(chunk, mask=pair_mask(rows, rules, bucket, chunk)) if kept <= CACHED_CELLS else chunk)
        buckets.append(replace(bucket, chunks=tuple(chunks)))
        emitted.append(without_padding(found.rows, found.valid))
        if asked is not None:
            emitted.append(without_padding(asked, asked_valid))
    empty = lengths_from_offsets(rows.seq_offsets) == 0
    alone = torch.nonzero(empty[rows.sequences[rows.history :]]).flatten() + rows.history
    order = torch.cat([*emitted, alone])
    restore = torch.empty_like(order)
    restore[order] = torch.arange(order.numel(), device=order.device)
    return BlockLayout(rows, rules, divisor(rows, rules), tuple(buckets), alone.numel(), restore)


def _queries_of(rows: PackedRows, sequences: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(packed rows [b, Q], valid [b, Q]) of the queries of some sequences; Nones where there is none."""
    counts = lengths_from_offsets(rows.query_offsets)[sequences]
    most = int(counts.max())
    if most == 0:
        return None, None
    cells = torch.arange(most, device=counts.device).expand(counts.numel(), -1)
    index = (rows.query_offsets[sequences][:, None] + cells).clamp(max=rows.visible.numel() - 1)
    return index + rows.history, cells < counts[:, None]


def _chunks(bucket: PaddedBucket, rules: AttentionRules) -> Iterator[Chunk]:
    b, longest = bucket.rows.shape
    most = max(1, MOST_SCORES // (b * longest))
    step = min(most, max(FEWEST_ROWS, -(-longest // CHUNKS)))
    for first in range(0, longest, step):
        end = min(first + step, longest)
        seen_from = 0 if rules.window is None or rules.prefix else max(0, first - rules.window + 1)
        seen_to = end if first >= rules.prefix else min(longest, max(end, rules.prefix))
        yield Chunk(True, (first, end), (seen_from, seen_to))
    number = 0 if bucket.queries is None else bucket.queries.shape[1]
    for first in range(0, number, most):
        yield Chunk(False, (first, min(first + most, number)), (0, longest))


def pair_mask(rows: PackedRows, rules: AttentionRules, bucket: PaddedBucket, chunk: Chunk) -> PairMask:
    """The marks of a chunk."""
    keys, valid = bucket.rows[:, slice(*chunk.keys)], bucket.valid
    if not chunk.is_history:
        assert bucket.queries is not None
        return _pair_mask(rows, rules, bucket.queries[:, slice(*chunk.rows)], keys, chunk, None)
    asking = bucket.rows[:, slice(*chunk.rows)]
    return _pair_mask(rows, rules, asking, keys, chunk, None if valid is None else valid[:, slice(*chunk.keys)])


def _pair_mask(
    rows: PackedRows, rules: AttentionRules, asking: Tensor, keys: Tensor, chunk: Chunk, keys_valid: Tensor | None
) -> PairMask:
    """asking [b, M], keys and keys_valid [b, N]."""
    columns = torch.arange(*chunk.keys, device=keys.device)
    if chunk.is_history and not rules.prefix:
        place = torch.arange(*chunk.rows, device=keys.device)[None, :, None]  # the same for every sequence
        hidden = columns > place  # padding is always in the future
    else:
        place = rows.positions[asking][:, :, None]
        hidden = columns >= place + int(chunk.is_history)
    distance = place - columns
    if rules.window is not None:
        hidden = hidden | ((distance >= rules.window) & (columns >= rules.prefix))
    if rules.prefix and chunk.is_history:
        hidden = hidden & ~((place < rules.prefix) & (columns < rules.prefix))
        if keys_valid is not None:
            hidden = hidden | ~keys_valid[:, None, :]
    plain = chunk.is_history and not rules.prefix and rules.window is None
    first_hidden = chunk.rows[0] - chunk.keys[0] if plain else 0
    hidden = hidden[..., first_hidden:]
    if rules.last_bucket is None:
        return PairMask(hidden, first_hidden, None, None)
    gap = rows.asked_at[asking][:, :, None] - rows.times[keys][:, None, :]
    copy = torch.arange(keys.shape[1], device=keys.device) % COPIES * (rules.last_bucket + 1)
    bucket = time_bucket(gap, rules.last_bucket).add_(copy.to(torch.int16))
    return PairMask(hidden, first_hidden, None if chunk.is_history else distance.clamp(min=0), bucket)


class Pairs(NamedTuple):
    """For a cached history: hidden [1, M, N] bool; distance [1, M, N] int64; bucket [1, M, N] int16; or None."""

    hidden: Tensor
    distance: Tensor | None
    bucket: Tensor | None


def pairs_without_own_keys(rows: PackedRows, rules: AttentionRules, asking: Tensor, keys: Tensor) -> Pairs:
    """Of the packed rows `asking` [M] of one sequence against its history positions `keys` [N], from its first on.

    Like a query's, an asking row's own key is hidden: what it adds comes on its own (there is no normaliser).
    """
    chunk = Chunk(False, (0, asking.numel()), (0, keys.numel()))
    marks = _pair_mask(rows, rules, asking[None], keys[None], chunk, None)
    bucket = None if rules.last_bucket is None or marks.bucket is None else marks.bucket % (rules.last_bucket + 1)
    return Pairs(marks.hidden, marks.distance, bucket)


def without_padding(x: Tensor, valid: Tensor | None) -> Tensor:
    """x [b, L, ...] without padding: [n, ...]."""
    return x.flatten(0, 1) if valid is None else x[valid]
