"""A light adapter: a trained residual bottleneck on top of embeddings that stay frozen."""

from torch import Tensor, nn


class Adapter(nn.Module):
    """y = x + W_up gelu(W_down norm(x)); W_up begins at zero, and so the adapter as the identity.

    Args:
        width: of x.
        bottleneck: of the bottleneck.
    """

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.down = nn.Linear(width, bottleneck)
        self.up = nn.Linear(bottleneck, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [n, E] -> [n, E]."""
        return x + self.up(nn.functional.gelu(self.down(self.norm(x))))
