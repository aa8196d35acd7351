"""The one place where a model meets ranks and devices: tables are sharded, dense parts replicated or sharded.

TorchRec's planner places the tables (row counts decide: small ones are replicated and belong to the dense
optimizer, the others are sharded and step inside the backward pass). DDP or FSDP2 covers the rest.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torch.distributed.tensor import DTensor
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

from hllm_torchrec.config import Config, FeatureConfig, OptimConfig
from hllm_torchrec.errors import ConfigError
from hllm_torchrec.joining import join
from hllm_torchrec.model import HLLM
from hllm_torchrec.modules import pointwise_attention
from hllm_torchrec.modules.attention_backends import Choice, choose_backend
from hllm_torchrec.modules.frozen_items import FROZEN_ITEMS, FrozenItems
from hllm_torchrec.modules.hstu import HSTU
from hllm_torchrec.modules.user_encoder import UserEncoder
from hllm_torchrec.quiet import quiet_libraries
from hllm_torchrec.ranks import on_rank_zero
from hllm_torchrec.table_memory import TABLE_OPTIMIZERS, TableEnumerator

NOT_FOR_TABLES = 0.4
"""Share of each device's memory that the planner leaves to the dense parts and activations."""


FROZEN_COLUMNS = 64
"""A frozen item table is cut by columns into parts of at least this width."""


class TableSettings(Protocol):
    """What sharding and stepping tables takes of a configuration: a `Config`, or a baseline's own."""

    @property
    def features(self) -> FeatureConfig:
        """Of it: `shard_from_rows`, `sharding`."""

    @property
    def optim(self) -> OptimConfig:
        """Of it: `table_optimizer`, `table_lr`."""


def start_process(timeout: float = 600.0) -> torch.device:
    """Join the job that torchrun (or TorchX) started, or make a job of one; returns this rank's device.

    timeout: seconds that a rank waits for the others, here and in every later collective.

    Raises:
        ConnectionError: the ranks did not come together; says which address and what to do.
    """
    quiet_libraries()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            _join(backend, timedelta(seconds=timeout))
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def _join(backend: str, timeout: timedelta) -> None:
    """Initialise the process group from the environment."""
    try:
        join(backend, timeout)
    except (RuntimeError, ValueError, TimeoutError) as error:  # torch's DistError is a RuntimeError
        names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
        address, port, rank, world = (os.environ.get(name, "?") for name in names)
        cause = "it is in use: choose another" if "EADDRINUSE" in str(error) else str(error).splitlines()[0]
        raise ConnectionError(
            f"rank {rank} of {world} could not join the others at {address}:{port}: {cause}. The port is "
            "--rdzv_port of torchx, --master_port of torchrun; all ranks must reach it"
        ) from error


