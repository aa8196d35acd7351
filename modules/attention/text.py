"""Attention of the Item LLM over packed texts that may share a prefix.

A packed sequence has P prefix rows (the prompt, once) and then the rows of U texts. A position of a text sees the
prefix, if the text begins with it, and the positions of its text up to itself. (Without a causal mask it sees the
complete text, and there is no prefix.) The prefix comes first and sees only itself, so its hidden states are the same
for all texts: all texts use one copy, whose gradient is the sum over the texts.

Texts are sorted (see `TextLayout`), so the texts of a padded bucket are contiguous: a bucket is a view of the packed
rows or, if it has padding, one gather. `hllm_torchrec.modules.attention.text_backends` has kernels that need no
padding.

Legend: U texts, S packed rows, P prefix rows, b texts in a bucket, N padded length, M keys, H heads, G key-value heads,
D width of a head.
"""

from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import dropout as apply_dropout

from hllm_torchrec.modules.attention import dense_attention
from hllm_torchrec.modules.attention.dense_attention import attention
from hllm_torchrec.modules.attention.text_blocks import TextBlocks, text_blocks
from hllm_torchrec.modules.jagged import bucket_bounds

WASTE = {"cpu": (0.06, 4), "cuda": (0.25, 16)}
"""Device -> (`waste`, `floor`) of `length_buckets`: on a CPU, kernel launches are cheap and padded cells expensive."""


@dataclass(frozen=True)
class TextLayout:
    """Arrangement of the texts in a packed sequence.

    lengths: number of rows of each text, without the prefix, on the host; 0 is allowed. num_without_prefix: number of
    texts that do not begin with the prefix; they come first. Within this group, and within the group of the other
    texts, longer texts come first. prefix: P. causal: True for decoders, False for encoders (then there is no prefix).
    """

    lengths: list[int]
    prefix: int = 0
    num_without_prefix: int = 0
    causal: bool = True

    def __post_init__(self) -> None:
        assert self.causal or not self.prefix, "without causality a prefix would see the texts"
        assert all(group == sorted(group, reverse=True) for group in self.groups()), "longer texts come first"

    def groups(self) -> tuple[list[int], list[int]]:
        """Lengths of the texts without the prefix, and of the texts with the prefix."""
        return self.lengths[: self.num_without_prefix], self.lengths[self.num_without_prefix :]

    def seen(self) -> tuple[int, int]:
        """Number of prefix rows that a text of each group sees."""
        return 0, self.prefix

    def sequences(self) -> tuple[Tensor, Tensor]:
        """Lengths of the prefix and of each text, and the number of prefix rows that each sees: both [1 + U] int64."""
        # The prefix is the first sequence; it sees no other prefix rows.
        seen = [0] * (self.num_without_prefix + 1) + [self.prefix] * (len(self.lengths) - self.num_without_prefix)
        return torch.tensor([self.prefix, *self.lengths]), torch.tensor(seen)

    @property
    def longest(self) -> int:
        """Largest number of keys that a row sees."""
        lengths, seen = self.sequences()
        return int((lengths + seen).max())

    def position_ids(self, device: torch.device) -> Tensor:
        """Positions [1, S] int64: the prefix, and texts without it, count from 0; texts with it continue from P."""
        lengths, first = self.sequences()
        starts = lengths.cumsum(0) - lengths
        shift = torch.repeat_interleave(first - starts, lengths)
        return (torch.arange(shift.numel()) + shift)[None].to(device)


@dataclass(frozen=True)
class ScoreLimits:
    """Limits of a layer's attention, in addition to the mask.

    window: a row sees only keys at a distance below this; None: no limit. softcap: c of c * tanh(score / c); None: no
    cap.
    """

    window: int | None = None
    softcap: float | None = None


class TextPlan(Protocol):
    """Attention mask of a batch, prepared for a kernel: built once per batch and used by every layer."""

    @property
    def position_ids(self) -> Tensor:
        """[1, S] int64."""

    @property
    def longest(self) -> int:
        """Largest number of keys that a row sees, or an upper bound of it."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
        """query [S, H, D], key and value [S, G, D] -> [S, H, D]; G divides H."""


@runtime_checkable
class LimitedPlan(Protocol):
    """A `TextPlan` that can be restricted to a layer's `ScoreLimits`."""

    def limited(self, limits: ScoreLimits) -> TextPlan:
        """Return the same plan with these limits."""


