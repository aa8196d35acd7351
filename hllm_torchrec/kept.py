"""What autograd keeps of an encoder for the backward pass, found without running it at its size.

A Hugging Face model runs with fake tensors, which have shapes and no contents; the other user encoders, which look at
lengths as they run, over a short sequence. One and two layers tell what each further one adds.
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

from hllm_torchrec.config import Config
from hllm_torchrec.model import build_user_encoder
from hllm_torchrec.modules.user_encoder import UserEncoder
from hllm_torchrec.parallelize import compute_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Kept:
    """Bytes that autograd keeps of a sequence: of each layer, of what is around the layers, of a layer's input alone.

    fixed_layer, fixed_around: the same whatever the number of sequences (weights in another precision); made: bytes of
    a sequence that a layer makes and drops at its busiest.
    """

    layers: int
    layer: float
    around: float
    layer_input: float
    made: float
    fixed_layer: float = 0.0
    fixed_around: float = 0.0

    def of(self, sequences: float, recomputed: bool, reads_rows: bool = False) -> float:
        """Of so many sequences. recomputed: activation checkpointing keeps the layers' inputs, and one layer at a time.

        reads_rows: of the last layer keys and values alone are made of every row.
        """
        fixed = self.fixed_around + self.fixed_layer * (1 if recomputed else self.layers)
        if recomputed:
            return fixed + sequences * (self.around + self.layers * self.layer_input + self.layer + self.made)
        whole = self.layers - READ_ROWS_SAVE * reads_rows
        return fixed + sequences * (self.around + whole * self.layer + self.made)


READ_ROWS_SAVE = 0.75
"""Share of the last layer that need not be kept where only the [ITEM] rows are read."""


def kept_by_decoder(shape: "PreTrainedConfig", length: int, config: Config) -> Kept:
    """Of a Hugging Face model and sequences of `length`, read off fake passes of one and two layers and sequences."""
    found = {
        (layers, sequences): _kept_by(shape, layers, sequences, length, compute_dtype(config))
        for layers in (1, 2)
        for sequences in (1, 2)
    }
    growth = {layers: found[layers, 2] - found[layers, 1] for layers in (1, 2)}  # with each sequence
    fixed = {layers: found[layers, 1] - growth[layers] for layers in (1, 2)}
    number = 2 if config.parallel.precision == "bf16" else 4
    return Kept(
        layers=shape.num_hidden_layers,
        layer=growth[2] - growth[1],
        around=max(0.0, 2 * growth[1] - growth[2]),
        layer_input=4.0 * length * shape.hidden_size,
        made=3.0 * number * length * getattr(shape, "intermediate_size", 4 * shape.hidden_size),
        fixed_layer=fixed[2] - fixed[1],
        fixed_around=max(0.0, 2 * fixed[1] - fixed[2]),
    )


def _kept_by(shape: "PreTrainedConfig", layers: int, sequences: int, length: int, dtype: torch.dtype) -> float:
    from transformers import AutoModel

    shape = copy.deepcopy(shape)
    shape.num_hidden_layers, shape._attn_implementation = layers, "sdpa"
    if "layer_types" in shape.to_dict():
        shape.layer_types = None
    with FakeTensorMode():
        model = AutoModel.from_config(shape, trust_remote_code=False)
        model.set_input_embeddings(None)
        x = torch.empty(sequences, length, shape.hidden_size, requires_grad=True)
        with kept_tensors(model) as kept, torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            model(inputs_embeds=x, use_cache=False)
    return sum(kept.values())


@contextmanager
def kept_tensors(model: nn.Module) -> Iterator[dict[int, float]]:
    """Within the context: storage -> bytes of what autograd keeps, the model's own weights left out."""
    own = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, float] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in kept:
            kept[storage._cdata] = float(storage.nbytes())
            alive.append(tensor)  # so that no other storage takes its place
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def kept_by_encoder(config: Config, length: int) -> Kept:
    """Of HSTU, SASRec or LiGR, read off real forward passes of one and two layers over a short sequence."""
    shape, measured = dict(config.user.shape or {}), []
    short = min(length, 64)
    for layers in (1, 2):
        encoder = build_user_encoder(dataclasses.replace(config.user, shape={**shape, "layers": layers}))
        assert isinstance(encoder, UserEncoder)
        x = torch.zeros(short, encoder.width, requires_grad=True)
        with kept_tensors(encoder) as kept:
            encoder(x, torch.tensor([0, short]), torch.arange(short))
        measured.append(sum(kept.values()))
    one, two = measured
    scale = length / short
    return Kept(
        int(shape["layers"]),
        scale * (two - one),
        scale * max(0.0, 2 * one - two),
        4.0 * length * encoder.width,
        12.0 * length * encoder.width,
    )
