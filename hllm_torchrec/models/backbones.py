"""Loads or builds the Hugging Face backbones of the LLMs, with packed attention."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from hllm_torchrec.modules.attention.packed import PACKED_ATTENTION, register_packed_attention

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


ITEM_TOKEN_FILE = "item_token.safetensors"
"""File next to a backbone's weights: the [ITEM] vector that was trained with them, `item_token` [D]."""


def trained_item_token(pretrained: str | None) -> Tensor | None:
    """The [ITEM] vector [D] of an exported or imported Item LLM; None if the directory has none."""
    path = Path(pretrained or "") / ITEM_TOKEN_FILE
    return load_file(str(path))["item_token"].float() if pretrained is not None and path.is_file() else None


def build_backbone(
    pretrained: str | None,
    shape: dict | None = None,
    layers: int | None = None,
    *,
    word_embeddings: bool = True,
    attention: str = PACKED_ATTENTION,
) -> "PreTrainedModel":
    """A bare Hugging Face model with packed attention.

    Args:
        pretrained: a Hugging Face directory (its weights are loaded), or None for random weights.
        shape: keyword arguments of the config when nothing is pretrained, with "model_type".
        layers: keep the first n layers (None: all).
        word_embeddings: False drops them, as the User LLM does (they would be unused parameters).
        attention: name in transformers' attention registry.

    Raises:
        ValueError: neither or both of `pretrained` and `shape`, or `layers` exceeds the model's layers.
    """
    if (pretrained is None) == (shape is None):
        raise ValueError(
            f"pretrained={pretrained!r}, shape={shape!r}: a backbone needs one of them: the directory of its "
            "weights, or a shape for random ones"
        )
    from transformers import AutoConfig, AutoModel  # takes seconds, and an ID-only model has no backbone

    register_packed_attention()
    if pretrained is not None:
        config = AutoConfig.from_pretrained(pretrained, trust_remote_code=False)
        model = _load(pretrained, _adapted(config, layers, attention))
    else:
        config = AutoConfig.for_model(**(shape or {}))
        model = AutoModel.from_config(_adapted(config, layers, attention), trust_remote_code=False)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # BERT's pooler serves sentence pairs; unused parameters would stall DDP
    if not word_embeddings:
        model.set_input_embeddings(None)
    return model


def _adapted(config: "PreTrainedConfig", layers: int | None, attention: str) -> "PreTrainedConfig":
    """Set the number of layers and the attention implementation in the config; returns it."""
    if layers is not None:
        if not 1 <= layers <= config.num_hidden_layers:
            raise ValueError(f"layers: {layers}: the backbone has {config.num_hidden_layers}; ask for 1 to that many")
        config.num_hidden_layers = layers
    config._attn_implementation = attention
    return config


def _load(directory: str, config: "PreTrainedConfig") -> "PreTrainedModel":
    """Load the weights as fp32 master weights, without remote code; a missing weight is an error."""
    from transformers import AutoModel
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # layers left out on purpose would fill a page with warnings
    try:
        model, report = AutoModel.from_pretrained(
            directory,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=config._attn_implementation,
            output_loading_info=True,
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    model.train()  # from_pretrained leaves it in evaluation mode: no dropout, no activation checkpointing
    # The pooler is removed afterwards (`build_backbone`), so it may be missing.
    missing = [key for key in report["missing_keys"] if "pooler" not in key]
    if missing:
        raise ValueError(
            f"{directory}: {len(missing)} weights are missing, e.g. {missing[0]}: not a complete checkpoint"
        )
    return model
