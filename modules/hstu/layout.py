"""Parts shared by all backends of HSTU's pointwise attention: mask rules, the layout of a batch, the relative bias.

See `modules/hstu/attention.py` for the equation and the mask.

Legend: S packed rows (history positions, then queries), b sequences, M rows, N keys, H heads, V width of a head's
values.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hllm_torchrec.modules.encoders.base import PackedRows
from hllm_torchrec.modules.jagged import lengths_from_offsets

BUCKET_WIDTH = 0.301
"""Width of a time bucket in ln(seconds), as in the public code: a factor of 1.35 (0.301 is log10(2), not ln(2))."""


@dataclass(frozen=True)
class AttentionRules:
    """Settings of the attention that are the same for every batch.

    window, prefix: positions, see `modules/hstu/attention.py`. divide_by: n_i, or None for the number of keys seen.
    alpha: factor of q . k. last_bucket: index of the last time bucket, or None without a relative bias.
    context_sees_all: the public code's mask of a prefix, see `HSTUShape.prefix_mask`.
    """

    window: int | None
    prefix: int
    divide_by: int | None
    alpha: float
    last_bucket: int | None
    context_sees_all: bool = False


@dataclass(frozen=True)
class Layout:
    """The mask of one batch: built once, used by every layer.

    rows: the packed rows, which are all that a jagged kernel needs; divisor: [S, 1, 1] float32, n_i.
    """

    rows: PackedRows
    rules: AttentionRules
    divisor: Tensor


def jagged_layout(rows: PackedRows, rules: AttentionRules) -> Layout:
    """Build the layout for a jagged kernel; padded backends have their own (`plan_blocks`)."""
    return Layout(rows, rules, divisor(rows, rules))


def divisor(rows: PackedRows, rules: AttentionRules) -> Tensor:
    """Compute n_i of every packed row: [S, 1, 1] float32."""
    number = keys_seen(rows, rules) if rules.divide_by is None else torch.full_like(rows.positions, rules.divide_by)
    return number.float()[:, None, None]


def time_bucket(seconds: Tensor, last: int) -> Tensor:
    """Compute floor(ln(max(|seconds|, 1)) / 0.301), at most `last`, as int16."""
    # In float64: float32 cannot hold the seconds of decades, and would move the edges of buckets.
    buckets = seconds.abs().clamp_(min=1).double().log_().div_(BUCKET_WIDTH)
    return buckets.clamp_(max=last).to(torch.int16)  # truncation is floor here: nothing is negative


def keys_seen(rows: PackedRows, rules: AttentionRules) -> Tensor:
    """Count the keys that each packed row sees, its own included: [S] int64."""
    position = rows.positions
    is_history = torch.arange(position.numel(), device=position.device) < rows.history
    lengths = lengths_from_offsets(rows.seq_offsets)[rows.sequences]
    window = rules.window if rules.window is not None else torch.iinfo(torch.int64).max
    if rules.context_sees_all:
        place = place_after_context(position, is_history, rules.prefix)
        # Itself, the places in the window before it, and the context, which is at place 0, if the window reaches it.
        context = torch.where(place < window, position.clamp(max=rules.prefix), 0)
        return torch.where(place == 0, lengths, 1 + (place - 1).clamp(max=window - 1) + context)
    prefix = torch.full_like(position, rules.prefix)
    # At position p >= prefix: all of the context, and the p - prefix + 1 positions after it up to p, at most `window`.
    # A query's position is the number of events before it, so the same sum counts those and its own key.
    seen = torch.minimum(position, prefix) + (position - prefix).clamp(min=0).add(1).clamp(max=window)
    inside = position < prefix
    # A context position sees all context positions; a query inside the context sees earlier positions and itself.
    context = torch.where(is_history, torch.minimum(prefix, lengths), position + 1)
    return torch.where(inside, context, seen)


def place_after_context(position: Tensor, is_history: Tensor | bool, prefix: int) -> Tensor:
    """Number positions with the context as place 0, as the public code does; a query is never a part of the context."""
    place = (position - prefix + 1).clamp(min=0)
    return torch.where(torch.as_tensor(is_history, device=place.device), place, place.clamp(min=1))


class RelativeBias(nn.Module):
    """rab: a learned number for the distance in positions plus one for the distance in time.

    Distances beyond the position table use its last entry. Both tables are initialized normal with standard deviation
    0.02, as published.
    """

    def __init__(self, max_positions: int, last_bucket: int) -> None:
        super().__init__()
        self.of_position = nn.Parameter(torch.empty(max_positions))
        self.of_time = nn.Parameter(torch.empty(last_bucket + 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both tables from a normal distribution."""
        nn.init.normal_(self.of_position, std=0.02)
        nn.init.normal_(self.of_time, std=0.02)

    def forward(self, distance: Tensor, bucket: Tensor) -> Tensor:
        """distance [b or 1, M, N], bucket [b, M, N] -> [b, M, N]."""
        place = distance.clamp(max=self.of_position.numel() - 1)
        return look_up(self.of_position, place) + look_up(self.of_time, bucket)


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """Look up table[index]; of the ways to write it, index_select has by far the fastest backward pass on a CPU."""
    return table.index_select(0, index.flatten().int()).view(index.shape)


def own_keys(q: Tensor, k: Tensor, v: Tensor, layout: Layout, bias: RelativeBias | None) -> Tensor:
    """Compute the contribution of each query's own key to its output: [S, H, V], zero at history rows.

    History rows are keys of their own sequence and see themselves in their block.
    """
    history = layout.rows.history
    scores = (q[history:] * k[history:]).sum(-1) * layout.rules.alpha
    if bias is not None:  # a row is at distance 0 of itself, in positions and in time
        scores = scores + (bias.of_position[0] + bias.of_time[0]).to(scores.dtype)
    own = F.silu(scores)[:, :, None] * v[history:]
    return torch.cat([own.new_zeros(history, *own.shape[1:]), own])


def score_scale(qk_width: int, scaled: bool, alpha: float | None) -> float:
    """Return alpha if it is given, else 1 / sqrt(qk_width) if scaled, else 1."""
    if alpha is not None:
        return alpha
    return 1.0 / math.sqrt(qk_width) if scaled else 1.0
