"""A frozen Item LLM whose linear layers multiply int8 numbers: dynamic quantization, by torch's own kernels, on a CPU.

    y = s_w s_x (q_w q_x) + b

q_w: weights in int8 with a scale for each output, s_w; q_x: inputs, in each call with the scale of their range, s_x (7
bits, so that sums of products fit in 16 bits on processors without VNNI). Words, norms and attention stay in float32.
"""

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from hllm_torchrec.modules.encoders.item_llm import ItemLLM

_ENGINES = ("onednn", "x86", "fbgemm", "qnnpack")
"""torch's engines, the fastest first."""


class Int8Linear(nn.Module):
    """The product of an `nn.Linear`, which it is built from; inputs and outputs are float32."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scales = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny).double()
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        with warnings.catch_warnings():
            # torch says so of its quantized tensors, in favor of a package; its kernels take no other weights.
            warnings.filterwarnings("ignore", "torch.quantize_per_tensor.* are deprecated")
            quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        bias = None if linear.bias is None else linear.bias.detach().float()
        engine, supported = torch.backends.quantized.engine, torch.backends.quantized.supported_engines
        # The packed weights keep the engine that is set when they are made.
        torch.backends.quantized.engine = next(name for name in _ENGINES if name in supported)
        try:
            self.packed: Any = torch.ops.quantized.linear_prepack(quantized, bias)
        finally:
            torch.backends.quantized.engine = engine

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., O]."""
        product: Tensor = torch.ops.quantized.linear_dynamic(x.contiguous(), self.packed, reduce_range=True)
        return product


@torch.no_grad()
def quantized_copy(item_llm: ItemLLM) -> ItemLLM:
    """A copy in evaluation mode with the linear layers of all layers in int8; the word embeddings are shared."""
    words = item_llm.backbone.get_input_embeddings()
    found = copy.deepcopy(item_llm, {id(words): words}).eval()
    for layer in found.blocks():
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, Int8Linear(child))
    return found
