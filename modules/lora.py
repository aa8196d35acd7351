"""Low-rank adapters (LoRA, arXiv 2106.09685, Eq. 3) on a Hugging Face backbone, through the package peft.

    y = W x + alpha / r * B A x        W frozen; A [r, in] random, B [out, r] zero at first: it begins as W x

Where nothing trains any more the product can be added to W: the same function without the adapters' cost.
"""

import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hllm_torchrec.common.errors import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ADAPTER = re.compile(r"\.lora_[AB]\.")
_NAME = "default"
"""What peft calls an adapter that is not named."""


def add_lora(
    backbone: "PreTrainedModel",
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str] = (),
    field: str = "lora",
) -> None:
    """Put adapters on linear layers of `backbone`, in place; of its weights only theirs train from then on.

    Args:
        rank, alpha, dropout: r, the scale times r, and the probability to zero an entry of an adapter's input.
        targets: last names of linear layers, such as "q_proj"; none: all in the backbone's layers.
        field: of the configuration, for messages.

    Raises:
        ValueError: a name that no linear layer of the backbone has, or peft is not installed.
    """
    names = linear_names(backbone)
    for target in targets:
        if target not in names:
            raise ValueError(
                f"{field}.targets: {target!r}: {backbone.config.model_type} has no linear layer of that "
                f"name{did_you_mean(target, names)}; it has {', '.join(names)}"
            )
    if importlib.util.find_spec("peft") is None:
        raise ValueError(f"{field}.rank: {rank}: needs the package peft: pip install 'hllm_torchrec[lora]'")
    from peft import LoraConfig, inject_adapter_in_model  # seconds to import, and optional

    chosen = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets or names))
    with torch.random.fork_rng(devices=[]):  # what is drawn after this is as without adapters
        inject_adapter_in_model(chosen, backbone)
    freeze_base_weights(backbone)


def linear_names(backbone: nn.Module) -> list[str]:
    """Last names of the linear layers in a backbone's layers, sorted."""
    layers = backbone.get_submodule("layers" if hasattr(backbone, "layers") else "encoder.layer")
    return sorted({name.rpartition(".")[2] for name, module in layers.named_modules() if type(module) is nn.Linear})


def is_adapter(name: str) -> bool:
    """Whether a parameter of this (dotted) name is an adapter's."""
    return _ADAPTER.search(name) is not None


def has_adapters(module: nn.Module) -> bool:
    """Whether there are any in it."""
    return any(is_adapter(name) for name, _ in module.named_parameters())


def freeze_base_weights(backbone: nn.Module) -> None:
    """Freeze all of a backbone's weights but its adapters'."""
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(is_adapter(name))


def merged_state(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Weights by the names that they have without adapters, W + scale * B A in place of each adapted W.

    state: whole tensors of a backbone with adapters, or without; scale: alpha / r.
    """
    found: dict[str, Tensor] = {}
    for name, weight in state.items():
        if is_adapter(name):
            continue
        if name.endswith(".base_layer.weight"):
            layer = name.removesuffix("base_layer.weight")
            up, down = (state[f"{layer}lora_{side}.{_NAME}.weight"] for side in "BA")
            weight = weight + scale * (up @ down)
        found[name.replace(".base_layer.", ".")] = weight
    return found


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Within the context all adapters of `model` are added to the weights that they adapt; after it, bit for bit gone.

    It holds the adapted weights twice. Weights that are sharded (DTensor) stay as they are: the function is the same.
    """
    kept: list[tuple[Any, Tensor]] = []
    for layer in adapted_layers(model):
        weight = layer.base_layer.weight
        if type(weight.data) is Tensor and type(layer.lora_A[_NAME].weight.data) is Tensor:
            kept.append((layer, weight.detach().clone()))
            layer.merge()
    try:
        yield
    finally:
        with torch.no_grad():
            for layer, weight in kept:
                layer.unmerge()
                layer.base_layer.weight.copy_(weight)  # subtracting leaves rounding, and stores hash weights


def adapted_layers(model: nn.Module) -> list[Any]:
    """peft's linear layers in a model."""
    return [module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer")]
