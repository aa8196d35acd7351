"""HSTU: hierarchical sequential transduction units over jagged sequences (HSTU, section 3, Eq. 1-3).

    [u, v, q, k] = phi(f1(LN(x)))                          phi: SiLU, on all four or on u alone
    a_i          = sum_j silu(alpha q_i . k_j + rab_ij) v_j / n_i
    y            = x + f2(dropout(u * LN(a)))              or of [u, a, u * LN(a)], [u, LN(a), u * LN(a)]

Two published parameterizations are presets (`modules.encoders.shapes.PRESETS`): "research" (retrieval) and "ranking".
Deliberate differences from the public code: n_i is a constant or the row's own number of keys, never the batch's
longest sequence; masks are applied before any sum; nothing is padded outside of a block; positions count from the
sequence's start; dropout and stochastic depth are applied as configured.

Legend: S packed rows (history, then queries), D width, H heads, E width of a head's keys, V of its values.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hllm_torchrec.common.errors import ArgumentError
from hllm_torchrec.modules.encoders.base import PackedRows, UserEncoder, dense_flops
from hllm_torchrec.modules.encoders.shapes import PRESETS, HSTUShape
from hllm_torchrec.modules.hstu.attention import choose_hstu_backend, known_backend, plan_layout, pointwise_attention
from hllm_torchrec.modules.hstu.cached_pointwise import begin_pointwise, read_pointwise
from hllm_torchrec.modules.hstu.layout import AttentionRules, Layout, RelativeBias, score_scale
from hllm_torchrec.modules.jagged import lengths_from_offsets

NORM_EPS = 1e-6
MOST_BUCKETS = 1024


def resolve_preset(shape: HSTUShape) -> HSTUShape:
    """Return the shape with the preset's values and the widths of heads in place of None.

    Raises:
        ValueError: an unknown preset, a width that is not a multiple of heads, a number out of range, or `prefix_mask`
            "history" without a prefix or with the backend triton.
    """
    if shape.preset not in PRESETS:
        raise ArgumentError(f"preset: {shape.preset!r}: must be one of {', '.join(PRESETS)}")
    chosen: dict[str, Any] = {n: v for n, v in PRESETS[shape.preset].items() if getattr(shape, n) is None}
    for name in ("qk_width", "value_width"):
        if getattr(shape, name) is None:
            if shape.width % shape.heads:
                raise ArgumentError(
                    f"heads: {shape.heads}: does not divide the width {shape.width}; give another number, or {name}"
                )
            chosen[name] = shape.width // shape.heads
    if shape.divide_by != "length" and not (isinstance(shape.divide_by, int) and shape.divide_by >= 1):
        raise ArgumentError(f"divide_by: {shape.divide_by!r}: must be 'length' or an integer of at least 1")
    if shape.window is not None and shape.window < 1:
        raise ArgumentError(f"window: {shape.window}: must be at least 1, or null for all positions")
    if shape.alpha is not None and not (math.isfinite(shape.alpha) and shape.alpha > 0):
        raise ArgumentError(f"alpha: {shape.alpha}: must be a number above 0, or null for the default")
    if shape.prefix_mask == "history" and shape.prefix < 1:
        raise ArgumentError("prefix_mask: 'history': needs context positions: give prefix, or write context")
    if shape.prefix_mask == "history" and shape.backend == "triton":
        raise ArgumentError("prefix_mask: 'history': the backend 'triton' has no such mask; choose 'eager'")
    if not 0 <= shape.time_buckets <= MOST_BUCKETS:
        raise ArgumentError(
            f"time_buckets: {shape.time_buckets}: must be 0 to {MOST_BUCKETS}; 145 is the bucket of the largest int64"
        )
    return dataclasses.replace(shape, **chosen)


class HSTULayer(nn.Module):
    """One layer: `project`, attention, `combine`.

    Args:
        shape: from `resolve_preset`.
        skip: probability, in training, that a user skips this layer (stochastic depth).
    """

    def __init__(self, shape: HSTUShape, skip: float = 0.0) -> None:
        super().__init__()
        assert shape.qk_width and shape.value_width and shape.affine_norm is not None, "an unresolved shape"
        self.heads, self.qk_width, self.value_width = shape.heads, shape.qk_width, shape.value_width
        self.silu_on_all, self.output = shape.silu == "all", shape.output
        self.backend, self.dropout, self.skip = shape.backend, shape.dropout, skip
        inner = shape.heads * shape.value_width
        self.norm = nn.LayerNorm(shape.width, NORM_EPS, elementwise_affine=shape.affine_norm)
        self.uvqk = nn.Linear(
            shape.width, 2 * inner + 2 * shape.heads * shape.qk_width, bias=bool(shape.projection_bias)
        )
        self.bias = RelativeBias(shape.max_positions, shape.time_buckets) if shape.relative_bias else None
        self.attention_norm: nn.LayerNorm | nn.GroupNorm = (
            nn.GroupNorm(shape.heads, shape.heads, NORM_EPS, affine=shape.affine_norm)
            if shape.group_norm
            else nn.LayerNorm(inner, NORM_EPS, elementwise_affine=shape.affine_norm)
        )
        joined = inner if self.output == "gated" else 3 * inner
        self.out = nn.Linear(joined, shape.width, bias=not shape.projection_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize f1 normal with standard deviation 0.02, f2 Xavier uniform, and their biases to 0."""
        nn.init.normal_(self.uvqk.weight, std=0.02)
        nn.init.xavier_uniform_(self.out.weight)
        for linear in (self.uvqk, self.out):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, x_SD: Tensor, layout: Layout) -> Tensor:
        """Run the layer: [S, D] -> [S, D]."""
        u, v, q, k = self.project(x_SD)
        attended = pointwise_attention(q, k, v, layout, self.bias, self.backend)
        return self.combine(x_SD, u, attended.flatten(1), layout.rows.sequences)

    def project(self, x_SD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Project x to u [S, H x V], v [S, H, V], q and k [S, H, E]."""
        inner, keys = self.heads * self.value_width, self.heads * self.qk_width
        uvqk = self.uvqk(self.norm(x_SD))
        if self.silu_on_all:
            uvqk = F.silu(uvqk)
        u, v, q, k = uvqk.split([inner, inner, keys, keys], dim=-1)
        if not self.silu_on_all:
            u = F.silu(u)
        v = v.unflatten(1, (self.heads, self.value_width))
        return u, v, q.unflatten(1, (self.heads, self.qk_width)), k.unflatten(1, (self.heads, self.qk_width))

    def combine(self, x_SD: Tensor, u: Tensor, attended: Tensor, sequences: Tensor) -> Tensor:
        """Gate and project `attended` [S, H x V], and add it to x; sequences [S]: the user of each row."""
        normed = self._normalize(attended)
        joined = u * normed
        if self.output != "gated":
            joined = torch.cat([u, attended if self.output == "concat" else normed, joined], dim=-1)
        change = self.out(F.dropout(joined, self.dropout, self.training))
        if self.training and self.skip > 0:
            # One draw per user, not per row: a sequence skips the layer as one. Dividing by the probability of keeping
            # it leaves the expected change the same as in evaluation, where no layer is skipped.
            users = int(sequences.max()) + 1
            kept = torch.rand(users, device=x_SD.device) >= self.skip
            change = change * (kept[sequences].to(change.dtype) / (1 - self.skip))[:, None]
        return x_SD + change

    def _normalize(self, attended: Tensor) -> Tensor:
        """LN(a) of [S, H x V]; a group norm reads heads as channels, so that each has one weight."""
        if isinstance(self.attention_norm, nn.GroupNorm):
            normed: Tensor = self.attention_norm(attended.unflatten(1, (self.heads, self.value_width)))
            return normed.flatten(1)
        return self.attention_norm(attended)


class HSTU(UserEncoder):
    """A stack of HSTU layers as a user encoder; see `UserEncoder.forward`.

    Args:
        shape: see `HSTUShape`.
        dropout: probability of dropout on the inputs.

    Raises:
        ValueError: as `resolve_preset`, or an unknown backend.
    """

    keeps_history = True
    read_history = read_pointwise
    begin_request = begin_pointwise

    def __init__(self, shape: HSTUShape, dropout: float = 0.0) -> None:
        shape = resolve_preset(shape)
        known_backend(shape.backend)
        positions = shape.max_positions if shape.absolute_positions else 0
        super().__init__(shape.width, dropout, positions, query_next_time=shape.time_of == "next")
        if shape.prefix_mask == "history" and shape.backend == "auto":
            shape = dataclasses.replace(shape, backend="eager")  # triton has no such mask
        self.shape, self.context_prefix = shape, shape.prefix
        self.context_sees_history = shape.prefix_mask == "history"
        assert shape.qk_width is not None
        self.rules = AttentionRules(
            window=shape.window,
            prefix=shape.prefix,
            divide_by=None if shape.divide_by == "length" else int(shape.divide_by),
            alpha=score_scale(shape.qk_width, bool(shape.scaled_scores), shape.alpha),
            last_bucket=shape.time_buckets if shape.relative_bias else None,
            context_sees_all=self.context_sees_history,
        )
        # Linear schedule: deeper layers are skipped more often, up to `stochastic_depth` at the last.
        skips = [shape.stochastic_depth * (number + 1) / shape.layers for number in range(shape.layers)]
        self.layers = nn.ModuleList(HSTULayer(shape, skip) for skip in skips)

    def encode(self, x_SD: Tensor, rows: PackedRows) -> Tensor:
        """Run all layers: [S, D] -> [S, D].

        Raises:
            ValueError: the context sees the complete history, and a query does not see all of its user's history.
        """
        if self.rules.context_sees_all:
            lengths = lengths_from_offsets(rows.seq_offsets)[rows.sequences[rows.history :]]
            if not torch.equal(rows.visible, lengths):
                raise ArgumentError(
                    "prefix_mask: 'history': a query inside a history would see the events after it through the "
                    "context; write context"
                )
        layout = plan_layout(rows, self.rules, self.shape.backend)
        for layer in self.layers:
            x_SD = self.run_layer(layer, x_SD, layout)
        return x_SD

    def attention_backend(self, device: torch.device) -> str:
        """The backend of the attention on a device, and why."""
        return choose_hstu_backend(self.shape.backend, device)[1]

    def flops(self, tokens: int, keys: int) -> float:
        """Count the operations of a forward pass over `tokens` rows that see `keys` keys in total."""
        assert self.shape.qk_width and self.shape.value_width
        # Per key and head: q . k and the weighted sum of v, a multiplication and an addition for each number.
        per_key = 2.0 * self.shape.heads * (self.shape.qk_width + self.shape.value_width)
        return tokens * dense_flops([self.layers]) + keys * per_key * len(self.layers)
