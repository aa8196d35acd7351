"""M-FALCON: runs a user's history once and scores candidates against it in micro-batches (HSTU, section 3.4).

    cache = read_history(encoder, x_ND, times)               keys and values of every layer
    cache = read_history(encoder, more_nD, times, cache)     append events: only the new ones are computed
    q_QD  = answer(encoder, cache, x_QD, time)               candidates, `micro_batch` at a time

The results equal the packed pass of training (`Queries`): a candidate is a query that sees the history before it and
itself. So m candidates after n events cost n^2 + n m keys, instead of m n^2 (one pass per candidate) or (n + m)^2 (all
in one sequence behind a mask), and memory beyond the cache is that of one micro-batch. This is for early fusion, where
a candidate is an input; late fusion has one query, the [USER] vector.

Supports HSTU and every softmax encoder: the User LLM (a stock Hugging Face decoder through its registered attention),
SASRec and LiGR. Inference only: no autograd graph is built.

Legend: N history positions, Q candidates, m of a micro-batch, H heads, G key-value heads, E and V widths of a
head's keys and values, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention

from hllm_torchrec.modules.attention.text import grouped_attention
from hllm_torchrec.modules.encoders.base import UserEncoder, pack_rows
from hllm_torchrec.modules.encoders.softmax import SoftmaxEncoder
from hllm_torchrec.modules.encoders.user_llm import Queries, UserLLM
from hllm_torchrec.modules.hstu.attention import plan_layout, pointwise_attention
from hllm_torchrec.modules.hstu.blocks import pairs_without_own_keys
from hllm_torchrec.modules.hstu.eager import block_attention
from hllm_torchrec.modules.hstu.layer import HSTU, HSTULayer
from hllm_torchrec.modules.hstu.layout import keys_seen

MICRO_BATCH = 256
"""Default number of candidates computed at a time."""

OWN_COLUMNS = 8
"""Columns added to keys and values for a candidate's own key: one is needed, CUDA kernels need a multiple of 8."""

Encoder = UserLLM | UserEncoder
ScoreCandidates = Callable[[Tensor], Tensor]
"""Function from x [m, D] of a micro-batch of candidates to q [m, D]."""


@dataclass(frozen=True)
class KeysValues:
    """Keys [N, G, E] (with rotary embedding applied, if the encoder has it) and values [N, G, V] of one layer."""

    keys: Tensor
    values: Tensor

    def first(self, number: int) -> "KeysValues":
        """Return those of the first `number` positions."""
        return KeysValues(self.keys[:number], self.values[:number])

    def followed_by(self, keys: Tensor, values: Tensor) -> "KeysValues":
        """Return a copy with more positions at the end: keys [n, G, E], values [n, G, V]."""
        return KeysValues(torch.cat([self.keys, keys]), torch.cat([self.values, values]))


@dataclass(frozen=True)
class HistoryCache:
    """Keys and values of every layer for one user's history, and the times [N] of its events, int64 seconds."""

    layers: tuple[KeysValues, ...]
    times: Tensor

    @property
    def length(self) -> int:
        """Number of events, N."""
        return self.times.numel()

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.times.nbytes + sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)


@torch.no_grad()
def read_history(encoder: Encoder, x_ND: Tensor, times: Tensor, cache: HistoryCache | None = None) -> HistoryCache:
    """Run the history through the encoder once and return its keys and values.

    Args:
        encoder: in evaluation mode.
        x_ND: features of the events, oldest first; no rows for a user without history.
        times: [N] int64 seconds.
        cache: of the events before these, which are not computed again; it is not modified.

    Returns:
        The cache of all events, equal (up to rounding) to that of a single call with all of them.

    Raises:
        ValueError: an encoder that is in training mode or is not supported; events before the last cached one; a
            cache shorter than HSTU's context prefix, whose positions see one another.
    """
    check_encoder(encoder)
    before = 0 if cache is None else cache.length
    joined = times if cache is None else torch.cat([cache.times, times])
    if before and times.numel() and int(times[0]) < int(joined[before - 1]):
        raise ValueError(
            f"times[0] is {int(times[0])}, before the last cached event at {int(joined[before - 1])}: append "
            "events in order of time, or read the whole history again"
        )
    if cache is not None and x_ND.shape[0] == 0:
        return cache
    # An empty cache has nothing to attend to, and no mask of its own: read as without one.
    if before == 0:
        cache = None
    # A user without history still needs empty keys and values of the right shapes: run one zero row, and drop it.
    x_ND, kept = (x_ND, joined.numel()) if x_ND.shape[0] else (x_ND.new_zeros(1, encoder.width), 0)
    moments = joined if kept else joined.new_zeros(1)
    if isinstance(encoder, HSTU):
        layers = _read_pointwise(encoder, x_ND, moments, cache)
    else:
        layers = _read_softmax(encoder, x_ND, cache)
    return HistoryCache(tuple(layer.first(kept) for layer in layers), joined)


