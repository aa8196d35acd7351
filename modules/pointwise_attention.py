"""HSTU's pointwise attention over packed sequences with query tokens, and the registry of its backends.

    a_i = sum_j silu(alpha q_i . k_j + rab_ij) v_j / n_i        over the keys j that i sees

There is no softmax, so what a row gets is a plain sum over keys: a query's own key is added on its own, and
blocks of keys need no common normaliser. n_i is a constant or the number of keys that i sees, never anything
of the batch: a row's value does not depend on who shares it. rab_ij is one learned number for the distance in
positions and one for the distance in time (HSTU, section 3; shared by the heads, as published).

Who sees whom: a position sees its sequence up to itself, of that only the last `window` positions where there
is a window; the first `prefix` positions are context that see one another and that every one sees (the public
code lets context see the whole history, and so the future); a query sees what a position in its place would
see, and itself.

Legend: B sequences, T history positions, Q queries, S = T + Q packed rows, b sequences of a block, M asking
rows, N keys, H heads, D and V widths of a head's keys and values.
"""

import importlib.util
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hllm_torchrec.modules.jagged import length_buckets, lengths_from_offsets
from hllm_torchrec.modules.user_encoder import PackedRows

BUCKET_WIDTH = 0.301
"""In ln(seconds), as in the public code: close to log10(2), so a bucket is a factor of 1.35, not 2."""


@dataclass(frozen=True)
class Rules:
    """What is the same for every batch: window and prefix (see the module), what sums are divided by (a number,
    or None for the number of keys seen), alpha, and the last time bucket (None: no relative bias)."""

    window: int | None
    prefix: int
    divide_by: int | None
    alpha: float
    last_bucket: int | None


@dataclass(frozen=True)
class Block:
    """Scores that are computed at once: M asking rows of b sequences against their N history positions.

    asking: [b, M] int64 packed rows (a padding cell repeats a valid one); valid: [b, M] bool, None where
    nothing is padded; keys: [b, N] int64 packed rows; hidden: [b or 1, M, N] bool, True where a row may not
    look; distance: [b or 1, M, N] int64 positions >= 0; bucket: [b, M, N] int16, time bucket. The last two are
    None without a relative bias.
    """

    asking: Tensor
    valid: Tensor | None
    keys: Tensor
    hidden: Tensor
    distance: Tensor | None
    bucket: Tensor | None


@dataclass(frozen=True)
class Layout:
    """Who sees whom in one batch: built once, used by every layer.

    rows: the packed rows, which is all that a jagged kernel needs; rules; divisor: [S, 1, 1] float32, n_i;
    blocks: for padded backends; restore: [S] int64, from the order in which the blocks emit rows, followed by
    `alone` [l] (queries without any history), to the packed order.
    """

    rows: PackedRows
    rules: Rules
    divisor: Tensor
    blocks: list[Block]
    alone: Tensor
    restore: Tensor


def time_bucket(seconds: Tensor, last: int) -> Tensor:
    """floor(ln(max(|seconds|, 1)) / 0.301), at most `last`, as int16."""
    return (seconds.abs().clamp(min=1).double().log() / BUCKET_WIDTH).floor().clamp(max=last).to(torch.int16)


def keys_seen(rows: PackedRows, rules: Rules) -> Tensor:
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


def plan_blocks(rows: PackedRows, rules: Rules) -> Layout:
    """Group the sequences of a batch by length into blocks; queries get a block beside their history's."""
    blocks: list[Block] = []
    for bucket in length_buckets(rows.seq_offsets):
        keys = bucket.rows
        blocks.append(_block(rows, rules, keys, bucket.valid, keys, bucket.valid))
        asked = _queries_of(rows, bucket.sequences)
        if asked is not None:
            blocks.append(_block(rows, rules, *asked, keys, bucket.valid))
    emitted = [b.asking.flatten() if b.valid is None else b.asking[b.valid] for b in blocks]
    empty = lengths_from_offsets(rows.seq_offsets) == 0
    alone = torch.nonzero(empty[rows.sequences[rows.history :]]).flatten() + rows.history
    order = torch.cat([*emitted, alone])
    restore = torch.empty_like(order)
    restore[order] = torch.arange(order.numel(), device=order.device)
    number = keys_seen(rows, rules) if rules.divide_by is None else torch.full_like(rows.positions, rules.divide_by)
    return Layout(rows, rules, number.float()[:, None, None], blocks, alone, restore)


def _queries_of(rows: PackedRows, sequences: Tensor) -> tuple[Tensor, Tensor] | None:
    """(packed rows [b, M], valid [b, M]) of the queries of some sequences; None where there is none."""
    counts = lengths_from_offsets(rows.query_offsets)[sequences]
    most = int(counts.max())
    if most == 0:
        return None
    cells = torch.arange(most, device=counts.device).expand(counts.numel(), -1)
    index = (rows.query_offsets[sequences][:, None] + cells).clamp(max=rows.visible.numel() - 1)
    return index + rows.history, cells < counts[:, None]


def _block(
    rows: PackedRows, rules: Rules, asking: Tensor, valid: Tensor | None, keys: Tensor, keys_valid: Tensor | None
) -> Block:
    is_history = asking is keys
    columns = torch.arange(keys.shape[1], device=keys.device)
    if is_history and not rules.prefix:
        place = columns[None, :, None]  # the same for every sequence: padding is always in the future
        hidden = columns > place
    else:
        place = rows.positions[asking][:, :, None]
        hidden = columns >= place + int(is_history)
    distance = place - columns
    if rules.window is not None:
        hidden = hidden | ((distance >= rules.window) & (columns >= rules.prefix))
    if rules.prefix and is_history:
        hidden = hidden & ~((place < rules.prefix) & (columns < rules.prefix))
        if keys_valid is not None:
            hidden = hidden | ~keys_valid[:, None, :]
    if rules.last_bucket is None:
        return Block(asking, valid, keys, hidden, None, None)
    gap = rows.asked_at[asking][:, :, None] - rows.times[keys][:, None, :]
    return Block(asking, valid, keys, hidden, distance.clamp(min=0), time_bucket(gap, rules.last_bucket))


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
        return _look_up(self.of_position, place) + _look_up(self.of_time, bucket)


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """table[index]; index_select has by far the fastest backward pass of the ways to write it on a CPU."""
    return table.index_select(0, index.flatten().int()).view(index.shape)


