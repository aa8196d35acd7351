"""Centers and scales item embeddings per dimension, by statistics measured before training."""

import torch
from torch import Tensor, nn


class Standardize(nn.Module):
    """y = (x - mean) / scale with scale = std sqrt(E), so |y| is about 1. The identity until `measure` is called.

    Pooled embeddings of a language model are nearly parallel: those of SmolLM2 on MovieLens titles have a mean norm of
    27.4, of which 27.0 are common to all. Projected and added to an ID's vector they dominate it, cosines between items
    start near 1, and gradients are largest in the one direction without information.

    Buffers (in checkpoints): mean, scale [E] float32; measured, bool: whether `measure` was called.
    """

    mean: Tensor
    scale: Tensor
    measured: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.register_buffer("measured", torch.tensor(False))

    @torch.no_grad()
    def measure(self, x: Tensor) -> None:
        """Set mean and scale from x [n, E], n at least 2; a dimension that does not vary becomes 0."""
        assert len(x) > 1, "a spread needs two embeddings"
        std = x.float().std(0)
        self.mean.copy_(x.float().mean(0))
        self.scale.copy_(torch.where(std > 0, std, torch.ones_like(std)) * len(std) ** 0.5)
        self.measured.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        """Standardize x [..., E], in the dtype of x."""
        return ((x - self.mean) / self.scale).to(x.dtype)