@torch.no_grad()
def begin_request(encoder: Encoder, cache: HistoryCache, time: int, visible: int | None = None) -> ScoreCandidates:
    """Compute once what all candidates of a request share; return the function that scores a micro-batch.

    time: seconds of the request; visible: number of events, from the oldest, that it sees (None: all).

    Raises:
        ValueError: as `read_history`, or more events visible than are cached.
    """
    check_encoder(encoder)
    seen = cache.length if visible is None else visible
    if not 0 <= seen <= cache.length:
        raise ValueError(f"visible is {seen}: the cache has {cache.length} events; give 0 to {cache.length}")
    if isinstance(encoder, HSTU):
        return _open_pointwise(encoder, cache, time, seen)
    return _open_softmax(encoder, cache, seen)


def answer(
    encoder: Encoder,
    cache: HistoryCache,
    x_QD: Tensor,
    time: int,
    visible: int | None = None,
    micro_batch: int = MICRO_BATCH,
) -> Tensor:
    """Compute q [Q, D] of candidates x [Q, D]; the micro-batch bounds memory and changes values by rounding only.

    Raises:
        ValueError: as `begin_request`, or a micro-batch below 1.
    """
    if micro_batch < 1:
        raise ValueError(f"micro_batch is {micro_batch}: must be at least 1")
    ask = begin_request(encoder, cache, time, visible)
    output = torch.empty_like(x_QD)
    for part, target in zip(x_QD.split(micro_batch), output.split(micro_batch)):
        target.copy_(ask(part))
    return output


def check_encoder(encoder: Encoder) -> None:
    """Check that the encoder can score candidates against a cached history.

    Raises:
        ValueError: it is in training mode, has no cache, or its history depends on later events.
    """
    if encoder.training:
        raise ValueError("the user encoder is in training mode, in which it has dropout: call eval() first")
    if not isinstance(encoder, UserLLM | HSTU | SoftmaxEncoder):
        raise ValueError(
            f"user.encoder: {type(encoder).__name__} keeps no keys and values of a history; the User LLM, HSTU and "
            "encoders of attention (SoftmaxEncoder) do: score by `hllm evaluate`, or by its own forward pass"
        )
    # With either option an appended event changes the inputs of the events before it, so cached keys would be stale.
    if isinstance(encoder, UserEncoder) and (encoder.query_next_time or encoder.count_from_end):
        option = "time_of is 'next'" if encoder.query_next_time else "count_from is 'end'"
        raise ValueError(
            f"user.shape.{option}: a cached history would change with every new event; train with "
            f"{'event' if encoder.query_next_time else 'start'!r}"
        )


# --- softmax encoders ------------------------------------------------------------------------------------


class _ReadPlan:
    """A causal `TextPlan` for n rows after a cached history; collects each layer's keys and values."""

    def __init__(self, cache: HistoryCache | None, new: int, device: torch.device) -> None:
        self.before = 0 if cache is None else cache.length
        self.cached = None if cache is None else cache.layers
        self.position_ids = torch.arange(self.before, self.before + new, device=device)[None]
        self.longest = self.before + new
        self.layers: list[KeysValues] = []
        self.mask = None
        # is_causal of SDPA aligns rows and keys at the top left, which is wrong after cached keys: the mask is
        # explicit.
        if self.before:
            self.mask = torch.ones(new, self.longest, dtype=torch.bool, device=device).tril(self.before)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
        """See `TextPlan`; called once per layer, in their order."""
        # The plan is not told which layer calls it: layers run in order, so it is the next one.
        own = KeysValues(key, value)
        layer = own if self.cached is None else self.cached[len(self.layers)].followed_by(key, value)
        self.layers.append(layer)
        q, k, v = query[None], layer.keys[None], layer.values[None]
        return grouped_attention(q, k, v, self.mask, self.mask is None, scaling, dropout)


