"""Trained residual bottleneck on top of frozen embeddings."""

from torch import Tensor, nn


class Adapter(nn.Module):
    """y = x + W_up gelu(W_down norm(x)); W_up is initialized to zero, so the adapter starts as the identity.

    Args:
        width: E, the width of x.
        bottleneck: width of the bottleneck.
    """

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.down = nn.Linear(width, bottleneck)
        self.up = nn.Linear(bottleneck, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the adapter: x [n, E] -> [n, E]."""
        return x + self.up(nn.functional.gelu(self.down(self.norm(x))))
