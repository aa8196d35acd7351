"""What a configuration needs on a machine that need not be there: memory of a rank, traffic and time of a step.

    memory = weights + gradients + optimizer + averages + tables + activations + the loss + exchanged rows

Nothing of the model's size is allocated. Weights are counted on a model on the meta device; tables are placed by
TorchRec's own planner for ranks that are not there; activations are what autograd would keep (see `kept`).
Sizes are bytes, times seconds, rates per second.

Legend: W ranks, B user pieces of a rank, N events of a piece, L tokens of an item.
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
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner.types import HardwareConfig, TrainerConfig
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingPlan

from hllm_torchrec.config.schema import Config, StageConfig
from hllm_torchrec.embedding.memory import bytes_per_row
from hllm_torchrec.embedding.optimizers import apply_table_optimizer
from hllm_torchrec.embedding.sharding import plan_sharding, table_constraints
from hllm_torchrec.models.build import build_model
from hllm_torchrec.models.flops import backbone_flops
from hllm_torchrec.models.hllm import HLLM
from hllm_torchrec.models.parallelize import llm_layers
from hllm_torchrec.modules.encoders.user_llm import UserLLM
from hllm_torchrec.modules.losses.objectives import MOST_LOGITS
from hllm_torchrec.planning.activations import decoder_activation_bytes, encoder_activation_bytes
from hllm_torchrec.planning.model_configs import with_model_configs
from hllm_torchrec.planning.traffic import shards_of, table_traffic


@dataclass(frozen=True)
class Machine:
    """Ranks and what each has. flops: of matrix products; intra, inter: bytes/s to ranks of its own node, of others.

    Rates are the makers' figures; `efficiency` is the share of `flops` that training is expected to reach.
    """

    nodes: int
    ranks: int
    """Of a node."""
    memory: float
    flops: float
    intra: float
    inter: float
    is_gpu: bool = True
    efficiency: float = 0.4

    @property
    def world_size(self) -> int:
        """W."""
        return self.nodes * self.ranks

    @property
    def bandwidth(self) -> float:
        """Of the slowest link that an exchange among all ranks uses."""
        return self.inter if self.nodes > 1 else self.intra


HARDWARE: dict[str, dict[str, Any]] = {
    "h100": {"memory": 80e9, "flops": 989e12, "intra": 450e9, "inter": 50e9},
    "a100": {"memory": 80e9, "flops": 312e12, "intra": 300e9, "inter": 25e9},
    "cpu": {"memory": 16e9, "flops": 75e9, "intra": 5e9, "inter": 1e9, "is_gpu": False},
}
"""Makers' figures of a GPU (dense bf16; NVLink one way; 400 or 200 Gbit/s of network each); cpu: one core, fp32."""


@dataclass(frozen=True)
class Workload:
    """What the data is like. items, users: how many; item_tokens: mean L; history: mean N, at most `max_history`.

    popularity: events of each item, where they are known; without, all items are alike. peak_to_mean: events of the
    fullest
    step over those of the mean one; memory is of the former, traffic and time are of the latter.
    """

    items: int
    users: int
    item_tokens: float
    history: float
    popularity: NDArray[np.int64] | None = None
    peak_to_mean: float = 1.0

    def unique(self, events: float, negatives: float) -> float:
        """How many different items so many events, and negatives drawn from the whole catalogue, hit on average."""
        missed = np.array([self.items]) * math.exp(-events / self.items)
        if self.popularity is not None:
            missed = np.exp(events * np.log1p(-self.popularity / max(1, self.popularity.sum())))
        return self.items - float(missed.sum()) * math.exp(-negatives / self.items)


@dataclass(frozen=True)
class Estimate:
    """memory, traffic: bytes of the fullest rank, and sent by a rank in a step, by what they are for.

    seconds: of a step: {"compute", "traffic"}, which overlap in part; counts: the quantities behind them; tables: where
    the planner puts each table, in words.
    """

    memory: dict[str, float]
    traffic: dict[str, float]
    seconds: dict[str, float]
    counts: dict[str, float]
    tables: dict[str, str]
    shards: list[tuple[str, int, int, int]] = field(default_factory=list)
    """(table, rank, rows, columns)."""

    @property
    def peak(self) -> float:
        """Bytes of the fullest rank."""
        return sum(self.memory.values())


