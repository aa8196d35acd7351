"""Memory of embedding tables: bytes of weights and optimizer state per row, also for TorchRec's planner.

TorchRec's planner counts optimizer state in units of the weights' bytes, which underestimates float16 tables (their
state is float32), and assumes one number per weight for every optimizer that it does not know.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import ShardingOption, Storage
from torchrec.distributed.types import ShardingType

from hllm_torchrec.config.table_optimizers import REPLICATED, TABLE_OPTIMIZERS, TableOptimizerKind

TableDtype = Literal["fp32", "fp16"]

WEIGHT_BYTES: dict[str, int] = {"fp32": 4, "fp16": 2}
STATE_BYTES = 4
"""Bytes per value of optimizer state: FBGEMM stores it as float32 for any dtype of the weights."""


@dataclass(frozen=True)
class RowBytes:
    """Bytes of one row of a table: its weights and its optimizer state."""

    weights: int
    state: int

    @property
    def total(self) -> int:
        """Sum of both."""
        return self.weights + self.state


def bytes_per_row(width: int, optimizer: str, dtype: TableDtype = "fp32") -> RowBytes:
    """Compute the memory of a row of a sharded table: `width` weights and the state of `optim.table_optimizer`.

    A table that is split by columns into n shards stores the per-row state n times, once per shard.
    """
    return RowBytes(width * WEIGHT_BYTES[dtype], _state_bytes(TABLE_OPTIMIZERS[optimizer], 1, width))


def _state_bytes(kind: TableOptimizerKind, rows: int, columns: int) -> int:
    return STATE_BYTES * rows * (kind.per_value * columns + kind.per_row)


class TableEnumerator(EmbeddingEnumerator):
    """TorchRec's enumerator of sharding options, with the real size of optimizer state in its storage estimates."""

    def populate_estimates(self, sharding_options: list[ShardingOption]) -> None:
        """Set the performance and storage estimates of every shard."""
        kinds = [_kind_of(option) for option in sharding_options]
        # TorchRec's estimate is made without optimizer state; the actual state of each shard is added below.
        with _counted_without_state(sharding_options):
            super().populate_estimates(sharding_options)
        for option, kind in zip(sharding_options, kinds, strict=True):
            if kind is None:
                continue
            for shard in option.shards:
                state = _state_bytes(kind, *shard.size)
                on_host = self._compute_device == "cpu"
                added = Storage(hbm=0, ddr=state) if on_host else Storage(hbm=state, ddr=0)
                assert shard.storage is not None, "the estimators have filled it in"
                shard.storage = shard.storage + added


def _kind_of(option: ShardingOption) -> TableOptimizerKind | None:
    """Return the optimizer of a table, or None for a frozen table, which has none."""
    if option.sharding_type == ShardingType.DATA_PARALLEL.value:
        return REPLICATED
    given = getattr(option.tensor, "_optimizer_classes", None)
    if not given:
        return None
    return next(kind for kind in TABLE_OPTIMIZERS.values() if kind.optimizer is given[0])


@contextmanager
def _counted_without_state(options: list[ShardingOption]) -> Iterator[None]:
    """Context manager in which the tables' optimizer is SGD, which has no state in the planner's estimates."""
    tensors = {id(option.tensor): option.tensor for option in options}.values()
    given = [(tensor, tensor._optimizer_classes) for tensor in tensors if hasattr(tensor, "_optimizer_classes")]
    try:
        for tensor, _ in given:
            tensor._optimizer_classes = [torch.optim.SGD]
        yield
    finally:
        for tensor, classes in given:
            tensor._optimizer_classes = classes