class _RequestPlan:
    """A `TextPlan` for m candidates, each of which sees the history and itself.

    layers: keys [1, G, 1 + N, E + 8] and values [1, G, 1 + N, V + 8] of each layer, from `_with_own_key`.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]], number: int, visible: int) -> None:
        self.remaining = iter(layers)
        # A candidate comes right after the visible history; candidates share this position, as none sees another.
        self.position_ids = torch.full((1, number), visible, device=layers[0][0].device)
        self.longest = visible + 1

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
        """See `TextPlan`; called once per layer, in their order.

        Each candidate has a different own key, which attention kernels do not support. So one shared key stands for
        it: (0, ..., 0, 1), whose product with the extended query (q, q . k_own) is the own score. Its value
        (0, ..., 0, 1) makes an extra column of the output the softmax weight of the own value, which is then added.
        So any kernel will do, without a mask and without the scores in memory.
        """
        keys, values = next(self.remaining)
        (number, heads, width), groups = query.shape, key.shape[1]
        by_group = query.view(number, groups, heads // groups, width)
        # The own score q . k_own; with grouped queries, `heads // groups` query heads share an own key.
        own = (by_group * key[:, :, None]).sum(-1).view(number, heads, 1)
        asking = torch.cat([query, own, own.new_zeros(number, heads, OWN_COLUMNS - 1)], dim=-1)
        # Candidates are the queries of one batch entry: each sees all keys, none sees another candidate.
        found = _attention(asking.transpose(0, 1)[None], keys, values, scaling, dropout)[0].transpose(0, 1)
        # The first extra column: the history's values are zero there, so it is the weight of the own key alone.
        weight = found[..., value.shape[2]].view(number, groups, -1, 1)
        return found[..., : value.shape[2]] + (weight * value[:, :, None]).reshape(number, heads, -1)


def _attention(q: Tensor, k: Tensor, v: Tensor, scaling: float, dropout: float) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    return scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling, enable_gqa=groups > 1)


def _with_own_key(layer: KeysValues, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Extend keys and values by 8 columns, and put the key that stands for a candidate's own in front.

    keys [N, G, E] -> [1, G, 1 + N, E + 8], values [N, G, V] -> [1, G, 1 + N, V + 8].
    """

    def extended(x_NGE: Tensor) -> Tensor:
        number, groups, width = x_NGE.shape
        whole = torch.zeros(1, groups, number + 1, width + OWN_COLUMNS, device=x_NGE.device, dtype=dtype)
        whole[0, :, 1:, :width] = x_NGE.transpose(0, 1)
        whole[0, :, 0, width] = 1
        return whole

    return extended(layer.keys), extended(layer.values)


def _read_softmax(encoder: Encoder, x_ND: Tensor, cache: HistoryCache | None) -> list[KeysValues]:
    plan = _ReadPlan(cache, x_ND.shape[0], x_ND.device)
    _run_softmax(encoder, x_ND, plan)
    return plan.layers


def _open_softmax(encoder: Encoder, cache: HistoryCache, visible: int) -> ScoreCandidates:
    layers = [_with_own_key(layer.first(visible), layer.keys.dtype) for layer in cache.layers]

    @torch.no_grad()
    def ask(x_mD: Tensor) -> Tensor:
        return _run_softmax(encoder, x_mD, _RequestPlan(layers, x_mD.shape[0], visible))

    return ask


def _run_softmax(encoder: Encoder, x_SD: Tensor, plan: _ReadPlan | _RequestPlan) -> Tensor:
    """Run all layers of a softmax encoder: [S, D] -> [S, D]."""
    if isinstance(encoder, UserLLM):
        return encoder.encode(x_SD, plan)
    assert isinstance(encoder, SoftmaxEncoder), f"{type(encoder).__name__} has no cache"
    x_SD = encoder.add_positions(x_SD, plan.position_ids[0])
    for layer in encoder.layers:
        x_SD = layer(x_SD, plan)
    output: Tensor = encoder.final_norm(x_SD)
    return output


# --- HSTU ------------------------------------------------------------------------------------------------


def _read_pointwise(encoder: HSTU, x_ND: Tensor, times: Tensor, cache: HistoryCache | None) -> list[KeysValues]:
    # Positions inside the prefix see later ones of it: with an incomplete prefix their cached values would change.
    if cache is not None and cache.length < encoder.rules.prefix:
        raise ValueError(
            f"the cache has {cache.length} events, fewer than user.shape.prefix {encoder.rules.prefix}, whose "
            "positions see one another: read the whole history again"
        )
    rows = pack_rows(torch.tensor([0, times.numel()], device=times.device), times.numel(), times)
    if cache is None:
        layout = plan_layout(rows, encoder.rules, encoder.shape.backend)
        x_ND, layers = encoder.add_positions(x_ND, rows.positions), []
        for layer in _layers(encoder):
            u, v, q, k = layer.project(x_ND)
            attended = pointwise_attention(q, k, v, layout, layer.bias, layer.backend)
            x_ND = layer.combine(x_ND, u, attended.flatten(1), rows.sequences)
            layers.append(KeysValues(k, v))
        return layers
    return _extend_pointwise(encoder, x_ND, times, cache)


