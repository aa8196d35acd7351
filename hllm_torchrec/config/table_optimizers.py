"""Registry of the in-backward optimizers of sharded tables, by name (`TABLE_OPTIMIZERS`).

The registry contains names of classes, so that a configuration can be checked without torch. `hllm_torchrec.embedding`
applies the optimizers.
"""

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hllm_torchrec.common.errors import did_you_mean
from hllm_torchrec.config.bounds import bound_problems


@dataclass(frozen=True)
class TableOptimizerKind:
    """An in-backward optimizer: its class for TorchRec, its options for FBGEMM, and the size of its state."""

    path: str
    """module:Name of the class, which TorchRec maps to FBGEMM's kernel."""
    per_value: int
    """Number of state values per weight of a shard."""
    per_row: int
    """Number of additional state values per row of a shard."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Argument of the FBGEMM kernel -> range, as in `rules.BOUNDS`; without the learning rate."""
    cuda_only: bool = False
    """True if FBGEMM has no CPU kernel for it."""

    @property
    def optimizer(self) -> Any:
        """Class of the optimizer, imported on demand."""
        module, _, name = self.path.partition(":")
        return getattr(importlib.import_module(module), name)


_EPS = {"eps": ">= 0"}
_ADAM = _EPS | {"beta1": ">= 0, < 1", "beta2": ">= 0, < 1", "weight_decay": ">= 0"}

TABLE_OPTIMIZERS: dict[str, TableOptimizerKind] = {
    "sgd": TableOptimizerKind("torch.optim:SGD", 0, 0),
    "rowwise_adagrad": TableOptimizerKind("torchrec.optim:RowWiseAdagrad", 0, 1, _EPS),
    "adagrad": TableOptimizerKind("torchrec.optim:Adagrad", 1, 0, _EPS),
    "partial_rowwise_adam": TableOptimizerKind("torchrec.optim:PartialRowWiseAdam", 1, 1, _ADAM, cuda_only=True),
    "adam": TableOptimizerKind("torchrec.optim:Adam", 2, 0, _ADAM, cuda_only=True),
}
"""`optim.table_optimizer` -> its optimizer."""

REPLICATED = TableOptimizerKind("torch.optim:AdamW", 2, 0)
"""Optimizer of tables below `features.shard_from_rows`: always float32, updated by the dense optimizer."""


def table_optimizer_problems(name: str, options: Mapping[str, float]) -> Iterator[str]:
    """Yield problems of `optim.table_optimizer` and `optim.table_options`: unknown names, and values out of range."""
    if name not in TABLE_OPTIMIZERS:
        known = ", ".join(TABLE_OPTIMIZERS)
        yield f"optim.table_optimizer: {name!r}: must be one of {known}{did_you_mean(name, TABLE_OPTIMIZERS)}"
        return
    taken = TABLE_OPTIMIZERS[name].options
    for option, value in options.items():
        if option in taken:
            yield from bound_problems(f"optim.table_options.{option}", value, taken[option])
        else:
            takes = f"it takes {', '.join(taken)}" if taken else "it takes none"
            yield f"optim.table_options.{option}: no option of {name}: {takes}"
