"""User LLM: a decoder over a user's sequence of item features instead of words (HLLM, section "User LLM").

The backbone is any Hugging Face decoder (Llama, Mistral, Qwen, ...) without its word embeddings, with pretrained or
random weights. Query tokens (see `hllm_torchrec.modules.attention.packed`) implement both discriminative variants of
the paper's Figure 2: for late fusion the query is the learned [USER] vector, for early fusion the target item.
Time features are part of the input. Position ids start at 0 for every user; a query's position follows the positions
that it sees.

Legend: S packed rows, D width.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from hllm_torchrec.modules.attention.packed import AttentionPlan
from hllm_torchrec.modules.attention.text import TextPlan
from hllm_torchrec.modules.encoders.backbone import BackboneModule, backbone_flops
from hllm_torchrec.modules.encoders.softmax import SoftmaxEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class UserLLM(BackboneModule, SoftmaxEncoder):
    """A decoder over item features: see `UserEncoder.forward`.

    Args:
        backbone: from `build_backbone(..., word_embeddings=False)`.
        dropout: dropout of the inputs, a probability.
    """

    backbone: "PreTrainedModel"

    def __init__(self, backbone: "PreTrainedModel", dropout: float = 0.0) -> None:
        super().__init__(backbone.config.hidden_size, dropout)
        self.backbone = backbone

    def run_layers(self, x_SD: Tensor, plan: AttentionPlan | TextPlan) -> Tensor:
        """All layers and the last norm: [S, D] -> [S, D]."""
        return self.run_backbone(x_SD, plan)

    def flops(self, tokens: int, keys: int) -> float:
        """FLOPs of a forward pass over `tokens` rows that see `keys` keys in total."""
        return backbone_flops(self.backbone, tokens, keys)