def block_attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, bias: Tensor | None, alpha: float) -> Tensor:
    """Undivided sums of a block: q [b, M, H, D], k [b, N, H, D], v [b, N, H, V] -> [b, M, H, V].

    hidden [b or 1, M, N] bool; bias [b, M, N] or None.
    """
    scores = torch.einsum("bmhd,bnhd->bhmn", q, k) * alpha
    if bias is not None:
        scores = scores + bias[:, None].to(scores.dtype)
    weights = F.silu(scores).masked_fill(hidden[:, None], 0.0)
    return torch.einsum("bhmn,bnhv->bmhv", weights, v)


Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
Attention = Callable[[Tensor, Tensor, Tensor, Layout, RelativeBias | None], Tensor]
"""(q [S, H, D], k [S, H, D], v [S, H, V], layout, bias) -> [S, H, V]."""


@torch.compiler.disable  # its shapes differ in every batch: traced whole, it would be compiled anew for each
def blockwise(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, bias: RelativeBias | None, kernel: Kernel = block_attention
) -> Tensor:
    """The attention of all blocks, one padded block after the other: [S, H, V]."""
    alpha = layout.rules.alpha
    outputs = []
    for block in layout.blocks:
        added = None if bias is None else bias(block.distance, block.bucket)
        # Gathered packed rows; padding is dropped again right after the block.
        out = kernel(_rows(q, block.asking), _rows(k, block.keys), _rows(v, block.keys), block.hidden, added, alpha)
        outputs.append(out.flatten(0, 1) if block.valid is None else out[block.valid])
    outputs.append(v.new_zeros(layout.alone.numel(), *v.shape[1:]))
    total = torch.cat(outputs).index_select(0, layout.restore)
    if layout.rows.visible.numel():
        total = total + _own_keys(q, k, v, layout, bias)
    return total / layout.divisor.to(total.dtype)


def _rows(x_SHD: Tensor, index: Tensor) -> Tensor:
    """x_SHD[index] [b, M, H, D], with a fast backward pass."""
    return x_SHD.index_select(0, index.flatten()).view(*index.shape, *x_SHD.shape[1:])


def _own_keys(q: Tensor, k: Tensor, v: Tensor, layout: Layout, bias: RelativeBias | None) -> Tensor:
    """What each query adds by seeing itself, zero at history rows (they see themselves in their block)."""
    history = layout.rows.history
    scores = (q[history:] * k[history:]).sum(-1) * layout.rules.alpha
    if bias is not None:  # distance 0 in both
        scores = scores + (bias.of_position[0] + bias.of_time[0]).to(scores.dtype)
    own = F.silu(scores)[:, :, None] * v[history:]
    return torch.cat([own.new_zeros(history, *own.shape[1:]), own])


@dataclass(frozen=True)
class Backend:
    """A way to compute the attention; `missing` says why it cannot run on a device, or None."""

    attend: Attention
    missing: Callable[[torch.device], str | None]


@cache
def _compiled_block() -> Kernel:
    return torch.compile(block_attention, dynamic=True)


def _compiled(q: Tensor, k: Tensor, v: Tensor, layout: Layout, bias: RelativeBias | None) -> Tensor:
    return blockwise(q, k, v, layout, bias, _compiled_block())


def _no_compiler(device: torch.device) -> str | None:
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "torch.compile needs triton on CUDA, not installed"
    found = any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl"))
    return None if found else "torch.compile needs a C++ compiler on the CPU, and none is on the PATH"


BACKENDS: dict[str, Backend] = {
    "eager": Backend(blockwise, lambda device: None),
    "compiled": Backend(_compiled, _no_compiler),
}
"""The registry: add an entry to make a name usable in `user.shape.backend`."""


def known_backend(name: str) -> Backend:
    """The backend of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in BACKENDS:
        raise ValueError(f"user.shape.backend: {name!r}: no such attention backend; there are {sorted(BACKENDS)}")
    return BACKENDS[name]


def pointwise_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, bias: RelativeBias | None, backend: str
) -> Tensor:
    """a [S, H, V] of q [S, H, D], k [S, H, D], v [S, H, V] by the backend named.

    Raises:
        ValueError: the backend is unknown or cannot run on this device; no other runs in its place.
    """
    chosen = known_backend(backend)
    missing = chosen.missing(q.device)
    if missing is not None:
        raise ValueError(f"user.shape.backend: {backend!r}: cannot run on {q.device.type}: {missing}; choose 'eager'")
    return chosen.attend(q, k, v, layout, bias)


def score_scale(qk_width: int, scaled: bool) -> float:
    """alpha: 1 / sqrt(width) or 1."""
    return 1.0 / math.sqrt(qk_width) if scaled else 1.0


def block_without_own_keys(rows: PackedRows, rules: Rules, asking: Tensor, keys: Tensor) -> Block:
    """Scores of the packed rows `asking` [M] of one sequence against its history positions `keys` [N].

    Like a query's, an asking row's own key is hidden: what it adds comes on its own (there is no normaliser).
    """
    return _block(rows, rules, asking[None], None, keys[None], None)
