"""Row-wise sharding of tables of kind hash (`modules.features.hash_tables`) on CPUs and GPUs."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.mc_embedding import (
    ManagedCollisionEmbeddingCollectionSharder,
    ShardedManagedCollisionEmbeddingCollection,
)
from torchrec.distributed.types import ParameterSharding, ShardingEnv
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingCollection

from hllm_torchrec.distributed.collectives import global_sum
from hllm_torchrec.modules.features.hash_tables import SetAssociativeIds


class ShardedHashTables(ShardedManagedCollisionEmbeddingCollection):
    """TorchRec's sharded collection, which also resets rows that pass to another id: FBGEMM does so on CUDA only."""

    @torch.no_grad()
    def _evict(self, evictions_per_table: dict[str, Tensor | None]) -> None:
        """Reset evicted rows of this shard: weights to the initial vector, optimizer state to 0.

        evictions_per_table: table -> rows [n], or None.
        """
        for name, rows in evictions_per_table.items():
            if rows is None:
                continue
            kernel, index = self._table_to_tbe_and_index[name]
            table = int(index)
            start = self._embedding_module._table_name_to_config[name].init_fn
            weights = kernel.split_embedding_weights()[table]
            weights[rows] = start(weights[rows])
            states = kernel.split_optimizer_states()  # empty for sgd
            for state in states[table] if states else ():
                state[rows] = 0


class HashTableSharder(ManagedCollisionEmbeddingCollectionSharder):
    """Sharder of tables of kind hash, for DistributedModelParallel and the planner."""

    def shard(
        self,
        module: ManagedCollisionEmbeddingCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedHashTables:
        """Shard a collection."""
        assert device is not None
        sharders: dict[str, Any] = {"ec_sharder": self._e_sharder, "mc_sharder": self._mc_sharder}
        return ShardedHashTables(module, params, env=env, device=device, **sharders)

    @property
    def sharded_module_type(self) -> type[ShardedHashTables]:
        """Type of the sharded collections."""
        return ShardedHashTables


def take_hash_counts(model: nn.Module) -> dict[str, dict[str, int]]:
    """Return table -> `HashCounts` since the last call, as a dict, summed over all ranks. Collective.

    model: a model whose tables are sharded.
    """
    maps = {
        name.rpartition(".")[2]: module
        for name, module in model.named_modules()
        if isinstance(module, SetAssociativeIds)
    }
    counts = {name: asdict(module.take_counts()) for name, module in maps.items()}
    totals = {name: global_sum(torch.tensor(list(local.values()))).tolist() for name, local in counts.items()}
    return {name: dict(zip(local, totals[name], strict=True)) for name, local in counts.items()}