def _extend_pointwise(encoder: HSTU, x_nD: Tensor, times: Tensor, cache: HistoryCache) -> list[KeysValues]:
    """Append the keys and values of new events x [n, D] to those of each layer; times [N + n]."""
    rules = encoder.rules
    rows = pack_rows(torch.tensor([0, times.numel()], device=times.device), times.numel(), times)
    asking = torch.arange(cache.length, times.numel(), device=times.device)
    block = pairs_without_own_keys(rows, rules, asking, torch.arange(times.numel(), device=times.device))
    divisor = _divisor(encoder, keys_seen(rows, rules)[asking])
    x_nD, layers = encoder.add_positions(x_nD, asking), []
    for layer, cached in zip(_layers(encoder), cache.layers, strict=True):
        u, v, q, k = layer.project(x_nD)
        whole = cached.followed_by(k, v)
        bias = None if layer.bias is None else layer.bias(block.distance, block.bucket)
        # Own keys are masked in `block` and added here, as for queries; the division by n_i comes after both.
        seen = block_attention(q[None], whole.keys[None], whole.values[None], block.hidden, bias, rules.alpha)[0]
        attended = (seen + _own_key(layer, q, k, v, rules.alpha)) / divisor
        x_nD = layer.combine(x_nD, u, attended.flatten(1), rows.sequences)
        layers.append(whole)
    return layers


def _open_pointwise(encoder: HSTU, cache: HistoryCache, time: int, visible: int) -> ScoreCandidates:
    """Begin a request: all its candidates have one position and time, so they share the visible keys and the biases."""
    rules, device = encoder.rules, cache.times.device
    one = torch.tensor([visible], device=device)
    # One query stands for all candidates: mask, biases and n_i depend on position and time only, not on the item.
    query = Queries(one, torch.tensor([0, 1], device=device), one, torch.tensor([time], device=device))
    rows = pack_rows(torch.tensor([0, visible], device=device), visible, cache.times[:visible], query)
    block = pairs_without_own_keys(rows, rules, one, torch.arange(visible, device=device))
    shown = torch.nonzero(~block.hidden[0, 0]).flatten()
    divisor = _divisor(encoder, keys_seen(rows, rules)[-1:])
    layers = []
    for layer, cached in zip(_layers(encoder), cache.layers, strict=True):
        # Under a window only some events are visible: the others are left out here, once, instead of masked each time.
        keys, values = cached.keys.index_select(0, shown), cached.values.index_select(0, shown)
        bias = None if layer.bias is None else layer.bias(block.distance, block.bucket)[:, :, shown]
        added = keys.new_zeros(1, 1, 1) if bias is None else bias.to(keys.dtype)
        # Contiguous and transposed for the products of every micro-batch: keys [H, E, N], values [H, N, V].
        layers.append((layer, keys.permute(1, 2, 0).contiguous(), values.transpose(0, 1).contiguous(), added))

    @torch.no_grad()
    def ask(x_mD: Tensor) -> Tensor:
        x_mD = encoder.add_positions(x_mD, one)
        for layer, keys, values, added in layers:
            u, v, q, k = layer.project(x_mD)
            scores = torch.baddbmm(added, q.transpose(0, 1), keys, alpha=rules.alpha)
            # In place: there is no graph, so nothing needs the scores again.
            seen = torch.bmm(F.silu(scores, inplace=True), values).transpose(0, 1)
            attended = (seen + _own_key(layer, q, k, v, rules.alpha)) / divisor
            x_mD = layer.combine(x_mD, u, attended.flatten(1), one)
        return x_mD

    return ask


def _layers(encoder: HSTU) -> list[HSTULayer]:
    return [layer for layer in encoder.layers if isinstance(layer, HSTULayer)]


def _own_key(layer: HSTULayer, q: Tensor, k: Tensor, v: Tensor, alpha: float) -> Tensor:
    """Compute each row's contribution of its own key: [m, H, V]."""
    scores = (q * k).sum(-1) * alpha
    if layer.bias is not None:  # a row is at distance 0 of itself, in positions and in time
        scores = scores + (layer.bias.of_position[0] + layer.bias.of_time[0]).to(scores.dtype)
    return F.silu(scores)[:, :, None] * v


def _divisor(encoder: HSTU, seen: Tensor) -> Tensor:
    """Compute n_i of rows that see `seen` [m] keys: [m, 1, 1]."""
    number = seen if encoder.rules.divide_by is None else torch.full_like(seen, encoder.rules.divide_by)
    return number[:, None, None].to(next(encoder.parameters()).dtype)