def estimate(config: Config, work: Workload, machine: Machine, tables: dict[str, int]) -> Estimate:
    """The needs of a training step.

    Args:
        config: its `pretrained` directories may be missing where their names are of SHAPES.
        tables: {categorical feature: rows}, as `BatchSpec.tables` gives.

    Raises:
        ValueError: a model whose shape is not known, or tables that TorchRec's planner cannot place.
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
    """The first stage that trains the Item LLM, or else the first."""
    return next((stage for stage in config.stages if stage.item_embeddings == "trained"), config.stages[0])


def _counts(config: Config, work: Workload, machine: Machine) -> dict[str, float]:
    """Quantities of a step on one rank, in the planned stage."""
    stage = planned_stage(config)
    history = min(work.history, stage.max_history or config.data.max_history)
    pieces: float = stage.batch_users or config.data.batch_users
    if config.data.batch_item_tokens and config.item_llm.enabled and not stage.batch_users:
        pieces = max(1.0, config.data.batch_item_tokens / (history * (work.item_tokens + 1)))
    positions = pieces * history
    negatives = config.objective.negatives if config.objective.generates else 0
    queries = 0.0 if config.objective.fusion == "none" else positions  # nearly every event is an exposure
    unique = work.unique(positions * machine.world_size, negatives)
    trains = config.item_llm.enabled and stage.item_embeddings == "trained"
    encoded = unique / machine.world_size if trains else 0.0
    tokens = work.item_tokens + (config.item_llm.pooling == "item")
    return {
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
    return ((name, p) for name, p in model.named_parameters() if ".embedding_bags." not in name)


def _weights(model: HLLM, config: Config, world: int) -> dict[str, float]:
    """fp32 weights, gradients, Adam's two means and the running averages of the dense parts."""
    shards = world if config.parallel.dense == "fsdp" else 1
    everything = sum(p.numel() for _, p in _dense(model)) / shards
    trained = sum(p.numel() for _, p in _dense(model) if p.requires_grad) / shards
    averaged = sum(p.numel() for name, p in _dense(model) if not name.startswith("item_llm.")) / shards
    found = {"weights": 4 * everything, "gradients": 4 * trained, "optimizer": 8 * trained}
    if config.optim.ema:
        found["averages"] = 4 * averaged
    if config.parallel.dense == "fsdp":  # two layers at a time are whole, and what is in no layer
        layers = [sum(p.numel() for p in layer.parameters()) for layer in llm_layers(model)]
        outside = sum(p.numel() for _, p in _dense(model)) - sum(layers)
        found["gathered weights"] = 4.0 * (2 * max(layers, default=0) + outside)
    return found


