"""In-backward optimizers of sharded tables: the registry, and how they follow the learning rate schedule."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim import Adagrad, Adam, PartialRowWiseAdam, RowWiseAdagrad
from torchrec.optim.keyed import KeyedOptimizer

from hllm_torchrec.config.schema import FeatureConfig, OptimConfig


class TableOptimizer:
    """The in-backward optimizers of sharded tables, made to follow the schedule of the dense ones.

    A model without sharded tables on this rank is fine: then nothing happens.
    """

    def __init__(self, fused: KeyedOptimizer) -> None:
        """Take a DistributedModelParallel's `fused_optimizer`; its present rates are the full ones."""
        self._fused = fused
        self._full_rates = [float(group["lr"]) for group in fused.param_groups]

    def set_ratio(self, ratio: float) -> None:
        """Let the next backward pass use `ratio` times the full learning rates."""
        for group, rate in zip(self._fused.param_groups, self._full_rates):
            group["lr"] = ratio * rate
        self._fused.step()  # hands the rates to the FBGEMM kernels

    def set_step(self, step: int) -> None:
        """Set the number of updates done, which Adam's bias correction needs, when resuming."""
        self._fused.set_optimizer_step(step)

    def state(self) -> dict[str, Any]:
        """Return this rank's state (ShardedTensors) by table; loading into them in place restores it."""
        state: dict[str, Any] = self._fused.state_dict()["state"]
        return state


class TableSettings(Protocol):
    """What sharding and stepping tables takes of a configuration: a `Config`, or a baseline's own."""

    @property
    def features(self) -> FeatureConfig:
        """Of it: `shard_from_rows`, `sharding`."""

    @property
    def optim(self) -> OptimConfig:
        """Of it: `table_optimizer`, `table_lr`."""


@dataclass(frozen=True)
class TableOptimizerKind:
    """An in-backward optimizer. per_value, per_row: numbers of state for each weight and for each row of a shard."""

    optimizer: type[torch.optim.Optimizer]
    per_value: int
    per_row: int
    cuda_only: bool = False


TABLE_OPTIMIZERS: dict[str, TableOptimizerKind] = {
    "sgd": TableOptimizerKind(torch.optim.SGD, 0, 0),
    "rowwise_adagrad": TableOptimizerKind(RowWiseAdagrad, 0, 1),
    "adagrad": TableOptimizerKind(Adagrad, 1, 0),
    "partial_rowwise_adam": TableOptimizerKind(PartialRowWiseAdam, 1, 1, cuda_only=True),
    "adam": TableOptimizerKind(Adam, 2, 0, cuda_only=True),
}
"""`optim.table_optimizer` -> what it is."""

REPLICATED = TableOptimizerKind(torch.optim.AdamW, 2, 0)
"""Tables below `features.shard_from_rows`, float32 in every case, have the dense optimizer."""


def apply_table_optimizer(tables: EmbeddingBagCollection, config: TableSettings) -> None:
    """Give each table its in-backward optimizer, but for data parallel ones (the dense optimizer's)."""
    chosen, lr = TABLE_OPTIMIZERS[config.optim.table_optimizer].optimizer, config.optim.table_lr
    for table in tables.embedding_bag_configs():
        if table.num_embeddings >= config.features.shard_from_rows:
            weight = tables.embedding_bags[table.name].weight
            apply_optimizer_in_backward(chosen, [weight], {"lr": lr})
