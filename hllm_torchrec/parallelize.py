"""The one place where a model meets ranks and devices: tables are sharded, dense parts replicated or sharded.

TorchRec's planner places the tables (row counts decide: small ones are replicated and belong to the dense
optimizer, the others are sharded and step inside the backward pass). DDP or FSDP2 covers the rest.
"""

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions  # noqa: F401
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper, DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.types import KernelConfig, TopologyFactory, TrainerConfig
from torchrec.distributed.types import ModuleSharder, ShardingEnv, ShardingPlan, ShardingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim import Adagrad, Adam, PartialRowWiseAdam, RowWiseAdagrad

from hllm_torchrec.config import Config
from hllm_torchrec.errors import ConfigError
from hllm_torchrec.model import HLLM

CUDA_ONLY_OPTIMIZERS = ("adam", "partial_rowwise_adam")


def start_process() -> torch.device:
    """Join the job that torchrun (or TorchX) started, or make a job of one; returns this rank's device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timedelta(minutes=10))
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def stop_process() -> None:
    """Leave the job."""
    if dist.is_initialized():
        dist.destroy_process_group()


def check_tables(config: Config, device: torch.device) -> list[str]:
    """Problems of the table settings on this device, one line each."""
    problems = []
    optimizer, sharding = config.optim.table_optimizer, config.features.sharding
    if device.type == "cpu" and optimizer in CUDA_ONLY_OPTIMIZERS:
        problems.append(
            f"optim.table_optimizer: {optimizer!r}: FBGEMM has it on CUDA only; on a CPU choose rowwise_adagrad, adagrad or sgd"
        )
    if device.type == "cpu" and sharding == "row_wise":
        problems.append("features.sharding: 'row_wise': TorchRec's CPU tables have no row-wise bags; choose table_wise or column_wise")
    return problems


def parallelize(model: HLLM, config: Config, device: torch.device) -> DistributedModelParallel:
    """Shard, replicate and place `model` over the ranks of the process group.

    Raises:
        ConfigError: a plan that the device or the optimizer cannot do.
    """
    problems = check_tables(config, device)
    if problems:
        raise ConfigError(problems)
    if config.parallel.activation_checkpointing:
        for backbone in _backbones(model):
            backbone.gradient_checkpointing_enable({"use_reentrant": False})
    if config.parallel.compile:
        for backbone in _backbones(model):
            for layer in backbone.get_submodule(_layers_name(backbone)):
                layer.compile(dynamic=True)
    tables = model.features.tables
    if tables is not None:
        _give_sharded_tables_an_optimizer(tables, config)
    sharder: ModuleSharder = EmbeddingBagCollectionSharder()
    plan = plan_tables(model, config, device, sharder)
    if config.parallel.dense == "fsdp":
        _shard_dense(model, device)
    wrapper = DefaultDataParallelWrapper(static_graph=False, find_unused_parameters=True)
    assert dist.group.WORLD is not None
    return DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=device,
        plan=plan,
        sharders=[sharder],
        init_data_parallel=config.parallel.dense == "ddp",
        data_parallel_wrapper=wrapper,
    )


def plan_tables(model: nn.Module, config: Config, device: torch.device, sharder: ModuleSharder) -> ShardingPlan:
    """TorchRec's plan for all ranks: data parallel under `features.shard_from_rows`, sharded from there on."""
    world = dist.get_world_size()
    topology = TopologyFactory.create_topology(
        TrainerConfig(world_size=world, local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", world))),
        kernel_config=KernelConfig(compute_device=device.type),
    )
    planner = EmbeddingShardingPlanner(
        topology=topology, constraints={name: _constraint(rows, config, device) for name, rows in _tables(model)}, debug=False
    )
    assert dist.group.WORLD is not None
    return planner.collective_plan(model, [sharder], dist.group.WORLD)


def _tables(model: nn.Module) -> Iterable[tuple[str, int]]:
    for module in model.modules():
        if isinstance(module, EmbeddingBagCollection):
            for table in module.embedding_bag_configs():
                yield table.name, table.num_embeddings


def _constraint(rows: int, config: Config, device: torch.device) -> ParameterConstraints:
    if rows < config.features.shard_from_rows:
        return ParameterConstraints(
            sharding_types=[ShardingType.DATA_PARALLEL.value], compute_kernels=[EmbeddingComputeKernel.DENSE.value]
        )
    sharding = config.features.sharding
    kinds = [ShardingType.TABLE_WISE, ShardingType.COLUMN_WISE]
    if device.type == "cuda":
        kinds += [ShardingType.ROW_WISE, ShardingType.TABLE_ROW_WISE]
    names = [kind.value for kind in kinds] if sharding == "auto" else [sharding]
    return ParameterConstraints(sharding_types=names, compute_kernels=[EmbeddingComputeKernel.FUSED.value])


def _give_sharded_tables_an_optimizer(tables: EmbeddingBagCollection, config: Config) -> None:
    """The in-backward optimizer of every table that is not data parallel (those belong to the dense optimizer)."""
    name, lr = config.optim.table_optimizer, config.optim.table_lr
    classes = {
        "rowwise_adagrad": RowWiseAdagrad,
        "adagrad": Adagrad,
        "sgd": torch.optim.SGD,
        "adam": Adam,
        "partial_rowwise_adam": PartialRowWiseAdam,
    }
    for table in tables.embedding_bag_configs():
        if table.num_embeddings >= config.features.shard_from_rows:
            weight = tables.embedding_bags[table.name].weight
            apply_optimizer_in_backward(classes[name], [weight], {"lr": lr})


def _backbones(model: HLLM) -> list[nn.Module]:
    return [m.backbone for m in (model.item_llm, model.user) if m is not None and hasattr(m, "backbone")]


def _layers_name(backbone: nn.Module) -> str:
    return "layers" if hasattr(backbone, "layers") else "encoder.layer"


def _shard_dense(model: HLLM, device: torch.device) -> None:
    """FSDP2 over every layer of both LLMs; what is left (heads, projections) forms the root's group."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for backbone in _backbones(model):
        for layer in backbone.get_submodule(_layers_name(backbone)):
            fully_shard(layer, mesh=mesh)
        fully_shard(backbone, mesh=mesh)


def autocast(config: Config, device: torch.device) -> AbstractContextManager:
    """The forward pass's precision."""
    if config.parallel.precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()
