"""Casts for steps that need more than the eight significant bits of bfloat16."""

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """Cast to float32, unless the dtype is wider already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
