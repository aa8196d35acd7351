"""In-backward optimizers of sharded tables: their application, and their learning rate schedule."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torch.nn import Parameter
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.keyed import KeyedOptimizer

from hllm_torchrec.config.schema import Config
from hllm_torchrec.config.table_optimizers import TABLE_OPTIMIZERS
from hllm_torchrec.modules.features.sum_pooling import SumPooledCollection


class TableOptimizer:
    """Applies the learning rate schedule of the dense optimizers to the in-backward optimizers of sharded tables.

    It has no effect on a rank without sharded tables.
    """

    def __init__(self, fused: KeyedOptimizer) -> None:
        """Wrap the `fused_optimizer` of a DistributedModelParallel; its current learning rates are those of ratio 1."""
        self._fused = fused
        self._full_rates = [float(group["lr"]) for group in fused.param_groups]

    def set_ratio(self, ratio: float) -> None:
        """Set the learning rates of the next backward pass to `ratio` times the full ones."""
        for group, rate in zip(self._fused.param_groups, self._full_rates):
            group["lr"] = ratio * rate
        self._fused.step()  # only passes the rates to the FBGEMM kernels, which update the weights in backward

    def set_step(self, step: int) -> None:
        """Set the number of updates done so far, when a run resumes: Adam's bias correction needs it."""
        self._fused.set_optimizer_step(step)

    def state(self) -> dict[str, Any]:
        """Return this rank's optimizer state by table, as ShardedTensors; copying values into them restores a state."""
        state: dict[str, Any] = self._fused.state_dict()["state"]
        return state


@dataclass(frozen=True)
class TableSettings:
    """Sharding and optimizer of tables; `of` shows the corresponding fields of `FeatureConfig` and `OptimConfig`."""

    learning_rate: float
    shard_from_rows: int
    optimizer: str = "rowwise_adagrad"
    options: Mapping[str, float] = field(default_factory=dict)
    sharding: str = "auto"

    @classmethod
    def of(cls, config: Config) -> "TableSettings":
        """Return the settings of a configuration."""
        optim, features = config.optim, config.features
        return cls(
            optim.table_lr, features.shard_from_rows, optim.table_optimizer, optim.table_options, features.sharding
        )


def apply_table_optimizer(tables: EmbeddingBagCollection, settings: TableSettings) -> None:
    """Set the in-backward optimizer of each sharded table. The dense optimizer updates the data parallel tables."""
    for table in tables.embedding_bag_configs():
        if table.num_embeddings >= settings.shard_from_rows:
            _apply(tables.embedding_bags[table.name].weight, settings)


def apply_hash_table_optimizer(tables: SumPooledCollection, settings: TableSettings) -> None:
    """Set the in-backward optimizer of each table of kind hash."""
    for weight in tables.collection.parameters():
        _apply(weight, settings)


def _apply(weight: Parameter, settings: TableSettings) -> None:
    options = {"lr": settings.learning_rate, **settings.options}
    apply_optimizer_in_backward(TABLE_OPTIMIZERS[settings.optimizer].optimizer, [weight], options)
