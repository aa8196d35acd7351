"""Runs the layers of a text model with fused, prepacked matrix products: inference on many texts on a CPU.

    with fused_inference(item_llm, torch.bfloat16):  # if can_run_fused(item_llm)
        vectors = item_llm(token_ids, cu_seqlens)

q, k and v are computed by one product (in the last layer of Llama: k and v). oneDNN computes activations, gates and
residual sums inside the products (by the operators that torch.compile uses). The gains of a Llama layer's norms are
multiplied into the weights. The residual stream has the dtype of the products. The outputs equal those of the plain
layers up to rounding. The layers of Llama (decoders) and BERT (sentence encoders) are supported.

Legend: D width, O outputs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from hllm_torchrec.modules.attention.last_layer import ReadRows
from hllm_torchrec.modules.encoders.fused_llama import FusedLlamaLayer
from hllm_torchrec.modules.encoders.fused_products import normalized, rotated
from hllm_torchrec.modules.encoders.item_llm import ItemLLM

_ROWS = 2048
"""Number of rows for which oneDNN chooses the memory layout of the weights."""
_ACTIVATIONS = {"gelu": ("gelu", "none"), "gelu_new": ("gelu", "tanh"), "gelu_pytorch_tanh": ("gelu", "tanh")}
"""Activations of BERT's feed-forward block: name in the config -> oneDNN's name and algorithm."""


@contextmanager
def fused_inference(item_llm: ItemLLM, dtype: torch.dtype) -> Iterator[None]:
    """Within the context run the layers of an Item LLM fused, with products in `dtype`; requires `can_run_fused`."""
    layers = list(item_llm.blocks())
    prepared = [_prepare(layer, dtype, is_last=layer is layers[-1]) for layer in layers]
    for layer, forward in zip(layers, prepared, strict=True):
        layer.forward = _without_autocast(forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # restores the method of the class


def can_run_fused(item_llm: ItemLLM) -> bool:
    """Return whether all layers can run fused: Llama's or BERT's, on a CPU, without adapters and not sharded."""
    layers = list(item_llm.blocks())
    return (
        torch.backends.mkldnn.is_available()
        and item_llm.arrangement == "packed"
        and all(type(weight) is nn.Parameter and weight.device.type == "cpu" for weight in item_llm.parameters())
        and (
            all(isinstance(layer, FusedLlamaLayer) and layer.is_plain() for layer in layers)
            or all(_is_plain_bert(layer) for layer in layers)
        )
    )


def _is_plain_bert(layer: nn.Module) -> bool:
    if not isinstance(layer, BertLayer) or layer.attention.self.config.hidden_act not in _ACTIVATIONS:
        return False
    weighted = (part for part in layer.modules() if getattr(part, "weight", None) is not None)
    return all(type(part) in (nn.Linear, nn.LayerNorm) for part in weighted)


def _without_autocast(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*args: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return forward(*args, **kwargs)

    return run


class _Product:
    """x W' + b fused with a subsequent elementwise operation; W [O, D]."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype).contiguous(), _ROWS)
        self.bias = None if bias is None else bias.detach().to(dtype)

    def __call__(self, x: Tensor, activation: str = "none", algorithm: str = "") -> Tensor:
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, activation, [], algorithm)
        return found

    def with_other(self, x: Tensor, operation: str, other: Tensor) -> Tensor:
        """Apply `operation`, "add" or "mul", to the product and `other`."""
        found: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, operation)
        return found


