"""Attention over packed texts that may share a prefix: what the Item LLM runs.

One packed row holds P prefix rows (the prompt, once) and then the rows of U texts. A text's position sees the
prefix, where its text begins with it, and its own text up to itself (causal; without causality all of it, and
no prefix). The prefix sees itself alone, as it stands in front of everything, so its hidden states are the
same for all texts and one copy serves them all; gradients of all texts meet in it.

Texts come sorted (see `TextLayout`), so those that share a padded bucket lie next to each other: a bucket is a
view of the packed row, or one gather where something is padded. `hllm_torchrec.modules.attention.text_backends`
has the kernels that need no padding.

Legend: U texts, S packed rows, P prefix rows, b texts in a bucket, N padded length, H heads, G key-value heads,
D width of a head.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hllm_torchrec.modules.jagged import bucket_bounds

WASTE = {"cpu": (0.06, 4), "cuda": (0.25, 16)}
"""Device -> (`waste`, `floor`) of `length_buckets`: a launch costs little on a CPU, and padded cells much."""


@dataclass(frozen=True)
class TextLayout:
    """Where the texts of a packed row lie.

    lengths: rows of each text, the prefix not counted, on the host; 0 is allowed. The first `num_without_prefix` texts
    do
    not begin with the prefix; among these, and among the others, longer ones come first.
    prefix: P. causal: decoders True, encoders False (then there is no prefix).
    """

    lengths: list[int]
    prefix: int = 0
    num_without_prefix: int = 0
    causal: bool = True

    def __post_init__(self) -> None:
        assert self.causal or not self.prefix, "without causality a prefix would see the texts"
        assert all(group == sorted(group, reverse=True) for group in self.groups()), "longer texts come first"

    def groups(self) -> tuple[list[int], list[int]]:
        """Lengths of the texts without and with the prefix in front of them."""
        return self.lengths[: self.num_without_prefix], self.lengths[self.num_without_prefix :]

    def seen(self) -> tuple[int, int]:
        """Prefix rows that a text of each group sees."""
        return 0, self.prefix

    def sequences(self) -> tuple[Tensor, Tensor]:
        """Rows of the prefix and of each text, and the prefix rows that each of them sees: [1 + U] int64."""
        seen = [0] * (self.num_without_prefix + 1) + [self.prefix] * (len(self.lengths) - self.num_without_prefix)
        return torch.tensor([self.prefix, *self.lengths]), torch.tensor(seen)

    @property
    def longest(self) -> int:
        """Keys that the last position of the longest text sees."""
        lengths, seen = self.sequences()
        return int((lengths + seen).max())

    def position_ids(self, device: torch.device) -> Tensor:
        """[1, S] int64: the prefix counts from 0, and so does a text without it; the others go on from P."""
        lengths, first = self.sequences()
        starts = lengths.cumsum(0) - lengths
        shift = torch.repeat_interleave(first - starts, lengths)
        return (torch.arange(shift.numel()) + shift)[None].to(device)


class TextPlan(Protocol):
    """Who sees whom, made ready for a kernel: built once per batch, used by every layer."""

    @property
    def position_ids(self) -> Tensor:
        """[1, S] int64."""

    @property
    def longest(self) -> int:
        """Keys that the last position of the longest text sees."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
        """query [S, H, D], key and value [S, G, D] -> [S, H, D]; G divides H."""