def _place_tables(model: HLLM, config: Config, machine: Machine) -> tuple[ShardingPlan, dict[str, str]]:
    """TorchRec's plan for all ranks, and each table's place in words."""
    tables = model.features.tables
    if tables is None:
        return ShardingPlan({}), {}
    device = "cuda" if machine.is_gpu else "cpu"
    apply_table_optimizer(tables, config)
    memory = round(machine.memory)
    plan = plan_sharding(
        model,
        table_constraints(model, config, device),
        device,
        EmbeddingBagCollectionSharder(),
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
    """Of the fullest rank: weights and optimizer state; replicated tables are the dense optimizer's, with gradients."""
    by_rank: Counter[int] = Counter()
    replicated = 0.0
    for name, sharding in _shardings(plan):
        if sharding.sharding_spec is None:
            assert model.features.tables is not None
            replicated += 16.0 * model.features.tables.embedding_bags[name].weight.numel()
            continue
        for shard in sharding.sharding_spec.shards:
            rows, columns = shard.shard_sizes
            row = bytes_per_row(columns, config.optim.table_optimizer, config.features.table_dtype)
            by_rank[shard.placement.rank()] += rows * row.total
    return replicated + max(by_rank.values(), default=0)


# ---------------------------------------------------------------------- activations and rows


def _activations(model: HLLM, config: Config, counts: dict[str, float]) -> dict[str, float]:
    """What autograd keeps of both encoders, and the largest of what a layer makes and drops."""
    found = {}
    if model.item_llm is not None and counts["item_tokens"] and config.item_llm.trainable:
        length = max(1, round(counts["tokens_of_item"]))
        items = counts["encoded_items"] * config.item_llm.trained_share
        if config.item_llm.items_at_once:
            items = min(items, config.item_llm.items_at_once)
        kept = decoder_activation_bytes(model.item_llm.backbone.config, length, config)
        found["item activations"] = kept.total(
            items, config.parallel.activation_checkpointing, model.item_llm.reads_rows
        )
    tokens = counts["positions"] + counts["queries"]
    length = max(1, round(tokens / counts["pieces"]))
    if isinstance(model.user, UserLLM):
        kept = decoder_activation_bytes(model.user.backbone.config, length, config)
    else:
        kept = encoder_activation_bytes(config, length)
    found["user activations"] = kept.total(counts["pieces"], config.parallel.activation_checkpointing)
    return found


def _rows(model: HLLM, config: Config, counts: dict[str, float]) -> dict[str, float]:
    """Rows of the features, exchanged item embeddings and the loss, gradients included."""
    number_of_tables = len(model.features.tables.embedding_bag_configs()) if model.features.tables is not None else 0
    slots = counts["positions"] + counts["queries"]
    width = model.user.width
    found = {"features": 4.0 * slots * width * (2 * number_of_tables + 4)}
    if model.item_llm is not None:
        found["item rows"] = 8.0 * model.item_llm.width * (counts["needed_items"] + counts["encoded_items"])
    if counts["negatives"]:
        space = model.item_llm.width if model.item_llm is not None else width
        rows = 4 * counts["positions"] + 3 * counts["negatives"]
        found["loss"] = 4.0 * space * rows + 12.0 * min(MOST_LOGITS, counts["positions"] * counts["negatives"])
    return found


# ---------------------------------------------------------------------- traffic and time


def _traffic(model: HLLM, config: Config, counts: dict[str, float], machine: Machine) -> dict[str, float]:
    """Bytes that a rank sends in a step."""
    others = (machine.world_size - 1) / machine.world_size
    dense = 4.0 * sum(p.numel() for _, p in _dense(model) if p.requires_grad)
    found = {"gradients": 2 * dense * others}
    if config.parallel.dense == "fsdp":  # weights for both passes, then the gradients' sums
        every = 4.0 * sum(p.numel() for _, p in _dense(model))
        found = {"weights": 2 * every * others, "gradients": dense * others}
    if model.item_llm is not None:
        found["item rows"] = 2 * 4.0 * model.item_llm.width * counts["needed_items"] * others
    return found


def _flops(model: HLLM, config: Config, counts: dict[str, float]) -> float:
    """Matrix products of a step on a rank: three forward passes of what is trained, four where it is recomputed."""
    passes = 3 + config.parallel.activation_checkpointing
    adapted = {name: part.lora.rank > 0 for name, part in (("item", config.item_llm), ("user", config.user))}
    flops = 0.0
    if model.item_llm is not None:
        share = config.item_llm.trained_share if config.item_llm.trainable else 0.0
        in_groups = 0 < config.item_llm.items_at_once < counts["encoded_items"] * share
        effort = (passes + in_groups - adapted["item"]) * share + (1 - share)  # LoRA: no products for W's gradients
        flops += _decoder_flops(model.item_llm.backbone, counts["item_tokens"], counts["tokens_of_item"] / 2) * effort
    tokens, keys = counts["positions"] + counts["queries"], counts["history"] / 2
    if isinstance(model.user, UserLLM):
        return flops + _decoder_flops(model.user.backbone, tokens, keys) * (passes - adapted["user"])
    return flops + model.user.flops(round(tokens), round(tokens * keys)) * passes


def _decoder_flops(backbone: nn.Module, tokens: float, keys: float) -> float:
    return backbone_flops(backbone, round(tokens), round(tokens * keys))


# ---------------------------------------------------------------------- what to do about it


def advice(config: Config, estimate: Estimate, machine: Machine) -> list[str]:
    """Options that make it smaller, those that cost least first; empty where it fits in nine tenths of the memory."""
    if estimate.peak <= FILLED * machine.memory:
        return []
    memory, said = estimate.memory, []
    states = memory["weights"] + memory["gradients"] + memory["optimizer"]
    activations = memory.get("item activations", 0.0) + memory["user activations"]
    if config.parallel.dense == "ddp" and machine.world_size > 1 and states > estimate.peak / 4:
        said.append(
            f"parallel.dense: fsdp shares {_gigabytes(states)} of weights and their state among "
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
"""Share of the memory that may be planned for: the rest is the allocator's and the libraries'."""


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"
