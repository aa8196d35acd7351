"""In-backward optimizers of sharded tables: the registry, and their learning rate schedule."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim import Adagrad, Adam, PartialRowWiseAdam, RowWiseAdagrad
from torchrec.optim.keyed import KeyedOptimizer

from hllm_torchrec.config.schema import FeatureConfig, OptimConfig


class TableOptimizer:
    """Applies the dense optimizers' schedule to the in-backward optimizers of sharded tables.

    On a rank without sharded tables it does nothing.
    """

    def __init__(self, fused: KeyedOptimizer) -> None:
        """Wrap the `fused_optimizer` of a DistributedModelParallel; its present learning rates are the full ones."""
        self._fused = fused
        self._full_rates = [float(group["lr"]) for group in fused.param_groups]

    def set_ratio(self, ratio: float) -> None:
        """Set the learning rates of the next backward pass to `ratio` times the full ones."""
        for group, rate in zip(self._fused.param_groups, self._full_rates):
            group["lr"] = ratio * rate
        self._fused.step()  # updates nothing: it hands the rates to the FBGEMM kernels, which step in backward

    def set_step(self, step: int) -> None:
        """Set the number of updates done, when resuming: Adam's bias correction needs it."""
        self._fused.set_optimizer_step(step)

    def state(self) -> dict[str, Any]:
        """Return this rank's state (ShardedTensors) by table; loading into them in place restores it."""
        state: dict[str, Any] = self._fused.state_dict()["state"]
        return state


class TableSettings(Protocol):
    """Settings needed to shard and optimize tables: a `Config`, or those of a baseline."""

    @property
    def features(self) -> FeatureConfig:
        """Table settings; uses `shard_from_rows` and `sharding`."""

    @property
    def optim(self) -> OptimConfig:
        """Optimizer settings; uses `table_optimizer` and `table_lr`."""


@dataclass(frozen=True)
class TableOptimizerKind:
    """An in-backward optimizer. per_value, per_row: numbers of state per weight, and per row of a shard."""

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
"""Registry of the values of `optim.table_optimizer`."""

REPLICATED = TableOptimizerKind(torch.optim.AdamW, 2, 0)
"""Optimizer of replicated tables (fewer than `features.shard_from_rows` rows, always float32): the dense one."""


def apply_table_optimizer(tables: EmbeddingBagCollection, config: TableSettings) -> None:
    """Set the in-backward optimizer of each table, except data parallel ones, which belong to the dense optimizer."""
    chosen, lr = TABLE_OPTIMIZERS[config.optim.table_optimizer].optimizer, config.optim.table_lr
    for table in tables.embedding_bag_configs():
        if table.num_embeddings >= config.features.shard_from_rows:
            weight = tables.embedding_bags[table.name].weight
            apply_optimizer_in_backward(chosen, [weight], {"lr": lr})
