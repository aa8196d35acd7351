"""Standardization (per dimension) and whitening of item embeddings, by statistics measured before training.

Legend: n embeddings, E width of an embedding, D width of a projection.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Standardize(nn.Module):
    """y = (x - mean) / scale with scale = std sqrt(E), so |y| is about 1. The identity until `measure` is called.

    Pooled embeddings of a language model are nearly parallel: those of SmolLM2 for MovieLens titles have a mean norm of
    27.4, and their mean vector has a norm of 27.0. Without standardization they dominate the ID vector to which their
    projection is added, cosines between items start near 1, and gradients are largest along the common direction, which
    has no information.

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
        """Set mean and scale from x [n, E], n >= 2; the output is 0 in a dimension in which x does not vary."""
        assert len(x) > 1, "a spread needs two embeddings"
        std = x.float().std(0)
        self.mean.copy_(x.float().mean(0))
        self.scale.copy_(torch.where(std > 0, std, torch.ones_like(std)) * len(std) ** 0.5)
        self.measured.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        """Standardize x [..., E], in the dtype of x."""
        return ((x - self.mean) / self.scale).to(x.dtype)


class Whiten(nn.Module):
    """y = (x - mean) W with W = V diag((l + shrinkage mean(l))^-1/2) / sqrt(E). The identity until `measure` is called.

    V and l are the eigenvectors and eigenvalues of the covariance of x. With shrinkage 0 the entries of y would be
    uncorrelated and of equal variance; |y| is about 1. In embeddings of a frozen sentence encoder a few directions
    (topic, length, template) have most of the variance. After whitening, the directions that distinguish similar items
    contribute as much to a cosine (Su et al., arXiv 2103.15316; Hou et al., UniSRec, arXiv 2206.05941).

    Buffers (in checkpoints): mean [E], weight [E, E] float32; measured, bool: whether `measure` was called.
    """

    mean: Tensor
    weight: Tensor
    measured: Tensor

    def __init__(self, width: int, shrinkage: float = 0.1) -> None:
        super().__init__()
        self.shrinkage = shrinkage
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("weight", torch.eye(width))
        self.register_buffer("measured", torch.tensor(False))

    @torch.no_grad()
    def measure(self, x: Tensor) -> None:
        """Set mean and weight from x [n, E], n >= 2; if all embeddings are identical, the output is 0."""
        assert len(x) > 1, "a covariance needs two embeddings"
        # float64: eigenvalues of sentence embeddings span five orders of magnitude.
        wide = x.double()
        mean = wide.mean(0)
        variances, directions = torch.linalg.eigh(torch.cov(wide.T))
        variances = variances.clamp(min=0)
        # Shrinkage limits the scale of directions with little variance: with fewer items than dimensions most
        # variances are 0.
        scale = (variances + self.shrinkage * variances.mean()).clamp(min=torch.finfo(x.dtype).tiny).rsqrt()
        self.mean.copy_(mean)
        self.weight.copy_(directions * scale / x.shape[1] ** 0.5)
        self.measured.fill_(True)

    def forward(self, x: Tensor, project: nn.Linear | None = None) -> Tensor:
        """Whiten x [..., E], in the dtype of x; then project it, if a layer [E -> D] is given.

        The two matrices are multiplied first: E x E x D operations once instead of E x E for each row of x.
        """
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would lose the directions of little variance
            centered = x.float() - self.mean
            if project is None:
                return (centered @ self.weight).to(x.dtype)
            return F.linear(centered, project.weight.float() @ self.weight.T, project.bias).to(x.dtype)
