"""What every backend of HSTU's pointwise attention shares: the rules, the batch's layout, the relative bias.

See `modules.pointwise_attention` for the equation and who sees whom.

Legend: S packed rows (T history positions, then Q queries), H heads, D and V widths of a head's keys and values.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hllm_torchrec.modules.encoders.base import PackedRows
from hllm_torchrec.modules.jagged import lengths_from_offsets

BUCKET_WIDTH = 0.301
"""In ln(seconds), as in the public code: close to log10(2), so a bucket is a factor of 1.35, not 2."""


@dataclass(frozen=True)
class AttentionRules:
    """What is the same for every batch: window and prefix (see the module), what sums are divided by (a number,
    or None for the number of keys seen), alpha, and the last time bucket (None: no relative bias)."""

    window: int | None
    prefix: int
    divide_by: int | None
    alpha: float
    last_bucket: int | None


@dataclass(frozen=True)
class Layout:
    """Who sees whom in one batch: built once, used by every layer.

    rows: the packed rows, which is all that a jagged kernel needs; rules; divisor: [S, 1, 1] float32, n_i.
    """

    rows: PackedRows
    rules: AttentionRules
    divisor: Tensor


def jagged_layout(rows: PackedRows, rules: AttentionRules) -> Layout:
    """The layout of a jagged kernel; padded backends have one of their own."""
    return Layout(rows, rules, divisor(rows, rules))


def divisor(rows: PackedRows, rules: AttentionRules) -> Tensor:
    """n_i of every packed row: [S, 1, 1] float32."""
    number = keys_seen(rows, rules) if rules.divide_by is None else torch.full_like(rows.positions, rules.divide_by)
    return number.float()[:, None, None]


def time_bucket(seconds: Tensor, last: int) -> Tensor:
    """floor(ln(max(|seconds|, 1)) / 0.301), at most `last`, as int16."""
    buckets = seconds.abs().clamp_(min=1).double().log_().div_(BUCKET_WIDTH)
    return buckets.clamp_(max=last).to(torch.int16)  # which cuts, and nothing is below 0


def keys_seen(rows: PackedRows, rules: AttentionRules) -> Tensor:
    """How many keys each packed row sees, its own included: [S] int64."""
    position = rows.positions
    prefix = torch.full_like(position, rules.prefix)
    window = rules.window if rules.window is not None else torch.iinfo(torch.int64).max
    seen = torch.minimum(position, prefix) + (position - prefix).clamp(min=0).add(1).clamp(max=window)
    inside = position < prefix
    # A query inside the context sees what stands before it and itself; a context position the whole context.
    lengths = lengths_from_offsets(rows.seq_offsets)[rows.sequences]
    is_history = torch.arange(position.numel(), device=position.device) < rows.history
    context = torch.where(is_history, torch.minimum(prefix, lengths), position + 1)
    return torch.where(inside, context, seen)


class RelativeBias(nn.Module):
    """rab: a number for the distance in positions (those beyond the table share its last) and one for time.

    Both tables start normal with standard deviation 0.02, as published.
    """

    def __init__(self, max_positions: int, last_bucket: int) -> None:
        super().__init__()
        self.of_position = nn.Parameter(torch.empty(max_positions))
        self.of_time = nn.Parameter(torch.empty(last_bucket + 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both tables."""
        nn.init.normal_(self.of_position, std=0.02)
        nn.init.normal_(self.of_time, std=0.02)

    def forward(self, distance: Tensor, bucket: Tensor) -> Tensor:
        """distance [b or 1, M, N], bucket [b, M, N] -> [b, M, N]."""
        place = distance.clamp(max=self.of_position.numel() - 1)
        return look_up(self.of_position, place) + look_up(self.of_time, bucket)


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """table[index]; index_select has by far the fastest backward pass of the ways to write it on a CPU."""
    return table.index_select(0, index.flatten().int()).view(index.shape)


def own_keys(q: Tensor, k: Tensor, v: Tensor, layout: Layout, bias: RelativeBias | None) -> Tensor:
    """What each query adds by seeing itself, zero at history rows (they see themselves in their block)."""
    history = layout.rows.history
    scores = (q[history:] * k[history:]).sum(-1) * layout.rules.alpha
    if bias is not None:  # distance 0 in both
        scores = scores + (bias.of_position[0] + bias.of_time[0]).to(scores.dtype)
    own = F.silu(scores)[:, :, None] * v[history:]
    return torch.cat([own.new_zeros(history, *own.shape[1:]), own])


def score_scale(qk_width: int, scaled: bool) -> float:
    """alpha: 1 / sqrt(width) or 1."""
    return 1.0 / math.sqrt(qk_width) if scaled else 1.0