class WholeTextPlan(TextPlan, Protocol):
    """A `TextPlan` that can also attend for the last positions alone."""

    def attend_last(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
        """The last position of each text alone, no text being empty: query [U, H, D] in the layout's order,
        key and value [S, G, D] of all rows -> [U, H, D].
        """


@dataclass(frozen=True)
class TextBucket:
    """Texts of similar length that lie next to each other.

    texts, longest: b and N; count: their rows without padding. Where something is padded, cells: [b * N]
    int64 row, counted from the bucket's first, of each cell (padding repeats the text's last), and kept:
    [count] int64, the cells that are no padding; else None. seen: prefix rows before the own keys.
    mask: bool, True where a position looks, [N, seen + N] or [b, 1, 1, N]; None: causal without a prefix, or
    nothing hidden. last_mask: [b, 1, 1, seen + N], the same for each text's last position; None: it sees all.
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
    """A `TextPlan` in length-sorted padded buckets, each one call of SDPA; any device and dtype.

    has_prefix: whether the first bucket is the prefix.
    """

    buckets: list[TextBucket]
    has_prefix: bool
    position_ids: Tensor
    longest: int
    causal: bool

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
        """See `TextPlan`."""
        sizes = [bucket.count for bucket in self.buckets]
        rows = [x.split(sizes) for x in (query, key, value)]  # split's gradient is one concatenation
        prefix = rows[1][0], rows[2][0]
        outputs = []
        for bucket, *parts in zip(self.buckets, *rows, strict=True):
            q, k, v = (_grid(part, bucket) for part in parts)
            k, v = _behind(prefix, k, v, bucket)
            out = grouped_attention(q, k, v, bucket.mask, self.causal and not bucket.seen, scaling, dropout)
            outputs.append(out if bucket.kept is None else out.index_select(0, bucket.kept))
        return torch.cat(outputs)

    def attend_last(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
        """See `TextPlan`."""
        keys, values = (x.split([bucket.count for bucket in self.buckets]) for x in (key, value))
        first = int(self.has_prefix)
        asked = query.split([bucket.texts for bucket in self.buckets[first:]])
        outputs = []
        for bucket, q, k, v in zip(self.buckets[first:], asked, keys[first:], values[first:], strict=True):
            k, v = _behind((keys[0], values[0]), _grid(k, bucket), _grid(v, bucket), bucket)
            outputs.append(grouped_attention(q[:, None], k, v, bucket.last_mask, False, scaling, dropout))
        return torch.cat(outputs)


def plan_buckets(layout: TextLayout, device: torch.device) -> BucketPlan:
    """Buckets of the layout's texts; the prefix is the first of them."""
    waste, floor = WASTE.get(device.type, WASTE["cuda"])
    buckets = [_bucket([layout.prefix], 0, layout.causal, device)] if layout.prefix else []
    for group, seen in zip(layout.groups(), layout.seen(), strict=True):
        lengths = [length for length in group if length]
        for start, end in bucket_bounds(lengths, waste, floor, seen=seen):
            buckets.append(_bucket(lengths[start:end], seen, layout.causal, device))
    return BucketPlan(buckets, layout.prefix > 0, layout.position_ids(device), layout.longest, layout.causal)


def _bucket(lengths: list[int], seen: int, causal: bool, device: torch.device) -> TextBucket:
    """The bucket of texts with these falling lengths."""
    longest, count = lengths[0], sum(lengths)
    cells = kept = mask = last_mask = None
    if lengths[-1] < longest:
        rows = torch.tensor(lengths)
        column = torch.arange(longest)
        valid = column < rows[:, None]
        starts = rows.cumsum(0) - rows
        cells = (starts[:, None] + torch.minimum(column, rows[:, None] - 1)).flatten().to(device)
        kept = valid.flatten().nonzero().flatten().to(device)
        # Right padding lies in the future of every real position, so a causal model needs no padding mask.
        mask = None if causal else valid[:, None, None, :].to(device)
        last_mask = torch.nn.functional.pad(valid, (seen, 0), value=True)[:, None, None, :].to(device)
    if seen:
        mask = torch.ones(longest, seen + longest, dtype=torch.bool, device=device).tril(seen)
    return TextBucket(len(lengths), longest, count, cells, kept, seen, mask, last_mask)


def _behind(prefix: tuple[Tensor, Tensor], k: Tensor, v: Tensor, bucket: TextBucket) -> tuple[Tensor, Tensor]:
    """Keys and values [b, N, G, D] of a bucket, the prefix's [P, G, D] in front where its texts see it."""
    if not bucket.seen:
        return k, v
    before_k, before_v = (x.expand(bucket.texts, -1, -1, -1) for x in prefix)
    return torch.cat([before_k, k], 1), torch.cat([before_v, v], 1)


def _grid(rows: Tensor, bucket: TextBucket) -> Tensor:
    """Packed rows [count, heads, D] -> [b, N, heads, D], a view where nothing is padded."""
    if bucket.cells is not None:
        rows = rows.index_select(0, bucket.cells)
    return rows.view(bucket.texts, bucket.longest, *rows.shape[1:])


def grouped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scaling: float, dropout: float
) -> Tensor:
    """SDPA of q [b, N, H, D] over k and v [b, M, G, D] -> [b * N, H, D]; G divides H."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    shares = groups > 1 and q.device.type == "cpu"  # on CUDA not every kernel of SDPA has grouped queries
    if groups > 1 and not shares:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    out = scaled_dot_product_attention(
        q, k, v, mask, dropout_p=dropout, is_causal=causal, scale=scaling, enable_gqa=shares
    )
    return out.transpose(1, 2).flatten(0, 1)
