"""Estimates memory of a rank, traffic and time of a step for a configuration on hypothetical hardware.

    memory = weights (with those that FSDP2 gathers) + gradients + optimizer + averages + tables and their outputs
             + activations + feature rows + item embeddings + loss

Nothing of the model's size is allocated. Weights are counted on a model on the meta device; tables are placed by
TorchRec's planner for hypothetical ranks; activations are the tensors that autograd would save (`activations.py`).
Sizes are in bytes, times in seconds, rates per second.

Prompts and responses of creatives are taken at their largest lengths, and their passes are added to those of the
batch of `data.batch_users` pieces.

Legend: W ranks, N events of a piece, L tokens of an item.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torchrec.distributed.planner.types import HardwareConfig, TrainerConfig
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingPlan

from hllm_torchrec.config.creative import CreativeConfig
from hllm_torchrec.config.encoders import ItemLLMConfig
from hllm_torchrec.config.schema import Config, StageConfig
from hllm_torchrec.embedding.memory import bytes_per_row
from hllm_torchrec.embedding.optimizers import TableSettings, apply_hash_table_optimizer, apply_table_optimizer
from hllm_torchrec.embedding.sharding import plan_sharding, table_constraints
from hllm_torchrec.models.build import build_model
from hllm_torchrec.models.hllm import HLLM
from hllm_torchrec.models.named_backbones import NamedBackbone
from hllm_torchrec.models.parallelize import llm_layers
from hllm_torchrec.modules.creative.creative_llm import CreativeLLM
from hllm_torchrec.modules.encoders.backbone import backbone_flops
from hllm_torchrec.modules.encoders.item_llm import ItemLLM
from hllm_torchrec.modules.losses.objectives import MOST_LOGITS
from hllm_torchrec.planning.activations import decoder_activation_bytes, encoder_activation_bytes
from hllm_torchrec.planning.model_configs import with_model_configs
from hllm_torchrec.planning.traffic import shards_of, table_traffic


@dataclass(frozen=True)
class Machine:
    """Ranks and the hardware of each.

    memory: bytes; flops: operations/s of matrix products; intra, inter: bytes/s to ranks of the same node and of other
    nodes. Rates are the manufacturers' figures; `efficiency`: share of `flops` that training is expected to reach.
    """

    nodes: int
    ranks: int
    """Ranks per node."""
    memory: float
    flops: float
    intra: float
    inter: float
    is_gpu: bool = True
    efficiency: float = 0.4

    @property
    def world_size(self) -> int:
        """Number of ranks, W."""
        return self.nodes * self.ranks

    @property
    def bandwidth(self) -> float:
        """Bytes/s of the slowest link that an exchange among all ranks uses."""
        return self.inter if self.nodes > 1 else self.intra


HARDWARE: dict[str, dict[str, Any]] = {
    "h100": {"memory": 80e9, "flops": 989e12, "intra": 450e9, "inter": 50e9},
    "a100": {"memory": 80e9, "flops": 312e12, "intra": 300e9, "inter": 25e9},
    "cpu": {"memory": 16e9, "flops": 75e9, "intra": 5e9, "inter": 1e9, "is_gpu": False},
}
"""Manufacturers' figures per GPU (dense bf16; NVLink one way; 400 or 200 Gbit/s network); cpu: one core, fp32."""


@dataclass(frozen=True)
class Workload:
    """Statistics of the data. items, users: numbers of them; item_tokens: mean L; history: mean N, up to `max_history`.

    popularity: number of events of each item, if known; otherwise items count as equally frequent. peak_to_mean:
    events of the largest step divided by those of the mean step; memory is estimated for the largest, traffic and time
    for the mean.
    """

    items: int
    users: int
    item_tokens: float
    history: float
    popularity: NDArray[np.int64] | None = None
    peak_to_mean: float = 1.0

    def unique(self, events: float, negatives: float) -> float:
        """Expected number of distinct items in `events` events and `negatives` draws from the complete catalogue."""
        # An item with share p is missed by n events with probability (1 - p)^n, and by k uniform draws with exp(-k /
        # items).
        missed = np.array([self.items]) * math.exp(-events / self.items)
        if self.popularity is not None:
            missed = np.exp(events * np.log1p(-self.popularity / max(1, self.popularity.sum())))
        return self.items - float(missed.sum()) * math.exp(-negatives / self.items)


