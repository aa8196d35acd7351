"""Builds the Hugging Face backbones of the LLMs from a directory or a shape, and checks them against transformers."""

from dataclasses import replace
from typing import TYPE_CHECKING

from hllm_torchrec.common.errors import ArgumentError
from hllm_torchrec.common.foreign_files import first_line
from hllm_torchrec.models.backbone_check import check_user_backbone, text_reading
from hllm_torchrec.models.model_files import check_config, load_weights, naming_directory, read_config
from hllm_torchrec.models.small_models import directed
from hllm_torchrec.modules.attention.packed import PACKED_ATTENTION, register_packed_attention

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def build_backbone(
    pretrained: str | None,
    shape: dict | None = None,
    layers: int | None = None,
    *,
    word_embeddings: bool = True,
    attention: str | None = None,
    causal: bool | None = None,
) -> "PreTrainedModel":
    """Build a bare Hugging Face model, with packed attention if its attention function can be replaced.

    Args:
        pretrained: a Hugging Face directory (its weights are loaded), or None for random weights.
        shape: keyword arguments of the config, with "model_type"; given if `pretrained` is None.
        layers: number of first layers to keep (None: all).
        word_embeddings: False removes them, for the User LLM, in which they would be unused parameters.
        attention: name in transformers' attention registry; None: packed attention if a small model of the config
            then agrees with plain transformers (see `backbone_check`).
        causal: True for causal attention, False for bidirectional; None: as in the config. A User LLM is always
            causal.

    Raises:
        ValueError: neither or both of `pretrained` and `shape`; `layers` exceeds the model's layers; a file is
            damaged; or no arrangement gives the embeddings of transformers.
    """
    config = backbone_config(pretrained, shape, layers)
    reading = None
    with naming_directory(pretrained):
        if attention is None and word_embeddings:
            reading = text_reading(config, causal)
            attention = PACKED_ATTENTION if reading.arrangement == "packed" else None
        elif attention is None:
            causal, attention = True, PACKED_ATTENTION
            check_user_backbone(config)
        turned = directed(config, causal)
        is_turned = getattr(turned, "is_causal", None) != getattr(config, "is_causal", None)
        config = turned
    register_packed_attention()
    if attention is not None:
        config._attn_implementation = attention
    model = _random(config) if pretrained is None else load_weights(pretrained, config)
    if reading is not None:
        model.hllm_reading = replace(reading, is_turned=is_turned)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # BERT's pooler is for sentence pairs; as unused parameters its weights would stall DDP
    if not word_embeddings:
        model.set_input_embeddings(None)
    if attention == PACKED_ATTENTION:
        from hllm_torchrec.modules.encoders.fused_llama import fuse_layers  # imports transformers

        fuse_layers(model)
    return model


def backbone_config(pretrained: str | None, shape: dict | None, layers: int | None = None) -> "PreTrainedConfig":
    """The config of a backbone, reduced to `layers` layers (None: all). Raises like `build_backbone`."""
    if (pretrained is None) == (shape is None):
        raise ValueError(
            f"pretrained={pretrained!r}, shape={shape!r}: a backbone needs one of them: the directory of its "
            "weights, or a shape for random weights"
        )
    config = _config_of_shape(shape or {}) if pretrained is None else read_config(pretrained)
    if layers is not None:
        if not 1 <= layers <= config.num_hidden_layers:
            raise ValueError(f"layers: {layers}: the backbone has {config.num_hidden_layers}; choose 1 to that many")
        # Lists with one entry per layer (such as the kind of attention) must be cut too.
        for name, value in config.to_dict().items():
            if isinstance(value, list) and len(value) == config.num_hidden_layers:
                setattr(config, name, value[:layers])
        config.num_hidden_layers = layers
    return config


def _config_of_shape(shape: dict) -> "PreTrainedConfig":
    from transformers import AutoConfig  # the import takes seconds, and an ID-only model has no backbone

    try:
        config = AutoConfig.for_model(**shape)
        check_config(config)
    except Exception as error:  # configs raise exceptions of several libraries for invalid fields
        raise ArgumentError(f"shape: {first_line(error)}: give a config that transformers knows") from error
    return config


def _random(config: "PreTrainedConfig") -> "PreTrainedModel":
    from transformers import AutoModel

    return AutoModel.from_config(config, trust_remote_code=False)
