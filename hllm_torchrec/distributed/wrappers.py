"""Access to the plain module inside parallel wrappers, and to unsharded parameters."""

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchrec.distributed.model_parallel import get_unwrapped_module


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the module inside DMP and DDP."""
    return get_unwrapped_module(model)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a dense parameter with all of its rows [n, ...], gathered if FSDP2 has sharded it. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