def stop_process() -> None:
    """Leave the job."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def process(timeout: float = 600.0) -> Iterator[torch.device]:
    """A context in which this process is a rank of a job, on the device given; raises as `start_process`."""
    device = start_process(timeout)
    try:
        yield device
    finally:
        stop_process()


def check_tables(config: TableSettings, device: torch.device) -> list[str]:
    """Problems of the table settings on this device, one line each."""
    problems = []
    optimizer, sharding = config.optim.table_optimizer, config.features.sharding
    if device.type == "cpu" and TABLE_OPTIMIZERS[optimizer].cuda_only:
        problems.append(
            f"optim.table_optimizer: {optimizer!r}: FBGEMM has it on CUDA only; on a CPU choose "
            "rowwise_adagrad, adagrad or sgd"
        )
    if device.type == "cpu" and sharding == "row_wise":
        problems.append(
            "features.sharding: 'row_wise': TorchRec's CPU tables have no row-wise bags; choose table_wise or "
            "column_wise"
        )
    return problems


def parallelize(model: HLLM, config: Config, device: torch.device) -> DistributedModelParallel:
    """Shard, replicate and place `model` over the ranks of the process group.

    Raises:
        ConfigError: a plan that the device or the optimizer cannot do.
    """
    problems = check_tables(config, device)
    if config.parallel.dense == "fsdp" and device.type == "cpu" and torch.__version__.startswith("2.11."):
        problems.append(
            f"parallel.dense: fsdp: torch {torch.__version__} fails at it on a CPU; take 2.12 or later, or ddp"
        )
    if problems:
        raise ConfigError(problems)
    if model.item_llm is not None:
        model.item_llm.attention = choose_attention(config, device)
    user_attention(model.user, device)
    if config.parallel.activation_checkpointing:
        for part in (model.item_llm, model.user):
            if isinstance(part, UserEncoder):
                part.recompute = True
            elif part is not None:
                part.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    if config.parallel.compile:
        for layer in llm_layers(model):
            layer.compile(dynamic=True)
    tables = model.features.tables
    if tables is not None:
        give_sharded_tables_an_optimizer(tables, config)
    sharder: ModuleSharder = EmbeddingBagCollectionSharder()
    plan = plan_tables(model, config, device, sharder)
    if config.parallel.dense == "fsdp":
        _shard_dense(model, device)
    learns = model.item_llm is not None and any(p.requires_grad for p in model.item_llm.parameters())
    some_unused = learns and any(stage.item_embeddings == "cached" for stage in config.stages)
    ddp = config.parallel.dense == "ddp"
    return distribute(model, plan, sharder, device, ddp=ddp, some_unused=some_unused)


def choose_attention(config: Config, device: torch.device) -> Choice:
    """The kernel of the Item LLM's attention, and why.

    Raises:
        ConfigError: the one asked for cannot run here.
    """
    try:
        return choose_backend(config.item_llm.attention, device, compute_dtype(config))
    except ValueError as error:
        raise ConfigError([str(error)]) from None


def user_attention(user: nn.Module, device: torch.device) -> str | None:
    """Which backend runs HSTU's attention, and why; None for the other encoders.

    Raises:
        ConfigError: the one asked for cannot run here.
    """
    if not isinstance(user, HSTU):
        return None
    try:
        return pointwise_attention.choose_backend(user.shape.backend, device)[1]
    except ValueError as error:
        raise ConfigError([str(error)]) from None


def distribute(
    model: nn.Module,
    plan: ShardingPlan,
    sharder: ModuleSharder,
    device: torch.device,
    *,
    ddp: bool = True,
    some_unused: bool = False,
) -> DistributedModelParallel:
    """Place tables by `plan`; replicate the rest with DDP, or leave it as it is (FSDP2 has been applied).

    some_unused: whether there are steps in which no rank uses some of the trainable weights.
    """
    assert dist.group.WORLD is not None
    wrapper = DefaultDataParallelWrapper(static_graph=False, find_unused_parameters=some_unused)
    return DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=device,
        plan=plan,
        sharders=[sharder],
        init_data_parallel=ddp,
        data_parallel_wrapper=wrapper,
    )


def shard_frozen_items(items: FrozenItems, device: torch.device) -> DistributedModelParallel:
    """Spread the table over the ranks as TorchRec's planner sees fit; it has no optimizer and no replica."""
    kinds = [kind.value for kind in _sharded_kinds(device.type)]
    constraint = ParameterConstraints(
        sharding_types=kinds, compute_kernels=[EmbeddingComputeKernel.FUSED.value], min_partition=FROZEN_COLUMNS
    )
    sharder: ModuleSharder = EmbeddingBagCollectionSharder()
    plan = _plan(items, {FROZEN_ITEMS: constraint}, device, sharder)
    return distribute(items, plan, sharder, device, ddp=False)


def plan_tables(model: nn.Module, config: TableSettings, device: torch.device, sharder: ModuleSharder) -> ShardingPlan:
    """TorchRec's plan for all ranks: data parallel under `features.shard_from_rows`, sharded from there on. Collective.

    Raises:
        ConfigError: the tables do not fit into the ranks' memory.
    """
    return _plan(model, table_constraints(model, config, device.type), device, sharder)


def table_constraints(model: nn.Module, config: TableSettings, device: str) -> dict[str, ParameterConstraints]:
    """How each table may be placed on a kind of device ("cpu" or "cuda")."""
    return {name: _constraint(rows, config, device) for name, rows in _tables(model)}


def _plan(
    model: nn.Module, constraints: dict[str, ParameterConstraints], device: torch.device, sharder: ModuleSharder
) -> ShardingPlan:
    world = dist.get_world_size()
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    hardware = hardware_of(device, local_world)
    return on_rank_zero(
        lambda: place_tables(model, constraints, device.type, sharder, TrainerConfig(world, local_world), hardware)
    )


