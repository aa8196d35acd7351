"""Hugging Face models as backbones: layers, activation checkpointing and FLOPs."""

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def backbone_layers(backbone: nn.Module) -> nn.ModuleList:
    """The layers of a decoder, or of an encoder of BERT's kind, first to last."""
    layers = backbone.get_submodule("layers" if hasattr(backbone, "layers") else "encoder.layer")
    assert isinstance(layers, nn.ModuleList)
    return layers


def checkpoint_layers(backbone: "PreTrainedModel") -> None:
    """Enable activation checkpointing: each layer runs again in the backward pass."""
    backbone.gradient_checkpointing_enable({"use_reentrant": False})


def backbone_flops(backbone: "PreTrainedModel", tokens: int, keys: int) -> float:
    """FLOPs of a forward pass over `tokens` tokens that attend to `keys` keys in total."""
    if tokens == 0:
        return 0.0
    config = backbone.config
    per_token = transformer_flops_per_token(
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
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
    Training costs 3 times as much (the backward pass has two products for each forward one), or 4 times with
    activation checkpointing, though model FLOPs utilisation counts 3 in either case.

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
