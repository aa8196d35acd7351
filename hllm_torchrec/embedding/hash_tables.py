"""Row-wise sharding of tables of kind hash (`modules.features.hash_tables`), on a CPU as on CUDA."""

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
    """TorchRec's sharded collection; rows that change hands begin anew here, because FBGEMM does it on CUDA only."""

    @torch.no_grad()
    def _evict(self, evictions_per_table: dict[str, Tensor | None]) -> None:
        """Set rows [n] of this shard, by table, to the start vector, and their optimizer state to 0."""
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
    """Sharder of these collections for DistributedModelParallel and the planner."""

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
        """The type of sharded collections."""
        return ShardedHashTables


def take_hash_counts(model: nn.Module) -> dict[str, dict[str, int]]:
    """Return `HashCounts` of all ranks together since the last call, by table. Collective.

    model: with sharded tables.
    """
    maps = {name.rpartition(".")[2]: one for name, one in model.named_modules() if isinstance(one, SetAssociativeIds)}
    counts = {name: asdict(one.take_counts()) for name, one in maps.items()}
    totals = {name: global_sum(torch.tensor(list(one.values()))).tolist() for name, one in counts.items()}
    return {name: dict(zip(one, totals[name], strict=True)) for name, one in counts.items()}
