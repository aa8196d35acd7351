"""Distribution of a model over ranks and devices: tables are sharded, dense parts replicated or sharded.

Tables with fewer than `features.shard_from_rows` rows are replicated and belong to the dense optimizer; the others are
sharded and updated inside the backward pass. DDP or FSDP2 wraps the dense parts.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torchrec.distributed.model_parallel import DistributedModelParallel

from hllm_torchrec.common.errors import ConfigError, configured_by
from hllm_torchrec.config.creative import CreativeConfig
from hllm_torchrec.config.encoders import ItemLLMConfig
from hllm_torchrec.config.schema import Config
from hllm_torchrec.embedding.optimizers import TableSettings, apply_hash_table_optimizer, apply_table_optimizer
from hllm_torchrec.embedding.sharding import (
    check_hash_tables,
    check_tables,
    distribute,
    plan_table_sharding,
    warn_without_effect,
)
from hllm_torchrec.models.hllm import HLLM
from hllm_torchrec.modules.attention.text_backends import BackendChoice, choose_text_backend
from hllm_torchrec.modules.creative.creative_llm import CreativeLLM
from hllm_torchrec.modules.encoders.base import UserEncoder
from hllm_torchrec.modules.encoders.fused_products import compiled_elementwise
from hllm_torchrec.modules.encoders.item_llm import ItemLLM


def parallelize(model: HLLM, config: Config, device: torch.device) -> DistributedModelParallel:
    """Shard, replicate and place `model` over the ranks of the process group.

    Raises:
        ConfigError: the device or the optimizer does not support the configured parallelism.
    """
    settings = TableSettings.of(config)
    problems = check_tables(settings, device) + check_hash_tables(model.features.hash_tables, dist.get_world_size())
    if config.parallel.dense == "fsdp" and device.type == "cpu" and torch.__version__.startswith("2.11."):
        problems.append(
            f"parallel.dense: fsdp: torch {torch.__version__} fails at it on a CPU; take 2.12 or later, or ddp"
        )
    problems += _padded_problems(model, config)
    if problems:
        raise ConfigError(problems)
    for part in model.named_backbones():
        if isinstance(part.module, ItemLLM | CreativeLLM) and isinstance(part.section, ItemLLMConfig | CreativeConfig):
            part.module.attention = choose_attention(part.name, part.section, config, device, part.module.caps_scores)
    user_attention(model.user, device)
    if config.parallel.activation_checkpointing:
        for part in model.named_backbones():
            part.module.recompute_activations()
    if config.parallel.compile:
        _compile_layers(model, config, device)
    # Before sharding: TorchRec fuses the optimizer into the sharded tables' backward pass.
    tables = model.features.tables
    if tables is not None:
        apply_table_optimizer(tables, settings)
    if model.features.hashed is not None:
        apply_hash_table_optimizer(model.features.hashed, settings)
    plan = plan_table_sharding(model, settings, device)
    warn_without_effect(plan, settings)
    if config.parallel.dense == "fsdp":
        _shard_dense(model, device)
    # In a stage with cached items the Item LLM gets no gradients, for which DDP would wait without this option.
    readers = [part.module for part in model.named_backbones() if part.module.reads_text]
    learns = any(p.requires_grad for module in readers for p in module.parameters())
    some_unused = learns and any(stage.item_embeddings == "cached" for stage in config.stages)
    ddp = config.parallel.dense == "ddp"
    return distribute(model, plan, device, ddp=ddp, find_unused_parameters=some_unused)


def _padded_problems(model: HLLM, config: Config) -> Iterator[str]:
    """Yield a message for each LLM whose number of forward passes differs between ranks, which FSDP2 does not allow."""
    for part in model.named_backbones():
        llm = part.module
        if isinstance(llm, ItemLLM) and llm.arrangement != "packed" and config.parallel.dense == "fsdp":
            yield (
                f"parallel.dense: fsdp: {llm.backbone.config.model_type} as {part.name} cannot be packed, and its "
                "padded batches differ in number between ranks: write ddp, or choose a model that can be packed "
                "(docs/support.md)"
            )


def choose_attention(
    name: str, section: ItemLLMConfig | CreativeConfig, config: Config, device: torch.device, caps_scores: bool = False
) -> BackendChoice:
    """Choose the attention kernel of an LLM that reads text; also returns the reason. name: name of its section.

    caps_scores: see `ItemLLM.caps_scores`.

    Raises:
        ConfigError: the configured kernel cannot run on this device or in this dtype.
    """
    try:
        with configured_by(name):
            return choose_text_backend(section.attention, device, compute_dtype(config), caps_scores)
    except ValueError as error:
        raise ConfigError(f"{error}; parallel.precision is {config.parallel.precision}") from None


def user_attention(user: UserEncoder, device: torch.device) -> str | None:
    """The attention backend of the user encoder, with the reason; None if the encoder has only one backend.

    Raises:
        ConfigError: the configured backend cannot run on this device.
    """
    try:
        with configured_by("user.shape"):
            return user.attention_backend(device)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def llm_layers(model: HLLM) -> list[nn.Module]:
    """The layers of the LLMs and the user encoder, first to last."""
    return [layer for part in model.named_backbones() for layer in part.module.blocks()]


def _compile_layers(model: HLLM, config: Config, device: torch.device) -> None:
    """Compile the layers of the LLMs; of layers that run fused (bfloat16 on a CPU), only the elementwise functions."""
    # Imported here, because it imports transformers, which runs without an LLM do not need.
    from hllm_torchrec.modules.encoders.fused_llama import FusedLlamaLayer

    in_bf16 = device.type == "cpu" and compute_dtype(config) is torch.bfloat16
    for layer in llm_layers(model):
        if in_bf16 and isinstance(layer, FusedLlamaLayer) and layer.is_plain():
            layer.elementwise = compiled_elementwise()
        else:
            layer.compile(dynamic=True)


def _shard_dense(model: HLLM, device: torch.device) -> None:
    """Apply FSDP2: each layer of the LLMs is a group; the root group has all other weights (words, heads, projections).

    Tables are sharded by TorchRec and ignored here. The root group is resharded after the forward pass too: otherwise
    its gathered weights would be stale when weights change between two forward passes (averages in evaluation).
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in llm_layers(model):
        fully_shard(layer, mesh=mesh)
    kinds = (model.features.tables, model.features.hashed)
    tables = {parameter for kind in kinds if kind is not None for parameter in kind.parameters()}
    fully_shard(model, mesh=mesh, ignored_params=tables, reshard_after_forward=True)
    # These methods are called outside of forward() and need its hooks to gather the weights.
    for name in ("embed_items", "embed_in_feature_space", "embed_users", "score_texts"):
        register_fsdp_forward_method(model, name)


def compute_dtype(config: Config) -> torch.dtype:
    """Dtype of the LLMs' matrix products."""
    return torch.bfloat16 if config.parallel.precision == "bf16" else torch.float32


def autocast(config: Config, device: torch.device) -> AbstractContextManager[None]:
    """Context manager of the forward pass's precision."""
    dtype = compute_dtype(config)
    return nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype=dtype)
