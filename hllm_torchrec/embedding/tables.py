"""Contents of embedding tables, independent of sharding: local shards, initialization, and the unsharded tensor."""

import hashlib
from typing import Any

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardedTensor

from hllm_torchrec.distributed.wrappers import full_tensor

INIT_ROWS = 4096
"""Number of rows in a block that is drawn from one generator. Blocks start at multiples of it, so that the values of a
row do not depend on the sharding."""


def local_shards(value: Any) -> list[tuple[Tensor, int, int]]:
    """Return this rank's shards of a table or its optimizer state: (values, first row, first column).

    value: a ShardedTensor, or a tensor that is complete on every rank. The first column of row-wise state, which has no
    columns, is 0.
    """
    if not isinstance(value, ShardedTensor):
        return [(value, 0, 0)]
    return [(shard.tensor, *(*shard.metadata.shard_offsets, 0)[:2]) for shard in value.local_shards()]


@torch.no_grad()
def initialize_tables(model: DistributedModelParallel, seed: int, scale: float) -> None:
    """Fill every embedding bag table, except that of the position bias, with values that are uniform in +-scale.

    The values depend only on (seed, table, row, column), so the initial model is the same for any number of ranks and
    any sharding plan.
    """
    for name, value in model.state_dict().items():
        if ".embedding_bags." not in name or "position_bias." in name:  # the position bias starts at 0
            continue
        table = name.split(".embedding_bags.")[1].removesuffix(".weight")
        width = (value.metadata().size if isinstance(value, ShardedTensor) else value.shape)[1]
        for values, row, column in local_shards(value):
            _fill(values, row, column, width, seed, table, scale)


def _fill(target: Tensor, row: int, column: int, width: int, seed: int, table: str, scale: float) -> None:
    """Fill `target`, a shard that starts at (row, column) of a table with `width` columns."""
    end = row + target.shape[0]
    for block in range(row // INIT_ROWS, -(-end // INIT_ROWS)):
        digest = hashlib.sha256(f"{seed}/{table}/{block}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        # All columns of the block are drawn, also those of other shards, so that values do not depend on the sharding.
        values = (torch.rand(INIT_ROWS, width, generator=generator) * 2 - 1) * scale
        first, last = max(row, block * INIT_ROWS), min(end, (block + 1) * INIT_ROWS)
        part = values[first - block * INIT_ROWS : last - block * INIT_ROWS, column : column + target.shape[1]]
        target[first - row : last - row].copy_(part)


def assemble_tensor(value: Any) -> Tensor:
    """Return a tensor of a model's state unsharded. Only for a single process, which has all shards."""
    if not isinstance(value, ShardedTensor):
        return full_tensor(value)
    shards = local_shards(value)
    table = torch.empty(value.metadata().size, dtype=shards[0][0].dtype)
    for values, row, column in shards:
        table[row : row + values.shape[0], column : column + values.shape[1]] = values
    return table
