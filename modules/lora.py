"""Low-rank adapters (LoRA, arXiv 2106.09685, Eq. 3) on a Hugging Face backbone, through the package peft.

    y = W x + alpha / r * B A x        W frozen; A [r, in] random, B [out, r] initialized to zero, so at first y = W x

For inference the product can be added to W, which gives the same function without the cost of the adapters.
"""

import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hllm_torchrec.common.errors import ArgumentError, did_you_mean
from hllm_torchrec.modules.encoders.backbone import backbone_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ADAPTER = re.compile(r"\.lora_[AB]\.")
_NAME = "default"
"""Default name of an adapter in peft."""


def add_lora(
    backbone: "PreTrainedModel",
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str] = (),
) -> None:
    """Add adapters to linear layers of `backbone`, in place, and freeze all its other weights.

    Args:
        rank, alpha: r and alpha of the equation above.
        dropout: probability to zero an entry of an adapter's input.
        targets: last parts of the names of linear layers, such as "q_proj"; empty: all linear layers.

    Raises:
        ValueError: a target is not a linear layer of the backbone, or peft is not installed.
    """
    names = linear_names(backbone)
    for target in targets:
        if target not in names:
            raise ArgumentError(
                f"targets: {target!r}: {backbone.config.model_type} has no linear layer of that "
                f"name{did_you_mean(target, names)}; it has {', '.join(names)}"
            )
    if importlib.util.find_spec("peft") is None:
        raise ArgumentError(f"rank: {rank}: needs the package peft: pip install 'hllm_torchrec[lora]'")
    from peft import LoraConfig, inject_adapter_in_model  # optional package, and its import takes seconds

    chosen = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets or names))
    with torch.random.fork_rng(devices=[]):  # so that later random draws are the same as without adapters
        inject_adapter_in_model(chosen, backbone)
    freeze_base_weights(backbone)


def linear_names(backbone: nn.Module) -> list[str]:
    """Last parts of the names of the linear layers in a backbone's layers, sorted."""
    layers = backbone_layers(backbone).named_modules()
    return sorted({name.rpartition(".")[2] for name, module in layers if type(module) is nn.Linear})


def is_adapter(name: str) -> bool:
    """Return whether a (dotted) parameter name belongs to an adapter."""
    return _ADAPTER.search(name) is not None


def has_adapters(module: nn.Module) -> bool:
    """Return whether a module has adapters."""
    return any(is_adapter(name) for name, _ in module.named_parameters())


def freeze_base_weights(backbone: nn.Module) -> None:
    """Freeze all weights of a backbone except those of its adapters."""
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(is_adapter(name))


def merged_state(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Merge adapters into a state dictionary: W + scale * B A for each adapted W, under its name without adapters.

    state: unsharded tensors of a backbone, with or without adapters; scale: alpha / r.
    """
    merged_weights: dict[str, Tensor] = {}
    for name, weight in state.items():
        if is_adapter(name):
            continue
        if name.endswith(".base_layer.weight"):
            layer = name.removesuffix("base_layer.weight")
            up, down = (state[f"{layer}lora_{side}.{_NAME}.weight"] for side in "BA")
            weight = weight + scale * (up @ down)
        merged_weights[name.replace(".base_layer.", ".")] = weight
    return merged_weights


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Context manager that merges all adapters of `model` into their weights, and restores these bit for bit at exit.

    It needs memory for a copy of the adapted weights. Layers with sharded weights (DTensor) are not merged; they
    compute the same function with their adapters.
    """
    originals: list[tuple[Any, Tensor]] = []
    for layer in adapted_layers(model):
        weight = layer.base_layer.weight
        if type(weight.data) is Tensor and type(layer.lora_A[_NAME].weight.data) is Tensor:
            originals.append((layer, weight.detach().clone()))
            layer.merge()
    try:
        yield
    finally:
        with torch.no_grad():
            for layer, weight in originals:
                layer.unmerge()
                # Unmerging leaves rounding errors, which would change the hash of the weights in a store.
                layer.base_layer.weight.copy_(weight)


def adapted_layers(model: nn.Module) -> list[Any]:
    """Return the linear layers with adapters (peft's modules) in a model."""
    return [module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer")]
