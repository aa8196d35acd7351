"""User encoders with softmax attention: base class, and the attention layer of those without a Hugging Face model.

Legend: S packed rows, D width, H heads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hllm_torchrec.common.errors import ArgumentError
from hllm_torchrec.modules.attention.cached_softmax import ReadPlan, RequestPlan, RequestsPlan, with_own_key
from hllm_torchrec.modules.attention.keys_values import HistoryCache, KeysValues, ScoreCandidates, ScoreRequests
from hllm_torchrec.modules.attention.packed import AttentionPlan, packed_attention, plan_attention
from hllm_torchrec.modules.attention.text import TextPlan
from hllm_torchrec.modules.encoders.base import PackedRows, UserEncoder, dense_flops


def plan_packed_rows(rows: PackedRows) -> AttentionPlan:
    """Attention plan of packed rows: causal for the history; queries see their visible positions and themselves."""
    if rows.visible.numel() == 0:
        return plan_attention(rows.seq_offsets, rows.history)
    return plan_attention(rows.seq_offsets, rows.history, rows.query_offsets, rows.visible)


class PackedSelfAttention(nn.Module):
    """Multi-head attention softmax(Q K^T / sqrt(D / H)) V; all four projections have biases, as in torch.nn.

    Args:
        width: D.
        heads: H.
        dropout: dropout of the attention weights, a probability.

    Raises:
        ValueError: the number of heads does not divide the width.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if width % heads:
            raise ArgumentError(f"heads: {heads}: does not divide the width {width}; give another number")
        self.heads, self.dropout = heads, dropout
        self.scaling = (width // heads) ** -0.5
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, query_SD: Tensor, key_value_SD: Tensor, plan: AttentionPlan) -> Tensor:
        """Queries from `query_SD`, keys and values from `key_value_SD`: [S, D] -> [S, D]."""
        q, k, v = (self._heads(x) for x in (self.query(query_SD), self.key(key_value_SD), self.value(key_value_SD)))
        dropout = self.dropout if self.training else 0.0
        mixed, _ = packed_attention(self, q, k, v, None, scaling=self.scaling, dropout=dropout, hllm_plan=plan)
        output: Tensor = self.out(mixed[0].flatten(1))
        return output

    def _heads(self, x_SD: Tensor) -> Tensor:
        # [1, H, S, D / H]: `packed_attention` has the interface of Hugging Face's attention functions.
        return x_SD.unflatten(1, (self.heads, -1)).transpose(0, 1)[None]


class SoftmaxEncoder(UserEncoder):
    """Stack of `layers`, each called with (rows, plan), and a `final_norm`; subclasses build both."""

    keeps_history = True
    final_norm: nn.Module

    def encode(self, x_SD: Tensor, rows: PackedRows) -> Tensor:
        """All layers and the last norm: [S, D] -> [S, D]."""
        return self.run_layers(x_SD, plan_packed_rows(rows))

    def run_layers(self, x_SD: Tensor, plan: AttentionPlan | TextPlan) -> Tensor:
        """All layers and the last norm: [S, D] -> [S, D]; plan: attention pattern of the rows."""
        for layer in self.layers:
            x_SD = self.run_layer(layer, x_SD, plan)
        output: Tensor = self.final_norm(x_SD)
        return output

    def read_history(self, x_ND: Tensor, times: Tensor, cache: HistoryCache | None) -> list[KeysValues]:
        """Keys and values of every layer: see `UserEncoder.read_history`."""
        plan = ReadPlan(cache, x_ND.shape[0], x_ND.device)
        self.run_layers(self.add_positions(x_ND, plan.position_ids[0]), plan)
        return plan.layers

    def begin_request(self, cache: HistoryCache, time: int, visible: int) -> ScoreCandidates:
        """Outputs of candidates: see `UserEncoder.begin_request`."""
        layers = [with_own_key(layer.first(visible), layer.keys.dtype) for layer in cache.layers]

        @torch.no_grad()
        def ask(x_mD: Tensor) -> Tensor:
            plan = RequestPlan(layers, x_mD.shape[0], visible)
            return self.run_layers(self.add_positions(x_mD, plan.position_ids[0]), plan)

        return ask

    def begin_requests(
        self, caches: Sequence[HistoryCache], times: Sequence[int], visible: Sequence[int]
    ) -> ScoreRequests:
        """Outputs of the candidates of several requests: see `UserEncoder.begin_requests`."""
        of_request = [
            [layer.first(seen) for layer in cache.layers] for cache, seen in zip(caches, visible, strict=True)
        ]
        layers = list(zip(*of_request, strict=True))

        @torch.no_grad()
        def ask(x_mD: Tensor, counts: Sequence[int]) -> Tensor:
            plan = RequestsPlan(layers, counts, x_mD.device)
            return self.run_layers(self.add_positions(x_mD, plan.position_ids[0]), plan)

        return ask

    def flops(self, tokens: int, keys: int) -> float:
        """FLOPs of a forward pass over `tokens` rows that see `keys` keys in total."""
        attention = 4.0 * self.width * len(self.layers) * keys  # scores and weighted sums
        return tokens * dense_flops([self.layers]) + attention


def initialize_linear(module: nn.Module) -> None:
    """Initialize linear layers: matrices Xavier normal, biases 0, as in the public SASRec code."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_normal_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
