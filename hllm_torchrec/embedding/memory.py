"""What embedding tables take: bytes of weights and of optimizer state per row, which the planner is told as well.

TorchRec's planner counts an optimizer's state in units of the weights' bytes, which is short for float16 tables (state
is float32 all the same), and takes every optimizer that it does not know for one number per weight.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import ShardingOption, Storage
from torchrec.distributed.types import ShardingType

from hllm_torchrec.embedding.optimizers import REPLICATED, TABLE_OPTIMIZERS, TableOptimizerKind

TableDtype = Literal["fp32", "fp16"]

WEIGHT_BYTES: dict[str, int] = {"fp32": 4, "fp16": 2}
STATE_BYTES = 4
"""FBGEMM keeps optimizer state in float32 whatever the weights are in."""


@dataclass(frozen=True)
class RowBytes:
    """Bytes of one row."""

    weights: int
    state: int

    @property
    def total(self) -> int:
        """Both."""
        return self.weights + self.state


def bytes_per_row(width: int, optimizer: str, dtype: TableDtype = "fp32") -> RowBytes:
    """Memory of a row of a sharded table: `width` weights and the state of `optim.table_optimizer`.

    Cut by columns into n parts, a table has the state that belongs to a row n times.
    """
    return RowBytes(width * WEIGHT_BYTES[dtype], _state_bytes(TABLE_OPTIMIZERS[optimizer], 1, width))


def _state_bytes(kind: TableOptimizerKind, rows: int, columns: int) -> int:
    return STATE_BYTES * rows * (kind.per_value * columns + kind.per_row)


class TableEnumerator(EmbeddingEnumerator):
    """TorchRec's enumerator of sharding options, whose estimates of storage have the real size of optimizer state."""

    def populate_estimates(self, sharding_options: list[ShardingOption]) -> None:
        """Fill in performance and storage of every shard."""
        kinds = [_kind_of(option) for option in sharding_options]
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
    """What moves a table; None for a frozen one."""
    if option.sharding_type == ShardingType.DATA_PARALLEL.value:
        return REPLICATED
    given = getattr(option.tensor, "_optimizer_classes", None)
    if not given:
        return None
    return next(kind for kind in TABLE_OPTIMIZERS.values() if kind.optimizer is given[0])


@contextmanager
def _counted_without_state(options: list[ShardingOption]) -> Iterator[None]:
    """Within the context the tables' optimizer is one without state, of which the planner adds nothing."""
    tensors = {id(option.tensor): option.tensor for option in options}.values()
    given = [(tensor, tensor._optimizer_classes) for tensor in tensors if hasattr(tensor, "_optimizer_classes")]
    try:
        for tensor, _ in given:
            tensor._optimizer_classes = [torch.optim.SGD]
        yield
    finally:
        for tensor, classes in given:
            tensor._optimizer_classes = classes
