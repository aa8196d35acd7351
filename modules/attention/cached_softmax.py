"""Softmax attention with a cached history: plans for encoding events, and for scoring candidates of requests.

Legend: R requests, N history positions, n new ones, m candidates of a micro-batch, G key-value heads, E and V widths of
a head's keys and values.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from hllm_torchrec.modules.attention.keys_values import HistoryCache, KeysValues
from hllm_torchrec.modules.attention.text import grouped_attention

OWN_COLUMNS = 8
"""Columns added to keys and values to represent a candidate's own key (`RequestPlan.attend`). One column would be
enough, but CUDA kernels require widths that are multiples of 8."""


class ReadPlan:
    """Causal `TextPlan` for n rows that follow a cached history; records the keys and values of each layer."""

    def __init__(self, cache: HistoryCache | None, new: int, device: torch.device) -> None:
        self.before = 0 if cache is None else cache.length
        self.cached = None if cache is None else cache.layers
        self.position_ids = torch.arange(self.before, self.before + new, device=device)[None]
        self.longest = self.before + new
        self.layers: list[KeysValues] = []
        self.mask = None
        if self.before:  # new row i sees all cached positions and new rows 0..i; without a cache is_causal suffices
            self.mask = torch.ones(new, self.longest, dtype=torch.bool, device=device).tril(self.before)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
        """See `TextPlan`; called once per layer, in layer order."""
        # Each call appends one layer, so the number of recorded layers is the index of the current one.
        new = KeysValues(key, value)
        layer = new if self.cached is None else self.cached[len(self.layers)].followed_by(key, value)
        self.layers.append(layer)
        q, k, v = query[None], layer.keys[None], layer.values[None]
        return grouped_attention(q, k, v, self.mask, self.mask is None, scaling, dropout)


class RequestPlan:
    """`TextPlan` for m candidates that each see the history and themselves.

    layers: for each layer (keys [1, G, 1 + N, E + 8], values [1, G, 1 + N, V + 8]), from `with_own_key`.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]], number: int, visible: int) -> None:
        self.remaining = iter(layers)
        self.position_ids = torch.full((1, number), visible, device=layers[0][0].device)
        self.longest = visible + 1

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
        """See `TextPlan`; called once per layer, in layer order.

        Each candidate also attends to itself, so it has a key that no other row sees, and attention kernels have no
        per-row keys. Therefore one shared key (0, ..., 0, 1) represents the candidate's key k: its score with the
        extended query (q, q . k) is q . k. The value of the shared key is (0, ..., 0, 1) too, so the added column of
        the output is the attention weight of the candidate's value, which is then added with this weight. This needs no
        mask, and the scores are not materialized.
        """
        keys, values = next(self.remaining)
        (number, heads, width), groups = query.shape, key.shape[1]
        # Grouped queries: heads / groups query heads share each key-value head.
        by_group = query.view(number, groups, heads // groups, width)
        own_score = (by_group * key[:, :, None]).sum(-1).view(number, heads, 1)
        extended = torch.cat([query, own_score, own_score.new_zeros(number, heads, OWN_COLUMNS - 1)], dim=-1)
        output = scaled_dot_product_attention(
            extended.transpose(0, 1)[None], keys, values, dropout_p=dropout, scale=scaling, enable_gqa=heads > groups
        )[0].transpose(0, 1)
        weight = output[..., value.shape[2]].view(number, groups, -1, 1)
        return output[..., : value.shape[2]] + (weight * value[:, :, None]).reshape(number, heads, -1)


class RequestsPlan:
    """`TextPlan` for the candidates of several requests; each candidate sees its request's history and itself.

    Linear layers compute the rows of all requests at once, and attention runs for one request after the other. If every
    request has one candidate (late fusion), attention is one padded call.

    layers: for each layer, the visible keys and values of each request. counts: number of candidates of each request.
    """

    def __init__(self, layers: Sequence[Sequence[KeysValues]], counts: Sequence[int], device: torch.device) -> None:
        self.remaining, self.counts = iter(layers), list(counts)
        seen = torch.tensor([one.keys.shape[0] for one in layers[0]])
        self.position_ids = seen.repeat_interleave(torch.tensor(self.counts))[None].to(device)
        self.longest = int(seen.max()) + 1
        self.single, self.mask = max(self.counts) == min(self.counts) == 1, None
        if self.single and int(seen.min()) < int(seen.max()):
            # [R, 1, 1, 1 + N]: column 0 is the candidate's own key, the others are the history's.
            self.mask = (torch.arange(self.longest) <= seen[:, None])[:, None, None].to(device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
        """See `TextPlan`; called once per layer, in layer order."""
        layer = next(self.remaining)
        if self.single:
            keys, values = (
                torch.cat([row[:, None], pad_sequence([getattr(one, name) for one in layer], batch_first=True)], 1)
                for row, name in ((key, "keys"), (value, "values"))
            )
            return grouped_attention(query[:, None], keys, values, self.mask, False, scaling, dropout)
        parts = zip(layer, *(x.split(self.counts) for x in (query, key, value)), strict=True)
        outputs = []
        for one, q, k, v in parts:
            plan = RequestPlan([with_own_key(one, q.dtype)], q.shape[0], one.keys.shape[0])
            outputs.append(plan.attend(q, k, v, scaling, dropout))
        return torch.cat(outputs)


def with_own_key(layer: KeysValues, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys [1, G, 1 + N, E + 8] and values [1, G, 1 + N, V + 8] of a layer; the first row represents the key and value
    of the candidate itself (`RequestPlan.attend`)."""

    def extended(x_NGE: Tensor) -> Tensor:
        number, groups, width = x_NGE.shape
        padded = torch.zeros(1, groups, number + 1, width + OWN_COLUMNS, device=x_NGE.device, dtype=dtype)
        padded[0, :, 1:, :width] = x_NGE.transpose(0, 1)
        padded[0, :, 0, width] = 1
        return padded

    return extended(layer.keys), extended(layer.values)
