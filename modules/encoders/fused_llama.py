"""Llama layers that run as a few fused functions under bfloat16 autocast on a CPU, where this is faster.

`fuse_layers` changes only the class of a model's layers; weights, their names and hooks are unchanged. In all other
cases the layers run the code of transformers, with bitwise equal results.

Legend: S packed rows, U rows that are read, D width, d width of a head.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from hllm_torchrec.modules.attention.last_layer import LastLayerRows, ReadRows
from hllm_torchrec.modules.attention.packed import AttentionPlan
from hllm_torchrec.modules.attention.text import BucketPlan
from hllm_torchrec.modules.attention.text_blocks import attend_blocks
from hllm_torchrec.modules.encoders.fused_products import EAGER, Elementwise, add_product, add_swiglu, read_norm, rotate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PLANS = (AttentionPlan, BucketPlan, LastLayerRows, ReadRows)
"""Plans whose attention takes q, k and v in the dtype of the products."""


def fuse_layers(backbone: "PreTrainedModel") -> None:
    """Let the Llama layers of a model with packed attention run fused; other layers are not changed."""
    for module in backbone.modules():
        if type(module) is LlamaDecoderLayer:
            module.__class__ = FusedLlamaLayer


class FusedLlamaLayer(LlamaDecoderLayer):
    """A `LlamaDecoderLayer` with the same weights, fused where `runs_fused` is True."""

    elementwise: Elementwise = EAGER
    """Functions between the products, for example `compiled_elementwise()`."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Map hidden_states [1, S, D] to [1, S, D], or with `ReadRows` to the read rows [1, U, D]."""
        plan = kwargs.get("hllm_plan")
        if not self.runs_fused(hidden_states, plan):
            plain: Tensor = super().forward(hidden_states, **kwargs)
            return plain
        assert plan is not None
        cos, sin = (angles[0] for angles in kwargs["position_embeddings"])
        with torch.autocast("cpu", enabled=False):
            return fused_layer(self, hidden_states[0], cos, sin, plan, self.elementwise, torch.bfloat16)[None]

    def runs_fused(self, hidden_states: Tensor, plan: Any) -> bool:
        """Return whether a call with these arguments runs fused: bfloat16 autocast on a CPU, plain weights, no dropout.

        Within `fused_inference` every call runs fused.
        """
        if torch.compiler.is_compiling():
            return False
        return "forward" in vars(self) or (
            type(hidden_states) is Tensor  # fake ones (`hllm plan`) stand for those of another device
            and hidden_states.device.type == "cpu"
            and torch.is_autocast_enabled("cpu")
            and torch.get_autocast_dtype("cpu") is torch.bfloat16
            and isinstance(plan, _PLANS)
            and not (self.training and self.self_attn.attention_dropout)
            and self.is_plain()
        )

    def is_plain(self) -> bool:
        """Return whether the activation is SiLU, and all linear layers are plain `nn.Linear` without biases, not
        adapters (LoRA)."""
        attention, mlp = self.self_attn, self.mlp
        if attention.config.hidden_act != "silu":
            return False
        products = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        products += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        return all(type(linear) is nn.Linear and linear.bias is None for linear in products)


def fused_layer(
    layer: LlamaDecoderLayer,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    plan: AttentionPlan | BucketPlan | LastLayerRows | ReadRows,
    functions: Elementwise,
    dtype: torch.dtype,
) -> Tensor:
    """Run a layer over x [S, D], products in `dtype`; cos and sin [S, d] of the rows' rotary angles.

    Returns [S, D], with `ReadRows` [U, D].
    """
    attention, norm, mlp = layer.self_attn, layer.input_layernorm, layer.mlp
    q_weight, *kv_weights = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)

    def read(rows: Tensor, weights: list[Tensor]) -> Tensor:
        product = read_norm(rows, norm.weight, norm.variance_epsilon, weights, dtype, functions)
        return product.unflatten(1, (-1, attention.head_dim))

    heads, groups = (weight.shape[0] // attention.head_dim for weight in (q_weight, kv_weights[0]))
    if isinstance(plan, ReadRows):
        # Keys and values are computed of all rows, everything else only of the rows that are read.
        product, x = read(x, kv_weights), x.index_select(0, plan.rows)
        query = rotate(read(x, [q_weight]), cos.index_select(0, plan.rows), sin.index_select(0, plan.rows))
    else:
        product, query = read(x, [q_weight, *kv_weights]), None
    texts = plan.plan if isinstance(plan, LastLayerRows | ReadRows) else plan
    if isinstance(texts, BucketPlan) and texts.attends_in_blocks:
        blocks = texts.blocks(heads, groups, last=query is not None, dtype=dtype)
        mixed = attend_blocks(product, query, cos, sin, blocks, attention.scaling)
    elif isinstance(plan, ReadRows):
        assert query is not None
        key, value = product.split([groups, groups], 1)
        mixed = plan.plan.attend_last(query, rotate(key, cos, sin), value, attention.scaling, 0.0).flatten(1)
    else:
        turned, value = product.split([heads + groups, groups], 1)
        query, key = rotate(turned, cos, sin).split([heads, groups], 1)
        mixed = plan.attend(query, key, value, attention.scaling, 0.0).flatten(1)
    x = add_product(x, mixed, attention.o_proj.weight)
    norm = layer.post_attention_layernorm
    weights = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    return add_swiglu(x, norm.weight, norm.variance_epsilon, *weights, dtype, functions)
