"""Jagged sequences: `offsets` give the start and end of each sequence in one packed tensor.

Offsets are int64, length B+1, start at 0 and end at T (`seq_offsets` for users, `cu_seqlens` for text).

Legend: B sequences, b sequences of a bucket, T packed positions, N padded length.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


def offsets_from_lengths(lengths: Tensor) -> Tensor:
    """Compute offsets [B+1] int64 of sequences with `lengths` [B]."""
    offsets = lengths.new_zeros(lengths.numel() + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=offsets[1:])
    return offsets


def lengths_from_offsets(offsets: Tensor) -> Tensor:
    """Compute lengths [B] int64 of sequences with `offsets` [B+1]."""
    return offsets[1:] - offsets[:-1]


def sequence_of_position(offsets: Tensor, total: int) -> Tensor:
    """Index of the sequence of every packed position: [T] int64; `total` is T (passing it saves a device sync)."""
    sequences = torch.arange(offsets.numel() - 1, device=offsets.device)
    return torch.repeat_interleave(sequences, lengths_from_offsets(offsets), output_size=total)


def position_in_sequence(offsets: Tensor, total: int) -> Tensor:
    """Position of every packed element within its sequence (0, 1, 2, ...): [T] int64."""
    starts = offsets[:-1][sequence_of_position(offsets, total)]
    return torch.arange(total, device=offsets.device) - starts


MOST_SCORES = 2**22
"""Largest number of attention scores per head of one bucket: 16 MiB in float32."""


@dataclass(frozen=True)
class Bucket:
    """Sequences of similar length, padded on the right to the longest of them.

    rows: [b, N] int64, the packed position of each padded cell (a padding cell repeats a valid one).
    valid: [b, N] bool, False at padding; None if nothing is padded.
    sequences: [b] int64, indices of the sequences.
    """

    rows: Tensor
    valid: Tensor | None
    sequences: Tensor


def length_buckets(
    offsets: Tensor, waste: float = 0.25, floor: int = 16, most_scores: int = MOST_SCORES
) -> list[Bucket]:
    """Group sequences of `offsets` [B+1] by length, so that buckets have little padding.

    `waste` is the largest mean share of padding of a bucket whose lengths are spread evenly; at most twice this share
    of the shortest sequence's row is padding. Sequences of at most `floor` positions share a bucket regardless of
    `waste`: for these a kernel launch costs more than the padded cells. A bucket has at most `most_scores` attention
    scores per head (b x N x N), or a single sequence. Empty sequences are in no bucket. The lengths are copied to the
    host once per call.
    """
    lengths = lengths_from_offsets(offsets).cpu()
    order = torch.argsort(lengths, descending=True, stable=True)
    kept = order[lengths[order] > 0]
    sizes = lengths[kept].tolist()
    return [
        _bucket(kept[start:end].tolist(), sizes[start], offsets, sizes[end - 1] == sizes[start])
        for start, end in bucket_bounds(sizes, waste, floor, most_scores)
    ]


def bucket_bounds(
    lengths: list[int], waste: float, floor: int, most_scores: int = MOST_SCORES, seen: int = 0
) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of the ranges of `lengths` (descending, each >= 1) that share a bucket; see `length_buckets`.

    seen: number of keys that every position attends to in addition to those of its own sequence.
    """
    start = 0
    while start < len(lengths):
        longest = lengths[start]
        # With lengths spread evenly between `least` and `longest`, the mean share of padding is half the range.
        least = 0 if longest <= floor else longest * (1 - 2 * waste)
        # m sequences padded to N = longest have m * N * (N + seen) scores.
        limit = min(len(lengths), start + max(1, most_scores // (longest * (longest + seen))))
        end = start + 1
        while end < limit and lengths[end] >= least:
            end += 1
        yield start, end
        start = end


def _bucket(sequences: list[int], longest: int, offsets: Tensor, is_full: bool) -> Bucket:
    chosen = torch.tensor(sequences, device=offsets.device)
    starts, lengths = offsets[chosen], lengths_from_offsets(offsets)[chosen]
    cells = torch.arange(longest, device=offsets.device).expand(len(sequences), -1)
    # Padding cells repeat the last position of their sequence, so that every index is valid.
    rows = starts[:, None] + torch.minimum(cells, (lengths - 1)[:, None])
    return Bucket(rows=rows, valid=None if is_full else cells < lengths[:, None], sequences=chosen)
