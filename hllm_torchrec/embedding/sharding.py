"""Sharding of embedding tables by TorchRec's planner, and DistributedModelParallel (DMP) around the model."""

import logging
import os
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper, DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.constants import BATCH_SIZE
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    PlannerError,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import ModuleSharder, ShardingEnv, ShardingPlan, ShardingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingCollection

from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.config.table_optimizers import TABLE_OPTIMIZERS
from hllm_torchrec.distributed.coordination import run_on_rank_zero
from hllm_torchrec.embedding.hash_tables import HashTableSharder
from hllm_torchrec.embedding.memory import TableEnumerator
from hllm_torchrec.embedding.optimizers import TableSettings
from hllm_torchrec.modules.features.frozen_items import FROZEN_ITEMS, FrozenItems
from hllm_torchrec.modules.features.hash_tables import HashTable, hash_ranks_problem

_logger = logging.getLogger(__name__)

RESERVED_MEMORY_SHARE = 0.4
"""Share of each device's memory that the planner reserves for dense parameters and activations."""

FROZEN_COLUMNS = 64
"""Smallest width of a column shard of a frozen item table."""


def check_tables(settings: TableSettings, device: torch.device) -> list[str]:
    """Return problems of the table settings on this device, one line each."""
    problems = []
    optimizer, sharding = settings.optimizer, settings.sharding
    if device.type == "cpu" and TABLE_OPTIMIZERS[optimizer].cuda_only:
        on_cpu = ", ".join(name for name, kind in TABLE_OPTIMIZERS.items() if not kind.cuda_only)
        problems.append(f"optim.table_optimizer: {optimizer!r}: FBGEMM has it on CUDA only; on a CPU choose {on_cpu}")
    if device.type == "cpu" and sharding == "row_wise":
        problems.append(
            "features.sharding: 'row_wise': TorchRec's CPU tables have no row-wise bags; choose table_wise or "
            "column_wise"
        )
    return problems


def check_hash_tables(tables: Mapping[str, HashTable], ranks: int) -> list[str]:
    """Return problems of tables of kind hash with this number of ranks, one line each."""
    wrong = ((name, table) for name, table in tables.items() if table.sets % ranks)
    return [f"features.tables.{name}: {hash_ranks_problem(ranks, table)}" for name, table in wrong]


def table_sharders() -> list[ModuleSharder]:
    """Return the sharders of a model's tables: TorchRec's for embedding bags, and that for tables of kind hash."""
    return [EmbeddingBagCollectionSharder(), HashTableSharder()]


def distribute(
    model: nn.Module,
    plan: ShardingPlan,
    device: torch.device,
    *,
    ddp: bool = True,
    find_unused_parameters: bool = False,
) -> DistributedModelParallel:
    """Shard tables by `plan` and wrap the dense parts in DDP.

    Args:
        ddp: False if FSDP2 has been applied to the dense parts: they are then left unchanged.
        find_unused_parameters: DDP's argument: True if some steps do not use all trainable weights.
    """
    assert dist.group.WORLD is not None
    wrapper = DefaultDataParallelWrapper(static_graph=False, find_unused_parameters=find_unused_parameters)
    return DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=device,
        plan=plan,
        sharders=table_sharders(),
        init_data_parallel=ddp,
        data_parallel_wrapper=wrapper,
    )


def shard_frozen_items(items: FrozenItems, device: torch.device) -> DistributedModelParallel:
    """Shard a frozen item table, which has no optimizer, over the ranks with TorchRec's planner; never replicate it."""
    kinds = [kind.value for kind in _sharded_kinds(device.type)]
    constraint = ParameterConstraints(
        sharding_types=kinds, compute_kernels=[EmbeddingComputeKernel.FUSED.value], min_partition=FROZEN_COLUMNS
    )
    return distribute(items, _plan(items, {FROZEN_ITEMS: constraint}, device), device, ddp=False)


def plan_table_sharding(model: nn.Module, settings: TableSettings, device: torch.device) -> ShardingPlan:
    """Plan the sharding of all tables. Collective.

    Tables with fewer than `features.shard_from_rows` rows are data parallel, others are sharded. Tables of kind hash
    are always sharded by rows.

    Raises:
        ConfigError: the tables do not fit into the memory of the ranks.
    """
    return _plan(model, table_constraints(model, settings, device.type), device)


def warn_without_effect(plan: ShardingPlan, settings: TableSettings) -> None:
    """Log a warning on rank 0 if a table optimizer or options are configured but all tables are replicated."""
    kinds = {parameter.sharding_type for module in plan.plan.values() for parameter in module.values()}
    chosen = settings.options or settings.optimizer != TableSettings.optimizer
    if chosen and kinds <= {ShardingType.DATA_PARALLEL.value} and dist.get_rank() == 0:
        _logger.warning(
            "optim.table_optimizer, table_options and table_lr have no effect: no table has features.shard_from_rows "
            "(%d) rows or more, and smaller tables are updated by the dense optimizer; lower that number, or leave "
            "these settings out",
            settings.shard_from_rows,
        )