@dataclass(frozen=True)
class Estimate:
    """Result of `estimate`.

    memory: bytes on the rank with the most, by purpose. traffic: bytes sent by a rank in a step, by purpose. seconds:
    {"compute", "traffic"} of a step, which overlap in part. counts: quantities behind the estimates. tables: placement
    of each table by the planner, as text.
    """

    memory: dict[str, float]
    traffic: dict[str, float]
    seconds: dict[str, float]
    counts: dict[str, float]
    tables: dict[str, str]
    shards: list[tuple[str, int, int, int]] = field(default_factory=list)
    """(table, rank, rows, columns) of each shard."""

    @property
    def peak(self) -> float:
        """Bytes on the rank with the most."""
        return sum(self.memory.values())


def estimate(config: Config, work: Workload, machine: Machine, tables: dict[str, int]) -> Estimate:
    """Estimate memory, traffic and time of a training step.

    Args:
        config: its `pretrained` directories need not exist if their names begin with a name in MODEL_CONFIGS.
        tables: {categorical feature: rows}, as `BatchSpec.tables` gives.

    Raises:
        ValueError: the shape of a model is unknown, or TorchRec's planner cannot place the tables.
    """
    config = with_model_configs(config)
    with torch.device("meta"):
        model = build_model(config, tables, 0.5, torch.device("meta"))
    counts = _counts(config, work, machine)
    plan, placed = _place_tables(model, config, machine)
    memory = _weights(model, config, machine.world_size) | {"tables": _table_bytes(model, plan, config)}
    fullest = _counts(config, replace(work, history=work.history * work.peak_to_mean), machine)
    memory |= _activations(model, config, fullest)
    memory |= _rows(model, config, fullest)
    traffic = _traffic(model, config, counts, machine)
    slots = counts["positions"] + counts["queries"]
    rates = (machine.intra, machine.bandwidth)
    exchanged = table_traffic(_shardings(plan), slots, machine.world_size, machine.ranks, rates)
    memory["table outputs"] = exchanged.held
    traffic |= {"table rows": exchanged.across, "table rows in a node": exchanged.within}
    flops = _flops(model, config, counts)
    seconds = {
        "compute": flops / (machine.flops * machine.efficiency),
        "traffic": sum(
            size / (rates[0] if name == "table rows in a node" else rates[1]) for name, size in traffic.items()
        ),
    }
    return Estimate(memory, traffic, seconds, counts | {"flops": flops}, placed, shards_of(_shardings(plan)))


def planned_stage(config: Config) -> StageConfig:
    """Return the first stage that trains the Item LLM, or else the first stage."""
    return next((stage for stage in config.stages if stage.item_embeddings == "trained"), config.stages[0])


def _counts(config: Config, work: Workload, machine: Machine) -> dict[str, float]:
    """Compute the quantities of a step on one rank, in the planned stage."""
    stage = planned_stage(config)
    history = min(work.history, stage.max_history or config.data.max_history)
    pieces: float = stage.batch_users or config.data.batch_users
    if config.data.batch_item_tokens and config.item_llm.enabled and not stage.batch_users:
        pieces = max(1.0, config.data.batch_item_tokens / (history * (work.item_tokens + 1)))
    positions = pieces * history
    negatives = config.objective.negatives if config.objective.generates else 0
    queries = positions if config.objective.has_head else 0.0  # nearly every event is an exposure
    unique = work.unique(positions * machine.world_size, negatives)
    trains = config.item_llm.enabled and stage.item_embeddings == "trained"
    encoded = unique / machine.world_size if trains else 0.0
    tokens = work.item_tokens + (config.item_llm.pooling in ("item", None))
    return {
        "creatives": float(config.creative.per_batch * config.creative.enabled),
        "pieces": pieces,
        "history": history,
        "positions": positions,
        "queries": queries,
        "negatives": negatives,
        "unique_items": unique,
        "needed_items": work.unique(positions, negatives),
        "encoded_items": encoded,
        "item_tokens": encoded * tokens,
        "tokens_of_item": tokens,
    }


