"""Casts for computations that need more precision than the eight significant bits of bfloat16."""

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """Cast to float32; a wider dtype stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