def table_constraints(model: nn.Module, settings: TableSettings, device: str) -> dict[str, ParameterConstraints]:
    """Return table -> constraints for the planner; device: "cpu" or "cuda"."""
    bags = {name: _constraint(rows, settings, device) for name, rows in _tables(model)}
    by_rows = ParameterConstraints(
        sharding_types=[ShardingType.ROW_WISE.value], compute_kernels=[EmbeddingComputeKernel.FUSED.value]
    )
    return bags | dict.fromkeys(_hash_tables(model), by_rows)


def _plan(model: nn.Module, constraints: dict[str, ParameterConstraints], device: torch.device) -> ShardingPlan:
    world = dist.get_world_size()
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    hardware = planner_hardware(device, local_world)
    # Only rank 0 plans: hosts may report different amounts of memory, but all ranks must have the same plan.
    return run_on_rank_zero(
        lambda: plan_sharding(model, constraints, device.type, TrainerConfig(world, local_world), hardware)
    )


def planner_hardware(device: torch.device, local_world: int) -> HardwareConfig:
    """Return the memory of a rank: that of its GPU (without a GPU TorchRec's default) and its share of the host's."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local_world
    if device.type != "cuda" or not torch.cuda.is_available():
        return HardwareConfig(ddr_cap_bytes=host)
    return HardwareConfig(torch.cuda.get_device_properties(device).total_memory, host)


def plan_sharding(
    model: nn.Module,
    constraints: dict[str, ParameterConstraints],
    device: str,
    trainer: TrainerConfig,
    hardware: HardwareConfig,
) -> ShardingPlan:
    """Run TorchRec's planner for the number of ranks in `trainer` and the memory in `hardware`.

    Neither needs to exist: `hllm plan` uses this function for other machines.

    Raises:
        ConfigError: the tables do not fit.
    """
    topology = TopologyFactory.create_topology(trainer, hardware, KernelConfig(compute_device=device))
    planner = EmbeddingShardingPlanner(
        topology=topology,
        enumerator=TableEnumerator(topology, BATCH_SIZE, constraints),
        constraints=constraints,
        storage_reservation=FixedPercentageStorageReservation(RESERVED_MEMORY_SHARE),
        debug=False,
    )
    try:
        return planner.plan(model, table_sharders())
    except PlannerError as error:
        memory = (hardware.hbm_cap_bytes if device == "cuda" else hardware.ddr_cap_bytes) or 0
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        raise ConfigError(
            f"features: TorchRec cannot place the tables on {trainer.world_size} ranks of {memory / 1e9:.1f} GB, of "
            f"which {1 - RESERVED_MEMORY_SHARE:.0%} are for tables: {reason}; take features.sharding: "
            "auto, more ranks, narrower tables, or features.table_dtype: fp16"
        ) from error


def _tables(model: nn.Module) -> Iterable[tuple[str, int]]:
    for module in model.modules():
        if isinstance(module, EmbeddingBagCollection):
            for table in module.embedding_bag_configs():
                yield table.name, table.num_embeddings


def _hash_tables(model: nn.Module) -> Iterable[str]:
    for module in model.modules():
        if isinstance(module, ManagedCollisionEmbeddingCollection):
            for table in module._embedding_collection.embedding_configs():
                yield table.name


def _constraint(rows: int, settings: TableSettings, device: str) -> ParameterConstraints:
    if rows < settings.shard_from_rows:
        # DENSE: a replicated table is an ordinary parameter of DDP and of the dense optimizer. FUSED (below): FBGEMM's
        # kernels apply the table optimizer inside the backward pass.
        return ParameterConstraints(
            sharding_types=[ShardingType.DATA_PARALLEL.value],
            compute_kernels=[EmbeddingComputeKernel.DENSE.value],
        )
    sharding = settings.sharding
    names = [kind.value for kind in _sharded_kinds(device)] if sharding == "auto" else [sharding]
    return ParameterConstraints(sharding_types=names, compute_kernels=[EmbeddingComputeKernel.FUSED.value])


def _sharded_kinds(device: str) -> list[ShardingType]:
    """Return the sharding types that TorchRec's embedding bags support; device: "cpu" or "cuda"."""
    on_cuda = [ShardingType.ROW_WISE, ShardingType.TABLE_ROW_WISE] if device == "cuda" else []
    return [ShardingType.TABLE_WISE, ShardingType.COLUMN_WISE, *on_cuda]
