"""A small sharded model for tests of checkpoints and optimizers: two tables and a linear layer."""

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.types import HardwareConfig, KernelConfig, TopologyFactory, TrainerConfig
from torchrec.optim import RowWiseAdagrad

ROWS = (10, 11)
WIDTH = 8
TABLE_LEARNING_RATE = 0.5


class TwoTables(nn.Module):
    """Two tables, concatenated, and a linear layer."""

    def __init__(self, rows: tuple[int, ...] = ROWS, outputs: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        tables = [
            EmbeddingBagConfig(name=f"t{i}", embedding_dim=WIDTH, num_embeddings=n, feature_names=[f"f{i}"])
            for i, n in enumerate(rows)
        ]
        self.ebc = EmbeddingBagCollection(device=torch.device("cpu"), tables=tables)
        self.over = nn.Linear(len(rows) * WIDTH, outputs)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        pooled = self.ebc(features)  # its values() are in the order of the sharding plan
        return self.over(torch.cat([pooled["f0"], pooled["f1"]], dim=1))


def batch() -> KeyedJaggedTensor:
    """Two rows: bags of 1 and 2 ids of the first table, and of the second."""
    return KeyedJaggedTensor(
        keys=["f0", "f1"], values=torch.tensor([1, 2, 3, 4, 5, 6]), lengths=torch.tensor([1, 2, 1, 2])
    )


def shard(model: TwoTables, sharding: str = "table_wise") -> DistributedModelParallel:
    """Shard the tables over all ranks, with RowWiseAdagrad in the backward pass."""
    optimizer = {"lr": TABLE_LEARNING_RATE}
    _apply_optimizer_in_backward(RowWiseAdagrad, model.ebc.parameters(), optimizer)
    world_size = dist.get_world_size()
    topology = TopologyFactory.create_topology(
        TrainerConfig(world_size=world_size, local_world_size=world_size),
        HardwareConfig(),
        KernelConfig(compute_device="cpu"),
    )
    constraints = {
        config.name: ParameterConstraints(sharding_types=[sharding], min_partition=WIDTH // 2)
        for config in model.ebc.embedding_bag_configs()
    }
    sharder = EmbeddingBagCollectionSharder()
    planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints)
    plan = planner.collective_plan(model, [sharder], dist.group.WORLD)
    return DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=[sharder])