class _FusedLlama:
    """Forward pass of a `LlamaDecoderLayer`."""

    def __init__(self, layer: LlamaDecoderLayer, dtype: torch.dtype, is_last: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        before, after = layer.input_layernorm, layer.post_attention_layernorm
        self.dtype, self.eps, self.scaling = dtype, (before.variance_epsilon, after.variance_epsilon), attention.scaling
        self.head, self.is_last, self.out_dtype = attention.head_dim, is_last, torch.float32 if is_last else dtype
        weights = [part.weight * before.weight for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
        self.heads, self.groups = (len(weight) // self.head for weight in weights[:2])
        # The last layer may compute q only for few rows (`ReadRows`), so the weight of q is not concatenated.
        parts = [weights[:1], weights[1:]] if is_last else [weights]
        self.read = [_Product(torch.cat(part), None, dtype) for part in parts]
        self.out, self.down = _linear(attention.o_proj, dtype), _linear(mlp.down_proj, dtype)
        self.gate, self.up = (_Product(p.weight * after.weight, None, dtype) for p in (mlp.gate_proj, mlp.up_proj))

    def __call__(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        plan, x = kwargs["hllm_plan"], hidden_states[0].to(self.dtype)
        cos, sin = (angles[0][:, None].to(self.dtype) for angles in kwargs["position_embeddings"])
        h = normalized(x, self.eps[0], self.dtype)[0]
        if isinstance(plan, ReadRows):
            key, value = self._heads(self.read[1](h)).split([self.groups, self.groups], 1)
            x, h, own_cos, own_sin = (y.index_select(0, plan.rows) for y in (x, h, cos, sin))
            query = rotated(self._heads(self.read[0](h)), own_cos, own_sin, 1)
            mixed = plan.plan.attend_last(query, rotated(key, cos, sin, 1), value, self.scaling, 0.0)
        else:
            parts = self._heads(torch.cat([read(h) for read in self.read], -1) if self.is_last else self.read[0](h))
            turned, value = parts.split([self.heads + self.groups, self.groups], 1)
            query, key = rotated(turned, cos, sin, 1).split([self.heads, self.groups], 1)
            mixed = plan.attend(query, key, value, self.scaling, 0.0)
        x = self.out.with_other(mixed.flatten(1).to(self.dtype), "add", x)
        h = normalized(x, self.eps[1], self.dtype)[0]
        x = self.down.with_other(self.up.with_other(h, "mul", self.gate(h, "swish")), "add", x)
        return x[None].to(self.out_dtype)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, self.head))


class _FusedBert:
    """Forward pass of a `BertLayer`."""

    def __init__(self, layer: BertLayer, dtype: torch.dtype, is_last: bool) -> None:
        attention, output = layer.attention.self, layer.attention.output
        parts = attention.query, attention.key, attention.value
        self.dtype, self.out_dtype = dtype, torch.float32 if is_last else dtype
        self.scaling, self.head = attention.scaling, attention.attention_head_size
        self.read = _Product(torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts]), dtype)
        self.out, self.norm = _linear(output.dense, dtype), _norm(output.LayerNorm, dtype)
        self.up, self.down = _linear(layer.intermediate.dense, dtype), _linear(layer.output.dense, dtype)
        self.activation = _ACTIVATIONS[attention.config.hidden_act]
        self.last_norm = _norm(layer.output.LayerNorm, dtype)

    def __call__(self, hidden_states: Tensor, *_: Any, **kwargs: Any) -> Tensor:
        x = hidden_states[0].to(self.dtype)
        parts = self.read(x).unflatten(1, (3, -1, self.head)).unbind(1)
        mixed = kwargs["hllm_plan"].attend(*parts, self.scaling, 0.0).to(self.dtype)
        x = self.norm(self.out.with_other(mixed.flatten(1), "add", x))
        return self.last_norm(self.down.with_other(self.up(x, *self.activation), "add", x))[None].to(self.out_dtype)


def _linear(linear: nn.Linear, dtype: torch.dtype) -> _Product:
    return _Product(linear.weight, linear.bias, dtype)


def _norm(norm: nn.LayerNorm, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    weight, bias = norm.weight.detach().to(dtype), norm.bias.detach().to(dtype)
    return lambda x: F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


def _prepare(layer: nn.Module, dtype: torch.dtype, is_last: bool) -> Callable[..., Tensor]:
    if isinstance(layer, LlamaDecoderLayer):
        return _FusedLlama(layer, dtype, is_last)
    assert isinstance(layer, BertLayer), "see can_run_fused"
    return _FusedBert(layer, dtype, is_last)
