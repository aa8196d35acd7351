"""Attention over packed sequences with query tokens, for unmodified Hugging Face models.

A packed batch is one sequence of T history positions followed by Q query tokens (T + Q = S):

- a history position sees the positions of its own sequence up to itself (causal) or all of them (BERT);
- a query sees the first `query_visible` positions of its sequence and itself; no other row sees a query.

So one pass over a user's sequence computes all of the user's exposures (O(N^2) instead of O(N^3)).
The model gets `hllm_plan=AttentionPlan` (or the Item LLM's `TextPlan`) as a keyword argument of its forward pass;
transformers passes it to the function registered here, so no modeling code is copied. Only within the attention
function, sequences of similar length share a padded bucket; a T x T mask of the batch never exists.

Legend: B sequences, S packed tokens, b sequences in a bucket, N padded positions, M padded queries, l queries of empty
sequences, H heads, G key-value heads, D width of a head.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as apply_dropout

from hllm_torchrec.common.errors import ArgumentError
from hllm_torchrec.modules.attention.dense_attention import attention
from hllm_torchrec.modules.attention.text import LimitedPlan, ScoreLimits, TextPlan
from hllm_torchrec.modules.jagged import (
    MOST_SCORES,
    Bucket,
    length_buckets,
    lengths_from_offsets,
    position_in_sequence,
)

PACKED_ATTENTION = "hllm_packed"


@dataclass(frozen=True)
class QueryBucket:
    """Queries of the sequences of one history bucket.

    rows: [b, M] int64 packed rows (already shifted by T); valid: [b, M] bool, False at padding;
    hidden: [b, M, N] bool, True where the query does not see the position.
    """

    rows: Tensor
    valid: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class AttentionPlan:
    """Attention mask of a packed batch, in buckets; built once per batch and used by every layer.

    history: buckets of the sequences; queries: the queries of each bucket (None: that bucket has none);
    without_history: [l] int64 packed rows of queries whose sequence is empty (they see only themselves);
    restore: [S] int64, index of each packed row in the concatenated outputs of the buckets;
    position_ids: [1, S] int64 (a query's position is the number of positions that it sees).
    """

    history: list[Bucket]
    queries: list[QueryBucket | None]
    without_history: Tensor
    restore: Tensor
    position_ids: Tensor
    causal: bool

    @property
    def longest(self) -> int:
        """Upper bound of the number of keys that a row sees."""
        longest = max((bucket.rows.shape[1] for bucket in self.history), default=0)
        return longest + any(queries is not None for queries in self.queries)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
        """query [S, H, D], key and value [S, G, D] -> [S, H, D]; G divides H."""
        # Grouped-query attention: every group of query heads reads the same key head.
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        outputs, query_outputs = [], []
        for bucket, queries in zip(self.history, self.queries, strict=True):
            k_BHND, v_BHND = _padded(key, bucket.rows), _padded(value, bucket.rows)
            out = _history_attention(_padded(query, bucket.rows), k_BHND, v_BHND, bucket, self.causal, scaling, dropout)
            outputs.append(_packed(out, bucket.valid))
            if queries is not None:
                q, own_k, own_v = (_padded(x, queries.rows) for x in (query, key, value))
                out = _query_attention(q, own_k, own_v, k_BHND, v_BHND, queries.hidden, scaling, dropout)
                query_outputs.append(_packed(out, queries.valid))
        rows = self.without_history
        lonely = _own_attention(query[rows], key[rows], value[rows], scaling)
        # This order must equal that of `emitted` in `plan_attention`: all histories, all queries, then the queries
        # without history.
        return torch.cat([*outputs, *query_outputs, lonely])[self.restore]


def plan_attention(
    seq_offsets: Tensor,
    total: int,
    query_offsets: Tensor | None = None,
    query_visible: Tensor | None = None,
    *,
    causal: bool = True,
    most_scores: int = MOST_SCORES,
) -> AttentionPlan:
    """Plan the attention of sequences with `seq_offsets` [B+1] over T = `total` positions, and optionally Q queries.

    query_offsets: [B+1] int64, the queries of each sequence; query_visible: [Q] int64, number of positions of its
    sequence (from its start) that each query sees, 0 <= visible <= length. causal: True for decoders, False for
    encoders. most_scores: see `length_buckets`; it limits memory and does not change values.
    """
    history = length_buckets(seq_offsets, most_scores=most_scores)
    positions = position_in_sequence(seq_offsets, total)
    emitted = [_valid_rows(bucket.rows, bucket.valid) for bucket in history]
    queries: list[QueryBucket | None] = [None] * len(history)
    lonely = positions.new_empty(0)
    if query_offsets is not None and query_visible is not None:
        queries = [_query_bucket(bucket, query_offsets, query_visible, total) for bucket in history]
        emitted += [_valid_rows(q.rows, q.valid) for q in queries if q is not None]
        lonely = _queries_of_empty_sequences(seq_offsets, query_offsets) + total
        emitted.append(lonely)
        positions = torch.cat([positions, query_visible])
    # `order` is the packed row of each emitted row; its inverse brings the outputs back to the packed order.
    order = torch.cat(emitted) if emitted else positions.new_empty(0)
    restore = torch.empty_like(order)
    restore[order] = torch.arange(order.numel(), device=order.device)
    return AttentionPlan(history, queries, lonely, restore, positions[None], causal)


def _valid_rows(rows: Tensor, valid: Tensor | None) -> Tensor:
    return rows.flatten() if valid is None else rows[valid]


def _query_bucket(history: Bucket, query_offsets: Tensor, query_visible: Tensor, total: int) -> QueryBucket | None:
    """Pad the queries of a history bucket's sequences; None without queries."""
    counts = lengths_from_offsets(query_offsets)[history.sequences]
    most = int(counts.max()) if counts.numel() else 0
    if most == 0:
        return None
    cells = torch.arange(most, device=counts.device).expand(counts.numel(), -1)
    # Padding cells may run beyond the last query of the batch: the clamp keeps them valid indices.
    index = (query_offsets[history.sequences][:, None] + cells).clamp(max=query_visible.numel() - 1)
    visible = query_visible[index]
    keys = torch.arange(history.rows.shape[1], device=counts.device)
    return QueryBucket(
        rows=index + total, valid=cells < counts[:, None], hidden=keys[None, None, :] >= visible[:, :, None]
    )


def _queries_of_empty_sequences(seq_offsets: Tensor, query_offsets: Tensor) -> Tensor:
    """Find the queries whose sequence is empty: [l] int64. `length_buckets` has no bucket for them."""
    empty = lengths_from_offsets(seq_offsets) == 0
    counts = lengths_from_offsets(query_offsets)
    return torch.nonzero(torch.repeat_interleave(empty, counts)).flatten()


@torch.compiler.disable  # shapes differ in every batch, so a compiled function would be recompiled for each batch
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    hllm_plan: AttentionPlan | TextPlan,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers: query [1, H, S, D], key and value [1, G, S, D] -> [1, S, H, D].

    G divides H (grouped-query attention). `attention_mask` is ignored: the plan defines the mask.

    Raises:
        ValueError: the model has attention sinks; or the plan is no `LimitedPlan`, and the model caps its logits or has
            a sliding window that is shorter than a sequence.
    """
    del module, attention_mask
    plan = _within_limits(hllm_plan, options)
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [S, heads, D]
    return plan.attend(query, key, value, scaling, dropout)[None], None


def _within_limits(plan: AttentionPlan | TextPlan, options: dict[str, Any]) -> AttentionPlan | TextPlan:
    """The plan with the limits of the layer.

    Raises ValueError for a limit that the plan does not support, because ignoring it would change the results.
    """
    if options.get("s_aux") is not None:
        raise ValueError("the backbone has attention sinks, which packed attention lacks: choose another model")
    window, softcap = options.get("sliding_window"), options.get("softcap")
    if window is not None and plan.longest <= window:
        window = None
    if window is None and softcap is None:
        return plan
    if isinstance(plan, LimitedPlan):
        return plan.limited(ScoreLimits(window, softcap))
    if softcap is not None:
        raise ValueError(
            "the backbone caps its attention logits, which attention with query tokens lacks: choose another model"
        )
    raise ArgumentError(
        f"length: a sequence has {plan.longest} positions, beyond the backbone's sliding window of "
        f"{window}, which attention with query tokens lacks: lower length"
    )


def _padded(x_SHD: Tensor, rows_BN: Tensor) -> Tensor:
    """Gather packed rows into [b, H, N, D]."""
    b, n = rows_BN.shape
    return x_SHD.index_select(0, rows_BN.flatten()).view(b, n, *x_SHD.shape[1:]).transpose(1, 2)


def _packed(x_BHND: Tensor, valid_BN: Tensor | None) -> Tensor:
    """Flatten to packed rows [sum of lengths, H, D], without padding."""
    rows = x_BHND.transpose(1, 2)
    return rows.flatten(0, 1) if valid_BN is None else rows[valid_BN]


def _history_attention(
    q: Tensor, k: Tensor, v: Tensor, bucket: Bucket, causal: bool, scaling: float, dropout: float
) -> Tensor:
    # Right padding lies in the future of every real position, so a causal model needs no padding mask.
    mask = None if causal or bucket.valid is None else bucket.valid[:, None, None, :]
    return attention(q, k, v, mask, causal, scaling, dropout)


def _query_attention(
    q: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    k: Tensor,
    v: Tensor,
    hidden: Tensor,
    scaling: float,
    dropout: float,
) -> Tensor:
    """Softmax over the visible history and the query itself, whose key is one additional column of scores."""
    # Written out, because SDPA has no kernel for rows that see the keys of a shared block and one separate key each.
    history = (q @ k.transpose(-1, -2) * scaling).masked_fill(hidden[:, None], float("-inf"))
    own = (q * own_k).sum(-1, keepdim=True) * scaling
    # The own column is never hidden, so no row is all -inf and the softmax has no NaN.
    weights = torch.cat([history, own], dim=-1).softmax(-1, dtype=torch.float32).to(q.dtype)
    weights = apply_dropout(weights, dropout, training=dropout > 0)
    return weights[..., :-1] @ v + weights[..., -1:] * own_v


def _own_attention(q_lHD: Tensor, k_lHD: Tensor, v_lHD: Tensor, scaling: float) -> Tensor:
    """Attention of queries that see only themselves: their values, exactly."""
    # A softmax over one key is 1. It is written out because it keeps the query and key projections in the graph: if all
    # queries of a step are of this kind, DDP would wait for gradients of these projections forever.
    weights = ((q_lHD * k_lHD).sum(-1, keepdim=True) * scaling).softmax(-1)
    return weights * v_lHD


def _no_mask(*_: object, **__: object) -> None:
    """Mask function for transformers that builds no mask: the plan replaces it."""


def register_packed_attention() -> None:
    """Register `PACKED_ATTENTION` in transformers' attention registry; safe to call again."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    AttentionMaskInterface.register(PACKED_ATTENTION, _no_mask)
