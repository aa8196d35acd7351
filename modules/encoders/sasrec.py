"""SASRec user encoder: self-attentive sequential recommendation (Kang and McAuley, arXiv 1808.09781).

    x = dropout(item + position);  blocks of causal self-attention and a point-wise ReLU network;  LN

Variants of normalization (`SASRecShape.norm`):

    public: q = LN(x);  x = q + MHA(q, x, x);  x = LN(x);  x = x + FFN(x)      (the authors' code)
    pre:    x = x + MHA(LN(x));  x = x + FFN(LN(x))                            (the paper's text)
    post:   x = LN(x + MHA(x));  x = LN(x + FFN(x))

Differences from the public code: positions are counted from the sequence's start unless `count_from` is "end", so that
the state at a position does not depend on the number of later events; inputs are not multiplied by sqrt(D), because the
initial scale of their tables determines their norm.

Legend: S packed rows, D width.
"""

from torch import Tensor, nn

from hllm_torchrec.common.errors import ArgumentError
from hllm_torchrec.modules.attention.packed import AttentionPlan
from hllm_torchrec.modules.encoders.shapes import SASRecShape, attention_dropout
from hllm_torchrec.modules.encoders.softmax import PackedSelfAttention, SoftmaxEncoder, initialize_linear

NORMS = ("public", "pre", "post")
NORM_EPS = 1e-8


class SASRecBlock(nn.Module):
    """One block: attention, then the point-wise network."""

    def __init__(self, shape: SASRecShape) -> None:
        super().__init__()
        hidden = shape.hidden or shape.width
        self.norm = shape.norm
        self.attention_norm = nn.LayerNorm(shape.width, NORM_EPS)
        self.attention = PackedSelfAttention(shape.width, shape.heads, attention_dropout(shape))
        self.attention_dropout = nn.Dropout(0.0 if shape.norm == "public" else shape.dropout)
        self.forward_norm = nn.LayerNorm(shape.width, NORM_EPS)
        self.feed_forward = nn.Sequential(
            nn.Linear(shape.width, hidden),
            nn.ReLU(),
            nn.Dropout(shape.dropout),
            nn.Linear(hidden, shape.width),
            nn.Dropout(shape.dropout),
        )

    def forward(self, x_SD: Tensor, plan: AttentionPlan) -> Tensor:
        """[S, D] -> [S, D]."""
        if self.norm == "public":
            queries = self.attention_norm(x_SD)
            x_SD = self.forward_norm(queries + self.attention(queries, x_SD, plan))
            return x_SD + self.feed_forward(x_SD)
        if self.norm == "pre":
            normed = self.attention_norm(x_SD)
            x_SD = x_SD + self.attention_dropout(self.attention(normed, normed, plan))
            return x_SD + self.feed_forward(self.forward_norm(x_SD))
        x_SD = self.attention_norm(x_SD + self.attention_dropout(self.attention(x_SD, x_SD, plan)))
        output: Tensor = self.forward_norm(x_SD + self.feed_forward(x_SD))
        return output


class SASRec(SoftmaxEncoder):
    """A stack of SASRec blocks: see `UserEncoder.forward`.

    Args:
        shape: see `SASRecShape`.
        dropout: dropout of the inputs, a probability.

    Raises:
        ValueError: an unknown `norm`, or the number of heads does not divide the width.
    """

    def __init__(self, shape: SASRecShape, dropout: float = 0.0) -> None:
        super().__init__(shape.width, dropout, shape.max_positions, count_from_end=shape.count_from == "end")
        if shape.norm not in NORMS:
            raise ArgumentError(f"norm: {shape.norm!r}: must be one of {', '.join(NORMS)}")
        self.layers = nn.ModuleList(SASRecBlock(shape) for _ in range(shape.layers))
        self.final_norm = nn.Identity() if shape.norm == "post" else nn.LayerNorm(shape.width, NORM_EPS)
        initialize_linear(self)
