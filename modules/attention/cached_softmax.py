"""Softmax attention against a cached history: the plans by which layers read events, and then candidates.

Legend: N history positions, n new ones, m candidates of a micro-batch, H heads, G key-value heads, E and V widths of a
head's keys and values.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hllm_torchrec.modules.attention.keys_values import HistoryCache, KeysValues
from hllm_torchrec.modules.attention.text import grouped_attention

OWN_COLUMNS = 8
"""Columns added to keys and values for a candidate's own key; one is needed, kernels on CUDA want a multiple of 8."""


class ReadPlan:
    """A `TextPlan` for n rows behind a cached history, causally; notes each layer's keys and values."""

    def __init__(self, cache: HistoryCache | None, new: int, device: torch.device) -> None:
        self.before = 0 if cache is None else cache.length
        self.cached = None if cache is None else cache.layers
        self.position_ids = torch.arange(self.before, self.before + new, device=device)[None]
        self.longest = self.before + new
        self.layers: list[KeysValues] = []
        self.mask = None
        if self.before:
            self.mask = torch.ones(new, self.longest, dtype=torch.bool, device=device).tril(self.before)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
        """See `TextPlan`; called once per layer, in their order."""
        own = KeysValues(key, value)
        layer = own if self.cached is None else self.cached[len(self.layers)].followed_by(key, value)
        self.layers.append(layer)
        q, k, v = query[None], layer.keys[None], layer.values[None]
        return grouped_attention(q, k, v, self.mask, self.mask is None, scaling, dropout)


class RequestPlan:
    """A `TextPlan` for m candidates that see a history and themselves.

    layers: (keys [1, G, 1 + N, E + 8], values likewise) from `with_own_key`.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]], number: int, visible: int) -> None:
        self.remaining = iter(layers)
        self.position_ids = torch.full((1, number), visible, device=layers[0][0].device)
        self.longest = visible + 1

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
        """See `TextPlan`; called once per layer, in their order.

        A candidate's own key is another for every row, which a kernel of attention does not know. So one key
        stands for it, (0, ..., 0, 1), which a query (q, q . k_own) scores as its own; its value, (0, ..., 0, 1),
        makes the last column of the output the weight of the own value. No mask, and no scores in memory.
        """
        keys, values = next(self.remaining)
        (number, heads, width), groups = query.shape, key.shape[1]
        by_group = query.view(number, groups, heads // groups, width)
        own = (by_group * key[:, :, None]).sum(-1).view(number, heads, 1)
        asking = torch.cat([query, own, own.new_zeros(number, heads, OWN_COLUMNS - 1)], dim=-1)
        found = _attention(asking.transpose(0, 1)[None], keys, values, scaling, dropout)[0].transpose(0, 1)
        weight = found[..., value.shape[2]].view(number, groups, -1, 1)
        return found[..., : value.shape[2]] + (weight * value[:, :, None]).reshape(number, heads, -1)


def _attention(q: Tensor, k: Tensor, v: Tensor, scaling: float, dropout: float) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    return scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling, enable_gqa=groups > 1)


def with_own_key(layer: KeysValues, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values [1, G, 1 + N, E + 8] with the key that stands for a candidate's own in front."""

    def extended(x_NGE: Tensor) -> Tensor:
        number, groups, width = x_NGE.shape
        whole = torch.zeros(1, groups, number + 1, width + OWN_COLUMNS, device=x_NGE.device, dtype=dtype)
        whole[0, :, 1:, :width] = x_NGE.transpose(0, 1)
        whole[0, :, 0, width] = 1
        return whole

    return extended(layer.keys), extended(layer.values)
