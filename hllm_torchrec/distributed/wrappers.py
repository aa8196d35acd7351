"""Unwrapping of a model from DistributedModelParallel and DDP, and of a parameter from FSDP2."""

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchrec.distributed.model_parallel import get_unwrapped_module


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the module inside DistributedModelParallel (DMP) and DDP."""
    return get_unwrapped_module(model)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a dense parameter unsharded: if FSDP2 has sharded it, its rows are gathered. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
