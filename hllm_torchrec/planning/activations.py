"""Estimates of an encoder's activation memory (tensors that autograd saves), without running it at its size.

A Hugging Face model is run on fake tensors, which have a shape but no contents. The other user encoders need the values
of sequence offsets, so they are run on a short sequence. The difference between models of one and two layers is the
memory of each additional layer.
"""

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from hllm_torchrec.config.schema import Config
from hllm_torchrec.models.build import build_user_encoder
from hllm_torchrec.models.parallelize import compute_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class ActivationBytes:
    """Activation memory in bytes.

    Args:
        layers: number of layers.
        per_layer, outside_layers: saved by autograd per sequence, in each layer and outside of the layers.
        layer_input: the input of a layer, per sequence.
        transient: largest temporary memory of a layer, per sequence.
        constant_per_layer, constant_outside: independent of the number of sequences (weights cast to another
            precision).
    """

    layers: int
    per_layer: float
    outside_layers: float
    layer_input: float
    transient: float
    constant_per_layer: float = 0.0
    constant_outside: float = 0.0

    def total(self, sequences: float, checkpointing: bool, reads_rows: bool = False) -> float:
        """Compute the activation memory of a number of sequences.

        checkpointing: with activation checkpointing, the inputs of all layers are saved, and all tensors of one layer
        at a time. reads_rows: for most rows the last layer computes only keys and values
        (`modules/attention/last_layer.py`).
        """
        fixed = self.constant_outside + self.constant_per_layer * (1 if checkpointing else self.layers)
        if checkpointing:
            return fixed + sequences * (
                self.outside_layers + self.layers * self.layer_input + self.per_layer + self.transient
            )
        saved_layers = self.layers - LAST_LAYER_SAVING * reads_rows
        return fixed + sequences * (self.outside_layers + saved_layers * self.per_layer + self.transient)


LAST_LAYER_SAVING = 0.75
"""Share of the last layer's activations that is not saved if only the [ITEM] rows of its output are needed."""


def decoder_activation_bytes(shape: "PreTrainedConfig", length: int, config: Config) -> ActivationBytes:
    """Estimate the memory of a Hugging Face model for sequences of `length` tokens.

    Measures forward passes on fake tensors, with 1 and 2 layers and with 1 and 2 sequences.
    """
    measured = {
        (layers, sequences): _measured_activation_bytes(shape, layers, sequences, length, compute_dtype(config))
        for layers in (1, 2)
        for sequences in (1, 2)
    }
    # bytes(layers, sequences) = fixed(layers) + growth(layers) * sequences, and both fixed and growth are linear in the
    # number of layers: outside + per layer * layers. Four measurements determine the four constants.
    growth = {layers: measured[layers, 2] - measured[layers, 1] for layers in (1, 2)}  # per sequence
    fixed = {layers: measured[layers, 1] - growth[layers] for layers in (1, 2)}
    bytes_per_value = 2 if config.parallel.precision == "bf16" else 4
    return ActivationBytes(
        layers=shape.num_hidden_layers,
        per_layer=growth[2] - growth[1],
        outside_layers=max(0.0, 2 * growth[1] - growth[2]),
        layer_input=4.0 * length * shape.hidden_size,
        # Three tensors of the feed-forward width: gate, up and their product.
        transient=3.0 * bytes_per_value * length * getattr(shape, "intermediate_size", 4 * shape.hidden_size),
        constant_per_layer=fixed[2] - fixed[1],
        constant_outside=max(0.0, 2 * fixed[1] - fixed[2]),
    )


def _measured_activation_bytes(
    shape: "PreTrainedConfig", layers: int, sequences: int, length: int, dtype: torch.dtype
) -> float:
    from transformers import AutoModel

    shape = copy.deepcopy(shape)
    shape.num_hidden_layers, shape._attn_implementation = layers, "sdpa"
    if getattr(shape, "layer_types", None):
        shape.layer_types = shape.layer_types[:layers]
    with FakeTensorMode():
        model = AutoModel.from_config(shape, trust_remote_code=False)
        model.set_input_embeddings(None)
        x = torch.empty(sequences, length, shape.hidden_size, requires_grad=True)
        with saved_tensor_bytes(model) as saved, torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            model(inputs_embeds=x, use_cache=False)
    return sum(saved.values())


@contextmanager
def saved_tensor_bytes(model: nn.Module) -> Iterator[dict[int, float]]:
    """Context manager that yields storage -> bytes for the tensors that autograd saves, except the model's weights."""
    weights = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
    saved: dict[int, float] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        # Counted by storage, because several saved views of a tensor share its memory.
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and storage._cdata not in saved:
            saved[storage._cdata] = float(storage.nbytes())
            alive.append(tensor)  # keeps the storage alive, so that no other storage gets its address
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def encoder_activation_bytes(config: Config, length: int) -> ActivationBytes:
    """Estimate the memory of a built-in user encoder from forward passes of 1 and 2 layers over a short sequence."""
    shape, measured = dict(config.user.shape or {}), []
    short = min(length, 64, int(shape.get("max_positions", 64)))
    for layers in (1, 2):
        encoder = build_user_encoder(dataclasses.replace(config.user, shape={**shape, "layers": layers}))
        x = torch.zeros(short, encoder.width, requires_grad=True)
        with saved_tensor_bytes(encoder) as saved:
            encoder(x, torch.tensor([0, short]), torch.arange(short))
        measured.append(sum(saved.values()))
    # bytes(layers) = outside + per layer * layers, and both grow linearly with the length.
    one, two = measured
    scale = length / short
    return ActivationBytes(
        int(shape["layers"]),
        scale * (two - one),
        scale * max(0.0, 2 * one - two),
        4.0 * length * encoder.width,
        12.0 * length * encoder.width,
    )