# ---------------------------------------------------------------------- weights and tables


def _dense(model: HLLM) -> Iterator[tuple[str, nn.Parameter]]:
    tables = ("features.tables.", "features.hashed.")
    return ((name, p) for name, p in model.named_parameters() if not name.startswith(tables))


def _weights(model: HLLM, config: Config, world: int) -> dict[str, float]:
    """Compute the memory of the dense parts: fp32 weights, gradients, Adam's two moments and running averages."""
    shards = world if config.parallel.dense == "fsdp" else 1
    everything = sum(p.numel() for _, p in _dense(model)) / shards
    trained = sum(p.numel() for _, p in _dense(model) if p.requires_grad) / shards
    left_out = tuple(f"{part.name}." for part in model.named_backbones() if part.module.reads_text)
    averaged = sum(p.numel() for name, p in _dense(model) if not name.startswith(left_out)) / shards
    found = {"weights": 4 * everything, "gradients": 4 * trained, "optimizer": 8 * trained}
    if config.optim.ema:
        found["averages"] = 4 * averaged
    # FSDP2 gathers the running layer and prefetches the next one; weights outside of the layers stay gathered.
    if config.parallel.dense == "fsdp":
        layers = [sum(p.numel() for p in layer.parameters()) for layer in llm_layers(model)]
        outside = sum(p.numel() for _, p in _dense(model)) - sum(layers)
        found["gathered weights"] = 4.0 * (2 * max(layers, default=0) + outside)
    return found


def _place_tables(model: HLLM, config: Config, machine: Machine) -> tuple[ShardingPlan, dict[str, str]]:
    """Plan the tables for all ranks; also return the placement of each table as text."""
    tables, hashed = model.features.tables, model.features.hashed
    if tables is None and hashed is None:
        return ShardingPlan({}), {}
    device = "cuda" if machine.is_gpu else "cpu"
    settings = TableSettings.of(config)
    if tables is not None:
        apply_table_optimizer(tables, settings)
    if hashed is not None:
        apply_hash_table_optimizer(hashed, settings)
    memory = round(machine.memory)
    plan = plan_sharding(
        model,
        table_constraints(model, settings, device),
        device,
        TrainerConfig(machine.world_size, machine.ranks),
        HardwareConfig(hbm_cap_bytes=memory if machine.is_gpu else 0, ddr_cap_bytes=memory),
    )
    placed = {}
    for name, sharding in _shardings(plan):
        where = "every rank" if sharding.sharding_type == "data_parallel" else f"{len(set(sharding.ranks))} ranks"
        placed[name] = f"{sharding.sharding_type} on {where}"
    return plan, placed


def _shardings(plan: ShardingPlan) -> Iterator[tuple[str, Any]]:
    for module in plan.plan.values():
        assert isinstance(module, EmbeddingModuleShardingPlan)
        yield from module.items()


def _table_bytes(model: HLLM, plan: ShardingPlan, config: Config) -> float:
    """Bytes of tables on the rank with the most: weights, optimizer state, and gradients of replicated tables."""
    by_rank: Counter[int] = Counter()
    replicated = 0.0
    for name, sharding in _shardings(plan):
        if sharding.sharding_spec is None:
            assert model.features.tables is not None
            # float32 weight, gradient and Adam's two moments: replicated tables belong to the dense optimizer.
            replicated += 16.0 * model.features.tables.embedding_bags[name].weight.numel()
            continue
        for shard in sharding.sharding_spec.shards:
            rows, columns = shard.shard_sizes
            row = bytes_per_row(columns, config.optim.table_optimizer, config.features.table_dtype)
            by_rank[shard.placement.rank()] += rows * row.total
    return replicated + max(by_rank.values(), default=0)


