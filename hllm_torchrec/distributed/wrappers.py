"""Views through what parallelism wraps around a model: the plain module, and whole parameters."""

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchrec.distributed.model_parallel import get_unwrapped_module


def unwrap_model(model: nn.Module) -> nn.Module:
    """The HLLM inside DMP and DDP."""
    return get_unwrapped_module(model)


def full_tensor(tensor: Tensor) -> Tensor:
    """A dense parameter with all of its rows [n, ...], also where FSDP2 has sharded it. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
