"""Pointwise attention of HSTU with a cached history.

Legend: N history positions, n new ones, m candidates of a micro-batch, H heads, V width of a head's values, D width.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from hllm_torchrec.modules.attention.keys_values import HistoryCache, KeysValues, ScoreCandidates
from hllm_torchrec.modules.encoders.base import Queries, pack_rows
from hllm_torchrec.modules.hstu.attention import plan_layout, pointwise_attention
from hllm_torchrec.modules.hstu.blocks import pairs_without_own_keys
from hllm_torchrec.modules.hstu.eager import block_attention
from hllm_torchrec.modules.hstu.layout import keys_seen

if TYPE_CHECKING:
    from hllm_torchrec.modules.hstu.layer import HSTU, HSTULayer


def read_pointwise(encoder: "HSTU", x_ND: Tensor, times: Tensor, cache: HistoryCache | None) -> list[KeysValues]:
    """Keys and values of every layer: see `UserEncoder.read_history`.

    Raises:
        ValueError: a cache shorter than the context prefix.
    """
    if cache is not None and cache.length < encoder.rules.prefix:
        raise ValueError(
            f"the cache has {cache.length} events, fewer than the context prefix of {encoder.rules.prefix}, whose "
            "positions see one another: read the complete history again"
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


def _extend_pointwise(encoder: "HSTU", x_nD: Tensor, times: Tensor, cache: HistoryCache) -> list[KeysValues]:
    """Compute the new events x [n, D] only; returns each layer's keys and values of all events. times: [N + n]."""
    rules = encoder.rules
    rows = pack_rows(torch.tensor([0, times.numel()], device=times.device), times.numel(), times)
    new_rows = torch.arange(cache.length, times.numel(), device=times.device)
    # Pairs (new row, any other row); `_own_key` adds the rows' own keys, as for queries.
    block = pairs_without_own_keys(rows, rules, new_rows, torch.arange(times.numel(), device=times.device))
    divisor = _divisor(encoder, keys_seen(rows, rules)[new_rows])
    x_nD, layers = encoder.add_positions(x_nD, new_rows), []
    for layer, cached in zip(_layers(encoder), cache.layers, strict=True):
        u, v, q, k = layer.project(x_nD)
        joined = cached.followed_by(k, v)
        bias = None if layer.bias is None else layer.bias(block.distance, block.bucket)
        seen = block_attention(q[None], joined.keys[None], joined.values[None], block.hidden, bias, rules.alpha)[0]
        attended = (seen + _own_key(layer, q, k, v, rules.alpha)) / divisor
        x_nD = layer.combine(x_nD, u, attended.flatten(1), rows.sequences)
        layers.append(joined)
    return layers


def begin_pointwise(encoder: "HSTU", cache: HistoryCache, time: int, visible: int) -> ScoreCandidates:
    """Outputs of candidates: see `UserEncoder.begin_request`.

    All candidates have the same position and time, so they share one row of biases and see the same keys.
    """
    rules, device = encoder.rules, cache.times.device
    one = torch.tensor([visible], device=device)
    # One query represents all candidates here: masks, biases and divisor do not depend on x, so x is a placeholder.
    query = Queries(one, torch.tensor([0, 1], device=device), one, torch.tensor([time], device=device))
    rows = pack_rows(torch.tensor([0, visible], device=device), visible, cache.times[:visible], query)
    block = pairs_without_own_keys(rows, rules, one, torch.arange(visible, device=device))
    shown = torch.nonzero(~block.hidden[0, 0]).flatten()
    divisor = _divisor(encoder, keys_seen(rows, rules)[-1:])
    layers = []
    for layer, cached in zip(_layers(encoder), cache.layers, strict=True):
        # The window may hide a part of the history; keys that no candidate sees are dropped.
        keys, values = cached.keys.index_select(0, shown), cached.values.index_select(0, shown)
        bias = None if layer.bias is None else layer.bias(block.distance, block.bucket)[:, :, shown]
        added = keys.new_zeros(1, 1, 1) if bias is None else bias.to(keys.dtype)
        layers.append((layer, keys.permute(1, 2, 0).contiguous(), values.transpose(0, 1).contiguous(), added))

    @torch.no_grad()
    def ask(x_mD: Tensor) -> Tensor:
        x_mD = encoder.add_positions(x_mD, one)
        for layer, keys, values, added in layers:
            u, v, q, k = layer.project(x_mD)
            scores = torch.baddbmm(added, q.transpose(0, 1), keys, alpha=rules.alpha)
            seen = torch.bmm(F.silu(scores, inplace=True), values).transpose(0, 1)
            attended = (seen + _own_key(layer, q, k, v, rules.alpha)) / divisor
            x_mD = layer.combine(x_mD, u, attended.flatten(1), one)
        return x_mD

    return ask


def _layers(encoder: "HSTU") -> "list[HSTULayer]":
    return list(encoder.layers)  # type: ignore[arg-type]


def _own_key(layer: "HSTULayer", q: Tensor, k: Tensor, v: Tensor, alpha: float) -> Tensor:
    """Contribution of each row's own key to its output: [m, H, V]."""
    scores = (q * k).sum(-1) * alpha
    if layer.bias is not None:  # both distances, in positions and in time, are 0
        scores = scores + (layer.bias.of_position[0] + layer.bias.of_time[0]).to(scores.dtype)
    return F.silu(scores)[:, :, None] * v


def _divisor(encoder: "HSTU", seen: Tensor) -> Tensor:
    """Divisor n_i of rows that see `seen` [m] keys: [m, 1, 1]."""
    number = seen if encoder.rules.divide_by is None else torch.full_like(seen, encoder.rules.divide_by)
    return number[:, None, None].to(next(encoder.parameters()).dtype)
