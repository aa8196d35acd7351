"""Hugging Face models as backbones: layers, activation checkpointing and FLOPs.

Legend: S packed rows, D width.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_POSITION_TABLES = ("position_embeddings", "wpe", "embed_positions")


@dataclass(frozen=True)
class TextReading:
    """Arrangement of a batch of texts for a text model.

    arrangement: "packed": all texts in one sequence, with the library's attention; "padded": the unpatched model on
    batches of texts of similar lengths, padded on the right; "equal_lengths": the unpatched model on batches of texts
    of equal lengths, without padding, which every model supports. causal: a token sees the text up to itself (True for
    decoders). is_turned: the direction is not the one of the checkpoint.
    """

    arrangement: Literal["packed", "padded", "equal_lengths"] = "packed"
    causal: bool = True
    is_turned: bool = False


def backbone_layers(backbone: "PreTrainedModel") -> nn.ModuleList:
    """The layers of a model, first to last: its outermost ModuleList of `config.num_hidden_layers` modules."""
    number = backbone.config.num_hidden_layers
    lists = [module for module in backbone.modules() if isinstance(module, nn.ModuleList)]
    return next((layers for layers in lists if len(layers) == number), nn.ModuleList())


def learned_positions(backbone: "PreTrainedModel") -> nn.Embedding | None:
    """The table of learned position vectors (BERT, GPT-2, OPT, ...); None if positions are not learned."""
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITION_TABLES:
            return module
    return None


class BackboneModule:
    """Base of the modules with a Hugging Face model `backbone`, which reads packed rows."""

    backbone: "PreTrainedModel"
    first_position = 0
    """Position id of a sequence's first row."""

    @property
    def caps_scores(self) -> bool:
        """True if the backbone's attention caps its scores, as Gemma 2's does."""
        return getattr(self.backbone.config, "attn_logit_softcapping", None) is not None

    def run_backbone(self, rows: Tensor, plan: Any) -> Tensor:
        """All layers and the last norm on packed rows, with the attention `plan`: [S, D] -> [S, D]."""
        positions = plan.position_ids + self.first_position
        output = self.backbone(inputs_embeds=rows[None], position_ids=positions, use_cache=False, hllm_plan=plan)
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def blocks(self) -> nn.ModuleList:
        """The backbone's layers: the units of compilation, sharding (FSDP2) and recomputation."""
        return backbone_layers(self.backbone)

    def recompute_activations(self) -> None:
        """Enable activation checkpointing: each layer runs again in the backward pass."""
        self.backbone.gradient_checkpointing_enable({"use_reentrant": False})


def backbone_flops(backbone: "PreTrainedModel", tokens: int, keys: int) -> float:
    """FLOPs of a forward pass over `tokens` tokens that attend to `keys` keys in total."""
    if tokens == 0:
        return 0.0
    config = backbone.config
    heads = getattr(config, "num_attention_heads", None) or 1
    per_token = transformer_flops_per_token(
        config.hidden_size,
        getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        config.num_hidden_layers,
        heads,
        getattr(config, "num_key_value_heads", None) or heads,
        keys / tokens,
        head_dim=getattr(config, "head_dim", None),
        gated=any("gate" in name for name, _ in backbone.named_modules()),
    )
    return tokens * per_token


def transformer_flops_per_token(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    context: float,
    *,
    head_dim: int | None = None,
    gated: bool = True,
) -> float:
    """Return the FLOPs of one token's forward pass: the matrix products, 2 per multiply-add.

    Norms, activations, softmax, rotary embeddings, the word embeddings and a vocabulary head are not counted.
    Training costs 3 times as much (the backward pass has two products for each one of the forward pass), or 4 times
    with activation checkpointing; model FLOPs utilization counts 3 times in both cases.

    Args:
        hidden: width D of the residual stream.
        intermediate: width of the feed-forward network.
        layers: number of layers.
        heads: query heads.
        kv_heads: key and value heads (fewer than `heads` with grouped queries).
        context: mean number of keys that a token attends to: (n + 1) / 2 for causal attention over n tokens, n
            without a causal mask or if a kernel also computes the masked half.
        head_dim: width of a head; None: `hidden / heads`.
        gated: three feed-forward matrices (Llama's SwiGLU) instead of two (BERT).
    """
    head_dim = head_dim or hidden // heads
    projections = hidden * head_dim * (heads + 2 * kv_heads) + heads * head_dim * hidden
    attention = 2 * context * heads * head_dim  # scores, then the weighted sum of values
    feed_forward = (3 if gated else 2) * hidden * intermediate
    return 2.0 * layers * (projections + attention + feed_forward)