# ---------------------------------------------------------------------- activations and rows


def _activations(model: HLLM, config: Config, counts: dict[str, float]) -> dict[str, float]:
    """Estimate the bytes that autograd saves for each LLM and user encoder, and a layer's largest temporary memory.

    An Item LLM that is not trained is left out.
    """
    found, recomputes = {}, config.parallel.activation_checkpointing
    for part in model.named_backbones():
        module, section = part.module, part.section
        if isinstance(module, ItemLLM):
            assert isinstance(section, ItemLLMConfig)
            if not (counts["item_tokens"] and section.trainable):
                continue
            items = counts["encoded_items"] * section.trained_share
            if section.items_at_once:
                items = min(items, section.items_at_once)
            length = max(1, round(counts["tokens_of_item"]))
            kept = decoder_activation_bytes(module.backbone.config, length, config)
            found[f"{part.title} activations"] = kept.total(items, recomputes, module.reads_rows)
            continue
        if isinstance(module, CreativeLLM):
            # Gradients pass through a frozen Creative LLM to the soft tokens, so its activations are saved, too.
            kinds = (
                decoder_activation_bytes(module.backbone.config, n, config) for n in _text_lengths(config.creative)
            )
            found[f"{part.title} activations"] = sum(kept.total(counts["creatives"], recomputes) for kept in kinds)
            continue
        length = max(1, round((counts["positions"] + counts["queries"]) / counts["pieces"]))
        kept = (
            encoder_activation_bytes(config, length)
            if module.backbone is None
            else decoder_activation_bytes(module.backbone.config, length, config)
        )
        found[f"{part.title} activations"] = kept.total(counts["pieces"], recomputes)
    return found


def _text_lengths(creative: CreativeConfig) -> list[int]:
    """Maximum numbers of tokens of the texts that the Creative LLM reads for a creative.

    The first text is the prompt with its response; `losses.recon` and `losses.align` read one profile each, which is
    counted without the prompt of `losses.recon`.
    """
    longest = creative.max_prompt_length + creative.soft.tokens + creative.max_response_length
    losses = (creative.losses.recon, creative.losses.align)
    return [longest] + [1 + creative.profile.max_length for weight in losses if weight]


def _rows(model: HLLM, config: Config, counts: dict[str, float]) -> dict[str, float]:
    """Estimate the memory of feature rows, exchanged item embeddings and the loss, with gradients."""
    kinds = (model.features.tables, model.features.hashed)
    number_of_tables = sum(len(kind.embedding_bag_configs()) for kind in kinds if kind is not None)
    slots = counts["positions"] + counts["queries"]
    width = model.user.width
    found = {"features": 4.0 * slots * width * (2 * number_of_tables + 4)}
    for part in _text_parts(model):
        found[f"{part.title} rows"] = 8.0 * part.module.width * (counts["needed_items"] + counts["encoded_items"])
    if model.creative is not None:
        # The response rows and their gradients, and the logits of a chunk with their slopes.
        head = model.creative.head_weight.shape[0]
        responses = counts["creatives"] * config.creative.max_response_length
        if config.creative.losses.recon:
            responses += counts["creatives"] * config.creative.profile.max_length
        found["response loss"] = 4.0 * responses * model.creative.width * 2 + 12.0 * min(MOST_LOGITS, responses * head)
    if counts["negatives"]:
        space = model.item_llm.width if model.item_llm is not None else width
        rows = 4 * counts["positions"] + 3 * counts["negatives"]
        found["loss"] = 4.0 * space * rows + 12.0 * min(MOST_LOGITS, counts["positions"] * counts["negatives"])
    return found


# ---------------------------------------------------------------------- traffic and time


