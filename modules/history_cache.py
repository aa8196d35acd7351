"""M-FALCON: runs a user's history once and scores candidates against it in micro-batches (HSTU, section 3.4).

    cache = read_history(encoder, x_ND, times)               keys and values of every layer
    cache = read_history(encoder, more_nD, times, cache)     append events: only the new ones are computed
    q_QD  = answer(encoder, cache, x_QD, time)               candidates, `micro_batch` at a time

The results equal the packed pass of training (`Queries`): a candidate is a query that sees the history before it and
itself. So Q candidates after N events cost N^2 + N Q query-key pairs, instead of Q N^2 (one pass per candidate) or
(N + Q)^2 (one masked sequence), and memory beyond the cache is that of one micro-batch. With early fusion the queries
are the candidates; with late fusion there is one query, the [USER] vector.

Supported are HSTU (`hstu.cached_pointwise`) and all softmax encoders (`attention.cached_softmax`): the User LLM
(Hugging Face decoders, through the registered attention), SASRec and LiGR. Inference only: no autograd graph is built.

Legend: N history positions, Q candidates, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hllm_torchrec.common.errors import ArgumentError
from hllm_torchrec.modules.attention.keys_values import HistoryCache, ScoreCandidates, ScoreRequests
from hllm_torchrec.modules.encoders.base import UserEncoder

MICRO_BATCH = 256
"""Default number of candidates computed at a time."""


@torch.no_grad()
def read_history(encoder: UserEncoder, x_ND: Tensor, times: Tensor, cache: HistoryCache | None = None) -> HistoryCache:
    """Run the history through the encoder once and return its keys and values.

    Args:
        encoder: in evaluation mode.
        x_ND: features of the events, oldest first; no rows for a user without history.
        times: int64 seconds of these events.
        cache: cache of the earlier events, which are not computed again; it is not modified.

    Returns:
        The cache of all events, equal (up to rounding) to the result of a single call with all events.

    Raises:
        ValueError: the encoder is in training mode or not supported; an event is earlier than the last cached one; or
            the cache is shorter than HSTU's context prefix, whose positions see one another.
    """
    check_encoder(encoder)
    before = 0 if cache is None else cache.length
    joined = times if cache is None else torch.cat([cache.times, times])
    if before and times.numel() and int(times[0]) < int(joined[before - 1]):
        raise ValueError(
            f"times[0] is {int(times[0])}, before the last cached event at {int(joined[before - 1])}: append "
            "events in order of time, or read the complete history again"
        )
    if cache is not None and x_ND.shape[0] == 0:
        return cache
    # An empty cache is treated like None, because the code that extends a cache expects at least one key.
    if before == 0:
        cache = None
    # A user without history needs empty keys and values of the right shapes: run one zero row and drop its results.
    x_ND, length = (x_ND, joined.numel()) if x_ND.shape[0] else (x_ND.new_zeros(1, encoder.width), 0)
    read_times = joined if length else joined.new_zeros(1)
    layers = encoder.read_history(x_ND, read_times, cache)
    return HistoryCache(tuple(layer.first(length) for layer in layers), joined)


@torch.no_grad()
def begin_request(encoder: UserEncoder, cache: HistoryCache, time: int, visible: int | None = None) -> ScoreCandidates:
    """Do the computation that all candidates of a request share; return a function that scores micro-batches of them.

    time: seconds of the request; visible: number of events, from the oldest, that the request sees (None: all).

    Raises:
        ValueError: the encoder is in training mode or not supported, or `visible` is negative or exceeds the number of
            cached events.
    """
    check_encoder(encoder)
    seen = cache.length if visible is None else visible
    if not 0 <= seen <= cache.length:
        raise ValueError(f"visible is {seen}: the cache has {cache.length} events; give 0 to {cache.length}")
    return encoder.begin_request(cache, time, seen)


@torch.no_grad()
def begin_requests(
    encoder: UserEncoder, caches: Sequence[HistoryCache], times: Sequence[int], visible: Sequence[int]
) -> ScoreRequests:
    """Prepare several requests, each of one user; return a function that scores the candidates of all requests.

    The results are those of `begin_request`, up to rounding. times, visible: for each request, as in `begin_request`.

    Raises:
        ValueError: as `begin_request`.
    """
    check_encoder(encoder)
    for cache, seen in zip(caches, visible, strict=True):
        if not 0 <= seen <= cache.length:
            raise ValueError(f"visible is {seen}: the cache has {cache.length} events; give 0 to {cache.length}")
    return encoder.begin_requests(caches, times, visible)


def answer(
    encoder: UserEncoder,
    cache: HistoryCache,
    x_QD: Tensor,
    time: int,
    visible: int | None = None,
    micro_batch: int = MICRO_BATCH,
) -> Tensor:
    """Compute q [Q, D] of candidates x [Q, D]; the micro-batch limits memory and changes results only by rounding.

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


def check_encoder(encoder: UserEncoder) -> None:
    """Check that an encoder supports scoring with a cached history.

    Raises:
        ValueError: the encoder is in training mode, does not support caching, or computes a history from later events.
    """
    if encoder.training:
        raise ValueError("the user encoder is in training mode, in which it has dropout: call eval() first")
    if not encoder.keeps_history:
        raise ArgumentError(
            f"encoder: {type(encoder).__name__} cannot cache the keys and values of a history; the User LLM, HSTU and "
            "subclasses of SoftmaxEncoder can; score with `hllm evaluate`, or with the encoder's forward pass"
        )
    if encoder.query_next_time or encoder.count_from_end:
        option = "time_of: 'next'" if encoder.query_next_time else "count_from: 'end'"
        raise ArgumentError(
            f"{option}: a cached history would change with every new event; train with "
            f"{'event' if encoder.query_next_time else 'start'!r}"
        )
    if encoder.context_sees_history:
        raise ArgumentError(
            "prefix_mask: 'history': a cached history would change with every new event; train with 'context'"
        )