def hardware_of(device: torch.device, local_world: int) -> HardwareConfig:
    """Memory of a rank: of its GPU (what TorchRec assumes, where there is none here), and its share of the host's."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local_world
    if device.type != "cuda" or not torch.cuda.is_available():
        return HardwareConfig(ddr_cap_bytes=host)
    return HardwareConfig(torch.cuda.get_device_properties(device).total_memory, host)


def place_tables(
    model: nn.Module,
    constraints: dict[str, ParameterConstraints],
    device: str,
    sharder: ModuleSharder,
    ranks: TrainerConfig,
    hardware: HardwareConfig,
) -> ShardingPlan:
    """The plan of TorchRec's planner for `ranks` of `hardware`, which need not be there.

    Raises:
        ConfigError: the tables do not fit.
    """
    topology = TopologyFactory.create_topology(ranks, hardware, KernelConfig(compute_device=device))
    planner = EmbeddingShardingPlanner(
        topology=topology,
        enumerator=TableEnumerator(topology, BATCH_SIZE, constraints),
        constraints=constraints,
        storage_reservation=FixedPercentageStorageReservation(NOT_FOR_TABLES),
        debug=False,
    )
    try:
        return planner.plan(model, [sharder])
    except PlannerError as error:
        memory = (hardware.hbm_cap_bytes if device == "cuda" else hardware.ddr_cap_bytes) or 0
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        raise ConfigError(
            [
                f"features: TorchRec cannot place the tables on {ranks.world_size} ranks of {memory / 1e9:.1f} GB, of "
                f"which {1 - NOT_FOR_TABLES:.0%} are for tables: {reason}; take features.sharding: "
                "auto, more ranks, narrower tables, or features.table_dtype: fp16"
            ]
        ) from error


def _tables(model: nn.Module) -> Iterable[tuple[str, int]]:
    for module in model.modules():
        if isinstance(module, EmbeddingBagCollection):
            for table in module.embedding_bag_configs():
                yield table.name, table.num_embeddings


def _constraint(rows: int, config: TableSettings, device: str) -> ParameterConstraints:
    if rows < config.features.shard_from_rows:
        return ParameterConstraints(
            sharding_types=[ShardingType.DATA_PARALLEL.value],
            compute_kernels=[EmbeddingComputeKernel.DENSE.value],
        )
    sharding = config.features.sharding
    names = [kind.value for kind in _sharded_kinds(device)] if sharding == "auto" else [sharding]
    return ParameterConstraints(sharding_types=names, compute_kernels=[EmbeddingComputeKernel.FUSED.value])


def _sharded_kinds(device: str) -> list[ShardingType]:
    """How bags can be sharded on a kind of device."""
    on_cuda = [ShardingType.ROW_WISE, ShardingType.TABLE_ROW_WISE] if device == "cuda" else []
    return [ShardingType.TABLE_WISE, ShardingType.COLUMN_WISE, *on_cuda]


def give_sharded_tables_an_optimizer(tables: EmbeddingBagCollection, config: TableSettings) -> None:
    """Give each table its in-backward optimizer, but for data parallel ones (the dense optimizer's)."""
    chosen, lr = TABLE_OPTIMIZERS[config.optim.table_optimizer].optimizer, config.optim.table_lr
    for table in tables.embedding_bag_configs():
        if table.num_embeddings >= config.features.shard_from_rows:
            weight = tables.embedding_bags[table.name].weight
            apply_optimizer_in_backward(chosen, [weight], {"lr": lr})


def llm_layers(model: HLLM) -> list[nn.Module]:
    """The layers of both LLMs (or of what stands in the User LLM's place), first to last."""
    found: list[nn.Module] = []
    for part in (model.item_llm, model.user):
        if isinstance(part, UserEncoder):
            found += part.layers
        elif part is not None:
            found += part.backbone.layers if hasattr(part.backbone, "layers") else part.backbone.encoder.layer
    return found


def _shard_dense(model: HLLM, device: torch.device) -> None:
    """FSDP2: every layer of both LLMs is a group; the root's has the rest (words, heads, projections).

    The tables are TorchRec's. The root gives its weights up after the forward pass like any other: kept, they
    would go stale where weights are changed between two forward passes (averaged weights in evaluation).
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in llm_layers(model):
        fully_shard(layer, mesh=mesh)
    tables = set() if model.features.tables is None else set(model.features.tables.parameters())
    fully_shard(model, mesh=mesh, ignored_params=tables, reshard_after_forward=True)
    register_fsdp_forward_method(model, "embed_items")
    for name in ("embed_in_feature_space", "look_up_items", "embed_users"):
        register_fsdp_forward_method(model, name)


def whole(tensor: Tensor) -> Tensor:
    """A dense parameter with all of its rows [n, ...], also where FSDP2 has sharded it. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compute_dtype(config: Config) -> torch.dtype:
    """What the LLMs' matrix products run in."""
    return torch.bfloat16 if config.parallel.precision == "bf16" else torch.float32


def autocast(config: Config, device: torch.device) -> AbstractContextManager[None]:
    """The forward pass's precision."""
    dtype = compute_dtype(config)
    return nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype=dtype)