def _traffic(model: HLLM, config: Config, counts: dict[str, float], machine: Machine) -> dict[str, float]:
    """Compute the bytes that a rank sends in a step."""
    others = (machine.world_size - 1) / machine.world_size
    dense = 4.0 * sum(p.numel() for _, p in _dense(model) if p.requires_grad)
    # A ring all-reduce sends 2 (W - 1) / W of the gradients' size.
    found = {"gradients": 2 * dense * others}
    if config.parallel.dense == "fsdp":  # weights for both passes, then the gradients' sums
        every = 4.0 * sum(p.numel() for _, p in _dense(model))
        found = {"weights": 2 * every * others, "gradients": dense * others}
    for part in _text_parts(model):
        found[f"{part.title} rows"] = 2 * 4.0 * part.module.width * counts["needed_items"] * others
    return found


def _flops(model: HLLM, config: Config, counts: dict[str, float]) -> float:
    """Count the operations of matrix products in a step on a rank.

    Forward and backward cost three forward passes of the trained parts, four with recomputation.
    """
    passes = 3 + config.parallel.activation_checkpointing
    flops = 0.0
    for part in model.named_backbones():
        module, section = part.module, part.section
        effort: float = passes - (section.lora.rank > 0)  # LoRA: no products for W's gradients
        if isinstance(module, ItemLLM):
            assert isinstance(section, ItemLLMConfig)
            share = section.trained_share if section.trainable else 0.0
            in_groups = 0 < section.items_at_once < counts["encoded_items"] * share
            tokens, keys = counts["item_tokens"], counts["tokens_of_item"] / 2
            effort = (effort + in_groups) * share + (1 - share)
            flops += backbone_flops(module.backbone, round(tokens), round(tokens * keys)) * effort
        elif isinstance(module, CreativeLLM):
            for length in _text_lengths(config.creative):
                tokens = counts["creatives"] * length
                flops += module.flops(round(tokens), round(tokens * length / 2)) * effort
        else:
            tokens, keys = counts["positions"] + counts["queries"], counts["history"] / 2
            flops += module.flops(round(tokens), round(tokens * keys)) * effort
    return flops


def _text_parts(model: HLLM) -> list[NamedBackbone]:
    return [part for part in model.named_backbones() if part.module.reads_text]


# ---------------------------------------------------------------------- what to do about it


def advice(config: Config, estimate: Estimate, machine: Machine) -> list[str]:
    """Suggest options that reduce memory; empty if the estimate fits into the share FILLED of the memory."""
    if estimate.peak <= FILLED * machine.memory:
        return []
    memory, said = estimate.memory, []
    states = memory["weights"] + memory["gradients"] + memory["optimizer"]
    activations = memory.get("item activations", 0.0) + memory["user activations"]
    if config.parallel.dense == "ddp" and machine.world_size > 1 and states > estimate.peak / 4:
        said.append(
            f"parallel.dense: fsdp shares {states / 1e9:,.1f} GB of weights and their state among "
            f"{machine.world_size} ranks"
        )
    if not config.parallel.activation_checkpointing and activations > estimate.peak / 4:
        said.append("parallel.activation_checkpointing: true recomputes activations, for a third more compute")
    if config.parallel.precision == "fp32" and activations > estimate.peak / 4:
        said.append("parallel.precision: bf16 halves most activations")
    if memory.get("item activations", 0.0) > estimate.peak / 4:
        room = FILLED * machine.memory - (estimate.peak - memory["item activations"])
        kept = min(estimate.counts["encoded_items"], config.item_llm.items_at_once or math.inf)
        at_once = math.floor(kept * room / memory["item activations"])
        if at_once >= 1:
            said.append(
                f"item_llm.items_at_once: {at_once} keeps that many items' activations, for a third more compute"
            )
    if activations > estimate.peak / 4 and config.data.batch_users > 1:
        said.append(
            "data.batch_users: half of it, with optim.accumulate: 2, halves activations and changes little else"
        )
    if memory["tables"] > estimate.peak / 4:
        said.append("features.table_dtype: fp16 halves the tables' weights; more ranks share them further")
    return said or ["more ranks, or a smaller model: no single option gives enough"]


FILLED = 0.9
"""Share of the memory that may be planned for; the allocator and libraries need the rest."""
