"""Contents of embedding tables, independent of their sharding: initialization, and assembling of shards."""

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardedTensor

from hllm_torchrec.distributed.wrappers import full_tensor

if TYPE_CHECKING:
    pass


INIT_ROWS = 4096
"""Number of table rows drawn from one generator, so that a row's values do not depend on the sharding."""


@torch.no_grad()
def initialize_tables(model: DistributedModelParallel, seed: int, scale: float) -> None:
    """Fill every table with values uniform in +-scale that depend on (seed, table, row, column) only.

    Any number of ranks and any sharding plan therefore start from the same model.
    """
    for name, value in model.state_dict().items():
        if ".embedding_bags." not in name:
            continue
        table = name.split(".embedding_bags.")[1].removesuffix(".weight")
        if isinstance(value, ShardedTensor):
            width = value.metadata().size[1]
            for shard in value.local_shards():
                row, column = shard.metadata.shard_offsets
                _fill(shard.tensor, row, column, width, seed, table, scale)
        else:
            _fill(value, 0, 0, value.shape[1], seed, table, scale)


def _fill(target: Tensor, row: int, column: int, width: int, seed: int, table: str, scale: float) -> None:
    """Fill rows [row, row + n) and columns from `column` of a table of `width` columns."""
    end = row + target.shape[0]
    for block in range(row // INIT_ROWS, -(-end // INIT_ROWS)):
        digest = hashlib.sha256(f"{seed}/{table}/{block}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        # All columns of the block are drawn, also those of other shards: otherwise values would depend on the sharding.
        values = (torch.rand(INIT_ROWS, width, generator=generator) * 2 - 1) * scale
        first, last = max(row, block * INIT_ROWS), min(end, (block + 1) * INIT_ROWS)
        part = values[first - block * INIT_ROWS : last - block * INIT_ROWS, column : column + target.shape[1]]
        target[first - row : last - row].copy_(part)


def assemble_tensor(value: Any) -> Tensor:
    """Return a tensor of a model's state unsharded. For a single process, which has all shards."""
    if not isinstance(value, ShardedTensor):
        return full_tensor(value)
    shards = value.local_shards()
    table = torch.empty(value.metadata().size, dtype=shards[0].tensor.dtype)
    for shard in shards:
        (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
        table[row : row + rows, column : column + columns] = shard.tensor
    return table
