"""LiGR user encoder: the transformer of eSASRec (arXiv 2508.06450), after LiGR (arXiv 2502.03417).

    x = x + sigmoid(W1 x + b1) * dropout(MHA(LN(x)))
    x = x + sigmoid(W2 x + b2) * dropout(FFN(LN(x)))        FFN: SwiGLU, 4 x width by default

Each sublayer's output is multiplied by a gate computed from the sublayer's input x. eSASRec is a stack of such layers
over item IDs with learned positions, trained to predict each next item with a sampled softmax.

Legend: S packed rows, D width.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from hllm_torchrec.modules.attention.packed import AttentionPlan
from hllm_torchrec.modules.encoders.shapes import LiGRShape, attention_dropout
from hllm_torchrec.modules.encoders.softmax import PackedSelfAttention, SoftmaxEncoder, initialize_linear


class SwiGLU(nn.Module):
    """out(dropout(silu(gate x) * up x)), without biases."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.out = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_SD: Tensor) -> Tensor:
        """[S, D] -> [S, D]."""
        output: Tensor = self.out(self.dropout(F.silu(self.gate(x_SD)) * self.up(x_SD)))
        return output


class LiGRLayer(nn.Module):
    """One layer: gated attention, then a gated feed-forward network."""

    def __init__(self, shape: LiGRShape) -> None:
        super().__init__()
        width = shape.width
        self.attention_norm, self.forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = PackedSelfAttention(width, shape.heads, attention_dropout(shape))
        self.feed_forward = SwiGLU(width, shape.hidden or 4 * width, shape.dropout)
        self.attention_gate, self.forward_gate = nn.Linear(width, width), nn.Linear(width, width)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x_SD: Tensor, plan: AttentionPlan) -> Tensor:
        """[S, D] -> [S, D]."""
        normed = self.attention_norm(x_SD)
        mixed = self.dropout(self.attention(normed, normed, plan))
        x_SD = x_SD + self.attention_gate(x_SD).sigmoid() * mixed
        return x_SD + self.forward_gate(x_SD).sigmoid() * self.dropout(self.feed_forward(self.forward_norm(x_SD)))


class LiGR(SoftmaxEncoder):
    """A stack of LiGR layers and a last norm: see `UserEncoder.forward`.

    Args:
        shape: see `LiGRShape`.
        dropout: dropout of the inputs, a probability.

    Raises:
        ValueError: the number of heads does not divide the width.
    """

    def __init__(self, shape: LiGRShape, dropout: float = 0.0) -> None:
        super().__init__(shape.width, dropout, shape.max_positions, count_from_end=shape.count_from == "end")
        self.layers = nn.ModuleList(LiGRLayer(shape) for _ in range(shape.layers))
        self.final_norm = nn.LayerNorm(shape.width)
        initialize_linear(self)