class WholeTextPlan(TextPlan, Protocol):
    """A `TextPlan` that can also compute attention only for the last position of each text."""

    def limited(self, limits: ScoreLimits) -> "WholeTextPlan":
        """See `LimitedPlan`."""

    def attend_last(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
        """Attention of each text's last position: query [U, H, D], key and value [S, G, D] of all rows -> [U, H, D].

        Queries are in the layout's order, and no text may be empty.
        """


@dataclass(frozen=True)
class TextBucket:
    """Contiguous texts of similar length.

    texts, longest: b and N. count: number of rows without padding. cells: [b * N] int64, the row of each cell, counted
    from the bucket's first row (a padding cell repeats the text's last row); kept: [count] int64, the cells that are
    not padding; both are None if the bucket has no padding. seen: number of prefix rows, whose keys precede those of
    the text. mask: bool, True where a position sees a key, [N, seen + N] or [b, 1, 1, N]; None: the mask is causal
    without a prefix, or all keys are seen. last_mask: [b, 1, 1, seen + N], the mask of each text's last position; None:
    it sees all keys.
    """

    texts: int
    longest: int
    count: int
    cells: Tensor | None
    kept: Tensor | None
    seen: int
    mask: Tensor | None
    last_mask: Tensor | None


@dataclass(frozen=True)
class BucketPlan:
    """A `TextPlan` of length-sorted padded buckets, with one attention call per bucket, for any device and dtype.

    has_prefix: whether the first bucket is the prefix.
    """

    buckets: list[TextBucket]
    has_prefix: bool
    position_ids: Tensor
    longest: int
    causal: bool
    limits: ScoreLimits = ScoreLimits()
    arranged: dict[tuple[int, int, bool, torch.dtype], TextBlocks] = field(default_factory=dict, compare=False)

    @property
    def attends_in_blocks(self) -> bool:
        """True in a pass with gradients, without limits, over texts that are all short enough for `text_blocks`."""
        short = self.longest <= dense_attention.LONGEST
        return short and torch.is_grad_enabled() and self.limits == ScoreLimits()

    def blocks(self, heads: int, groups: int, last: bool, dtype: torch.dtype) -> TextBlocks:
        """The texts as blocks (see `text_blocks`), arranged once for all layers."""
        key = heads, groups, last, dtype
        if key not in self.arranged:
            self.arranged[key] = text_blocks(self, *key)
        return self.arranged[key]

    def limited(self, limits: ScoreLimits) -> "BucketPlan":
        """See `LimitedPlan`."""
        return replace(self, limits=limits)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
        """See `TextPlan`."""
        sizes = [bucket.count for bucket in self.buckets]
        rows = [x.split(sizes) for x in (query, key, value)]  # the gradient of split is one concatenation
        # The first bucket; used only if the layout has a prefix (`_behind` checks `bucket.seen`).
        prefix = rows[1][0], rows[2][0]
        outputs = []
        for bucket, *parts in zip(self.buckets, *rows, strict=True):
            q, k, v = (padded_rows(part, bucket) for part in parts)
            k, v = _behind(prefix, k, v, bucket)
            mask = _mask_within(bucket, self.causal, self.limits.window, q.device)
            # SDPA's is_causal aligns queries and keys at the top left, which is wrong after a prefix: such buckets have
            # an explicit mask.
            is_causal = self.causal and mask is None
            out = grouped_attention(q, k, v, mask, is_causal, scaling, dropout, self.limits.softcap)
            outputs.append(out if bucket.kept is None else out.index_select(0, bucket.kept))
        return torch.cat(outputs)

    def attend_last(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
        """See `TextPlan`."""
        keys, values = (x.split([bucket.count for bucket in self.buckets]) for x in (key, value))
        # The prefix is not a text: none of its positions is read.
        first = int(self.has_prefix)
        queries = query.split([bucket.texts for bucket in self.buckets[first:]])
        outputs = []
        for bucket, q, k, v in zip(self.buckets[first:], queries, keys[first:], values[first:], strict=True):
            k, v = _behind((keys[0], values[0]), padded_rows(k, bucket), padded_rows(v, bucket), bucket)
            # One query per text, which sees its complete text: not causal, only padding is hidden.
            mask = _last_mask_within(bucket, self.limits.window, q.device)
            outputs.append(grouped_attention(q[:, None], k, v, mask, False, scaling, dropout, self.limits.softcap))
        return torch.cat(outputs)


def plan_buckets(layout: TextLayout, device: torch.device, padding: bool = True) -> BucketPlan:
    """Plan buckets for the layout's texts; if there is a prefix, it is the first bucket.

    padding: False: only texts of equal length share a bucket.
    """
    waste, floor = WASTE.get(device.type, WASTE["cuda"]) if padding else (0.0, 0)
    buckets = [_bucket([layout.prefix], 0, layout.causal, device)] if layout.prefix else []
    for group, seen in zip(layout.groups(), layout.seen(), strict=True):
        lengths = [length for length in group if length]
        for start, end in bucket_bounds(lengths, waste, floor, seen=seen):
            buckets.append(_bucket(lengths[start:end], seen, layout.causal, device))
    return BucketPlan(buckets, layout.prefix > 0, layout.position_ids(device), layout.longest, layout.causal)


def _bucket(lengths: list[int], seen: int, causal: bool, device: torch.device) -> TextBucket:
    """Build the bucket of texts with these descending lengths."""
    longest, count = lengths[0], sum(lengths)
    cells = kept = mask = last_mask = None
    if lengths[-1] < longest:
        rows = torch.tensor(lengths)
        column = torch.arange(longest)
        valid = column < rows[:, None]
        starts = rows.cumsum(0) - rows
        # Built on the host, where the lengths are, and copied once per batch.
        cells = (starts[:, None] + torch.minimum(column, rows[:, None] - 1)).flatten().to(device)
        kept = valid.flatten().nonzero().flatten().to(device)
        # Right padding lies in the future of every real position, so a causal model needs no padding mask.
        mask = None if causal else valid[:, None, None, :].to(device)
        last_mask = torch.nn.functional.pad(valid, (seen, 0), value=True)[:, None, None, :].to(device)
    if seen:
        # Row i of a text sees the prefix and its own rows up to i; only causal layouts have a prefix.
        mask = torch.ones(longest, seen + longest, dtype=torch.bool, device=device).tril(seen)
    return TextBucket(len(lengths), longest, count, cells, kept, seen, mask, last_mask)


def _mask_within(bucket: TextBucket, causal: bool, window: int | None, device: torch.device) -> Tensor | None:
    """The bucket's mask, restricted to keys at a distance below `window`; broadcastable to [b, 1, N, seen + N]."""
    if window is None or bucket.seen + bucket.longest <= window:
        return bucket.mask
    column = torch.arange(bucket.seen + bucket.longest, device=device)
    row = column[bucket.seen :, None]
    near = (row - column).abs() < window
    if causal:
        return near & (column <= row)
    # A padding row may have no valid key in its window. It sees itself, because a row without keys would be NaN.
    return near if bucket.mask is None else near & bucket.mask | (row == column)


def _last_mask_within(bucket: TextBucket, window: int | None, device: torch.device) -> Tensor | None:
    """The bucket's `last_mask`, restricted to the last `window` keys of each text."""
    longest = bucket.seen + bucket.longest
    if window is None or longest <= window:
        return bucket.last_mask
    column = torch.arange(longest, device=device)
    if bucket.last_mask is None:
        return (column >= longest - window)[None, None, None]
    return bucket.last_mask & (column >= bucket.last_mask.sum(-1, keepdim=True) - window)


def _behind(prefix: tuple[Tensor, Tensor], k: Tensor, v: Tensor, bucket: TextBucket) -> tuple[Tensor, Tensor]:
    """Put the prefix's keys and values [P, G, D] in front of a bucket's [b, N, G, D], if its texts see the prefix."""
    if not bucket.seen:
        return k, v
    before_k, before_v = (x.expand(bucket.texts, -1, -1, -1) for x in prefix)
    return torch.cat([before_k, k], 1), torch.cat([before_v, v], 1)


def padded_rows(rows: Tensor, bucket: TextBucket) -> Tensor:
    """Reshape the packed rows [count, ...] of a bucket to [b, N, ...]; a view if nothing is padded."""
    if bucket.cells is not None:
        rows = rows.index_select(0, bucket.cells)
    return rows.view(bucket.texts, bucket.longest, *rows.shape[1:])


def grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scaling: float,
    dropout: float,
    softcap: float | None = None,
) -> Tensor:
    """Attend with q [b, N, H, D] over k and v [b, M, G, D] -> [b * N, H, D]; G divides H, and causal means M = N."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    # On CUDA not every kernel of SDPA supports grouped queries.
    if groups > 1 and (q.device.type != "cpu" or softcap is not None):
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    if softcap is not None:
        out = _capped_attention(q, k, v, mask, causal, scaling, dropout, softcap)
    else:
        out = attention(q, k, v, mask, causal, scaling, dropout)
    return out.transpose(1, 2).flatten(0, 1)


def _capped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scaling: float, dropout: float, softcap: float
) -> Tensor:
    """Attention with capped scores [b, H, N, D], written out: SDPA has no cap."""
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * scaling / softcap)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return apply_dropout(weights, dropout, training=dropout > 0) @ v
