"""Dynamic int8 quantization of the linear layers of a frozen Item LLM, by torch's kernels on a CPU.

    y = s_w s_x (q_w (q_x - z_x)) + b

q_w: int8 weights, with a scale s_w for each output; q_x: inputs, quantized in each call with a scale s_x and a zero
point z_x chosen from their range (to 7 bits, so that sums of products fit in 16 bits on processors without VNNI). Word
embeddings, norms and the attention itself (scores and weighted sums) remain in float32; its projections are int8.

Legend: D inputs and O outputs of a linear layer.
"""

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from hllm_torchrec.modules.encoders.item_llm import ItemLLM

_ENGINES = ("onednn", "x86", "fbgemm", "qnnpack")
"""torch's engines for quantized operators, the fastest first."""


class Int8Linear(nn.Module):
    """An int8 copy of an `nn.Linear`; inputs and outputs are float32."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scales = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny).double()
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        with warnings.catch_warnings():
            # torch recommends another package instead of its quantized tensors, but its kernels accept only these.
            warnings.filterwarnings("ignore", "torch.quantize_per_tensor.* are deprecated")
            quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        bias = None if linear.bias is None else linear.bias.detach().float()
        engine, supported = torch.backends.quantized.engine, torch.backends.quantized.supported_engines
        # The packed weights use the engine that is set when they are made.
        torch.backends.quantized.engine = next(name for name in _ENGINES if name in supported)
        try:
            self.packed: Any = torch.ops.quantized.linear_prepack(quantized, bias)
        finally:
            torch.backends.quantized.engine = engine

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., D] to [..., O]."""
        product: Tensor = torch.ops.quantized.linear_dynamic(x.contiguous(), self.packed, reduce_range=True)
        return product


@torch.no_grad()
def quantized_copy(item_llm: ItemLLM) -> ItemLLM:
    """Copy in evaluation mode in which the linear layers of all blocks are int8; it shares the word embeddings."""
    words = item_llm.backbone.get_input_embeddings()
    found = copy.deepcopy(item_llm, {id(words): words}).eval()
    for layer in found.blocks():
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, Int8Linear(child))
    return found
