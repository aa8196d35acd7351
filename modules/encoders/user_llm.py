"""User LLM: reads a user's sequence of item features, without words (HLLM, section "User LLM").

Any Hugging Face decoder (Llama, Mistral, Qwen, ...) without its word embeddings, from pretrained weights or
from scratch. Query tokens (see `hllm_torchrec.modules.attention.packed`) serve both discriminative variants of the
paper's Figure 2: for late fusion the query is the learned [USER] vector, for early fusion the target item.

Every user encoder has this one interface, so HSTU or SASRec stand in its place:
    forward(x_TD, seq_offsets, timestamps, queries, next_times) -> (h_TD, q_QD)

Legend: B users, T packed history positions, Q query tokens, D width.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hllm_torchrec.modules.attention.packed import AttentionPlan, plan_attention
from hllm_torchrec.modules.attention.text import TextPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Queries:
    """Query tokens of a packed batch.

    x_QD: [Q, D] inputs; offsets: [B+1] int64, which queries are whose; visible: [Q] int64, how many positions
    of the user's history, from its start, each query sees; times: [Q] int64 seconds of the requests.
    """

    x_QD: Tensor
    offsets: Tensor
    visible: Tensor
    times: Tensor


class UserLLM(nn.Module):
    """A decoder over item features.

    Args:
        backbone: from `build_backbone(..., word_embeddings=False)`.
        dropout: applied to the inputs; the probability to zero an entry.
    """

    def __init__(self, backbone: "PreTrainedModel", dropout: float = 0.0) -> None:
        super().__init__()
        self.backbone = backbone
        self.dropout = nn.Dropout(dropout)
        self.width: int = backbone.config.hidden_size

    def forward(
        self,
        x_TD: Tensor,
        seq_offsets: Tensor,
        timestamps: Tensor | None = None,
        queries: Queries | None = None,
        next_times: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x_TD [T, D] packed history -> h_TD [T, D] (h_i sees positions up to i) and q_QD [Q, D].

        seq_offsets: [B+1] int64. `timestamps` and `next_times` [T] are for encoders with a time bias (HSTU);
        here time is part of the input. Position ids start at 0 for every user; a query stands right after what it sees.
        """
        del timestamps, next_times
        total = x_TD.shape[0]
        inputs = x_TD if queries is None else torch.cat([x_TD, queries.x_QD])
        if inputs.shape[0] == 0:
            return self._dummy_forward(inputs), inputs
        offsets, visible = (None, None) if queries is None else (queries.offsets, queries.visible)
        hidden = self.encode(inputs, plan_attention(seq_offsets, total, offsets, visible))
        return hidden[:total], hidden[total:]

    def encode(self, inputs: Tensor, plan: AttentionPlan | TextPlan) -> Tensor:
        """All layers over packed rows [S, D] -> [S, D]; the plan says who sees whom."""
        output = self.backbone(
            inputs_embeds=self.dropout(inputs)[None],
            position_ids=plan.position_ids,
            use_cache=False,
            hllm_plan=plan,
        )
        return output.last_hidden_state[0]

    def _dummy_forward(self, inputs: Tensor) -> Tensor:
        """Run the layers on one zero and keep nothing of it: [0, D], with a graph through every weight.

        A rank without users must do so, because FSDP's collectives and the tables' backward need every rank.
        The zero is the sum of the inputs [0, D] that there are not: the backward pass then goes on to where
        they come from, and meets the collectives in the other ranks' order.
        """
        plan = plan_attention(torch.tensor([0, 1], device=inputs.device), 1)
        return self.encode(inputs.sum(0, keepdim=True), plan)[:0]
