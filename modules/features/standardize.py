"""Item embeddings centred and scaled, dimension by dimension, by what was measured before training."""

import torch
from torch import Tensor, nn


class Standardize(nn.Module):
    """y = (x - mean) / scale, scale = std sqrt(E): about 1 long. The identity until `measure` was shown embeddings.

    Pooled embeddings of a language model are nearly one vector: of SmolLM2's on MovieLens titles, 27.4 long on average,
    27.0 are common to all. Projected and added to an ID's vector they drown it, cosines between items begin near 1, and
    gradients are long in the one direction that tells nothing.

    Buffers, kept in checkpoints: mean, scale [E] float32; measured, bool: whether they are more than the identity.
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
        """Take mean and scale from x [n, E], n at least 2; a dimension that never varies becomes 0."""
        assert len(x) > 1, "a spread needs two embeddings"
        std = x.float().std(0)
        self.mean.copy_(x.float().mean(0))
        self.scale.copy_(torch.where(std > 0, std, torch.ones_like(std)) * len(std) ** 0.5)
        self.measured.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., E] -> [..., E], in x's dtype."""
        return ((x - self.mean) / self.scale).to(x.dtype)
