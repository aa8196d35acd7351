"""Builds `HLLM` and its parts from a configuration."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from hllm_torchrec.common.errors import configured_by
from hllm_torchrec.config.creative import CreativeConfig
from hllm_torchrec.config.encoders import ItemLLMConfig, UserEncoderConfig
from hllm_torchrec.config.extensions import encoder_shape, load_user_encoder
from hllm_torchrec.config.lora import LoRAConfig
from hllm_torchrec.config.rules import takes_stored_items
from hllm_torchrec.config.schema import Config, OpenTableConfig
from hllm_torchrec.data.evidence import evidence_width
from hllm_torchrec.models.backbones import backbone_config, build_backbone
from hllm_torchrec.models.hllm import HLLM, ContextInputs
from hllm_torchrec.models.model_files import trained_item_token, vocabulary_head
from hllm_torchrec.models.tasks import Task
from hllm_torchrec.models.text_format import format_warnings, text_format
from hllm_torchrec.modules.creative.creative_llm import CreativeLLM
from hllm_torchrec.modules.encoders.base import UserEncoder
from hllm_torchrec.modules.encoders.item_llm import ItemLLM
from hllm_torchrec.modules.encoders.user_llm import UserLLM
from hllm_torchrec.modules.features.hash_tables import HashTable
from hllm_torchrec.modules.features.hybrid import ACTION_GATE, HybridFeatures
from hllm_torchrec.modules.lora import add_lora, freeze_base_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_logger = logging.getLogger(__name__)


def build_model(
    config: Config,
    tables: dict[str, int],
    base_rate: float,
    table_device: torch.device | None = None,
    vector_width: int = 0,
    tasks: Sequence[Task] | None = None,
    context: ContextInputs | None = None,
) -> HLLM:
    """Assemble the model of a configuration, on the CPU (or the default device).

    Args:
        tables: {categorical feature: rows}, see `BatchSpec.tables`.
        base_rate: probability at which the head starts: the share of positive training labels, or with drawn negatives
            1 / number of items.
        table_device: "meta" when TorchRec will shard the tables.
        vector_width: V, width of the dense item features; 0 if there are none.
        context: inputs from the context of requests; None: no context.
        tasks: tasks for the dataset's labels, see `models.tasks`; None: only the first label, with this base rate.
    """
    # With stored embeddings the Item LLM is built for its fingerprint and width, but is never trained.
    item_llm = build_text_llm("item_llm", config.item_llm, trains=not takes_stored_items(config))
    user = build_user_encoder(config.user)
    user.requires_grad_(config.user.trainable)
    # After requires_grad_: with LoRA, only the adapters and the weights outside of the backbone are trained.
    if user.backbone is not None and config.user.lora.rank and config.user.trainable:
        freeze_base_weights(user.backbone)
    open_tables = {name: OpenTableConfig(**content) for name, content in config.features.tables.items()}
    hash_tables = {name: HashTable(table.rows, table.evict_after) for name, table in open_tables.items()}
    features = HybridFeatures(
        {name: rows for name, rows in tables.items() if name != ACTION_GATE},
        user.width,
        time_depth=config.features.time_depth,
        time_width=config.features.time_width,
        numeric=len(config.data.numeric_features) + (0 if context is None else len(context.scales)),
        item_features=("item_id", *config.data.item_features),
        gate_rows=tables.get(ACTION_GATE, 0),
        scale=config.features.init_scale,
        half_from_rows=config.features.shard_from_rows if config.features.table_dtype == "fp16" else None,
        hash_tables=hash_tables,
        device=table_device,
    )
    evidence = evidence_width(config.data.evidence)
    width = 0 if item_llm is None else item_llm.width
    creative = build_creative_llm(config.creative)
    model = HLLM(item_llm, width, features, user, config, base_rate, vector_width, evidence, tasks, context, creative)
    if creative is not None:
        # Batches of creatives have no exposures and no targets, so weight decay alone would change these parts.
        unused = ("head", "value_head", "position_bias", "task_log_variances", "logit_scale")
        for name in (*unused, *(("project_next",) if model.fusion.query_is_user else ())):
            part = getattr(model, name, None)
            if part is not None:
                part.requires_grad_(False)
    return model


def build_user_encoder(user: UserEncoderConfig) -> UserEncoder:
    """Build the user encoder: the User LLM, or the encoder in `user.encoder`.

    Raises:
        ValueError: the shape is invalid for that encoder.
    """
    if user.has_backbone:
        with configured_by("user"):
            backbone = build_backbone(user.pretrained, user.shape, user.layers, word_embeddings=False)
        _adapt(backbone, user.lora, "user.lora")
        return UserLLM(backbone, user.dropout)
    with configured_by("user.shape"):
        shape = encoder_shape(user.encoder)(**(user.shape or {}))
        encoder: UserEncoder = load_user_encoder(user.encoder)(shape, user.dropout)
    return encoder


def _adapt(backbone: "PreTrainedModel", lora: LoRAConfig, section: str) -> None:
    """Add LoRA adapters to a backbone if its section has a LoRA rank."""
    if lora.rank:
        with configured_by(section):
            add_lora(backbone, lora.rank, lora.alpha, lora.dropout, lora.targets)


def build_creative_llm(section: CreativeConfig) -> CreativeLLM | None:
    """Build the Creative LLM, which writes texts; None if it is not enabled."""
    if not section.enabled:
        return None
    with configured_by("creative"):
        backbone = build_backbone(section.pretrained, section.shape, section.layers)
        if section.pretrained is not None and section.layers is not None:
            _flatten_logits(backbone, section.layers / backbone_config(section.pretrained, None).num_hidden_layers)
        head = vocabulary_head(section.pretrained, backbone)
        model = CreativeLLM(backbone, head)
    _adapt(backbone, section.lora, "creative.lora")
    model.requires_grad_(section.trainable)
    if section.lora.rank and section.trainable:
        freeze_base_weights(backbone)
    if section.freeze_words or section.lora.rank:
        backbone.get_input_embeddings().requires_grad_(False)
        if head is not None:
            head.requires_grad_(False)
    return model


def _flatten_logits(backbone: "PreTrainedModel", share: float) -> None:
    """Scale the last norm of a truncated model by the share of its layers that is left.

    Hidden states of an early layer do not fit the vocabulary head: with 4 of SmolLM2's 30 layers the loss is 37 nats
    per token, which training would first have to unlearn; with the scaled norm it is 10.9 (uniform scores: 10.8).
    """
    weight = getattr(getattr(backbone, "norm", None), "weight", None)
    if weight is not None and "gemma" not in backbone.config.model_type:  # Gemma's norms multiply by weight + 1
        with torch.no_grad():
            weight.mul_(share)


def build_text_llm(name: str, section: ItemLLMConfig, trains: bool) -> ItemLLM | None:
    """Build the LLM of a section for reading text; None if it is not enabled.

    name: name of the section; trains: False if the LLM is never trained, because item embeddings are read from a store.
    """
    if not section.enabled:
        return None
    for warning in format_warnings(name, section):
        _logger.warning(warning)
    form = text_format(name, section)
    with configured_by(name):
        backbone = build_backbone(section.pretrained, section.shape, section.layers, causal=section.causal)
    _adapt(backbone, section.lora, f"{name}.lora")
    model = ItemLLM(backbone, form.pooling, normalize=form.normalize)
    trained = trained_item_token(section.pretrained, model.item_token.numel())
    if trained is not None:
        model.item_token.data.copy_(trained)
    trains = trains and section.trainable
    model.requires_grad_(trains)
    if section.lora.rank and trains:
        freeze_base_weights(backbone)
    if section.freeze_words:
        model.backbone.get_input_embeddings().requires_grad_(False)
    return model
