"""Traffic and memory of lookups in sharded tables, for a given sharding plan.

Each event is a bag, so every rank that has a shard of a table computes the output for the batch of all ranks, W x n
rows. The traffic depends on the type of sharding:

    table_wise, column_wise   the owner of a shard sends n rows to each of W - 1 ranks, and receives as many gradients
    row_wise                  every rank computes partial sums of all W x n rows: reduce-scatter of the outputs, and
                              all-gather of the gradients
    table_row_wise            as row_wise among the ranks of one node, which then send their shares to other nodes

Legend: W ranks, L ranks per node, n rows that a rank looks up.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

FLOAT = 4


@dataclass(frozen=True)
class TableTraffic:
    """Traffic of the slowest rank, and the largest memory of a rank, in bytes."""

    within: float
    """Bytes that the slowest rank sends to ranks of its node."""
    across: float
    """Bytes that the slowest rank sends to other nodes."""
    held: float
    """Maximum over the ranks of the bytes of outputs for the rows of other ranks."""


def shards_of(shardings: Iterable[tuple[str, Any]]) -> list[tuple[str, int, int, int]]:
    """Return (table, rank, rows, columns) of every shard of a plan; replicated tables have no shards.

    shardings: (table, ParameterSharding) of the plan.
    """
    return [
        (name, shard.placement.rank(), *shard.shard_sizes)
        for name, sharding in shardings
        if sharding.sharding_spec is not None
        for shard in sharding.sharding_spec.shards
    ]


def table_traffic(
    shardings: Iterable[tuple[str, Any]], rows: float, world: int, of_node: int, rates: tuple[float, float]
) -> TableTraffic:
    """Compute the traffic of a step's lookups, forward and backward.

    Args:
        shardings: (table, ParameterSharding) of the plan.
        rows: n, the same for each table.
        world, of_node: W and L.
        rates: bytes/s within a node and between nodes, by which the slowest rank is found.
    """
    within, across, held = (defaultdict[int, float](float) for _ in range(3))
    for _, sharding in shardings:
        if sharding.sharding_spec is None:
            continue
        by_rank = {
            shard.placement.rank(): FLOAT * rows * shard.shard_sizes[1] for shard in sharding.sharding_spec.shards
        }
        for rank, size in by_rank.items():
            # The owner stores the outputs for the rows of the other W - 1 ranks until they are sent.
            held[rank] += (world - 1) * size
            inside, outside = _sent(sharding.sharding_type, size, world, of_node)
            within[rank] += inside
            across[rank] += outside
        # Each rank sends the gradients of its n rows to the owners. For row_wise, `_sent` includes them (all-gather).
        for rank in range(world):
            if sharding.sharding_type != "row_wise":
                size = sum(by_rank.values()) if sharding.sharding_type == "column_wise" else max(by_rank.values())
                near = any(owner // of_node == rank // of_node for owner in by_rank)
                (within if near else across)[rank] += size
    slowest = max(range(world), key=lambda rank: within[rank] / rates[0] + across[rank] / rates[1])
    return TableTraffic(within[slowest], across[slowest], max(held.values(), default=0.0))


def _sent(kind: str, size: float, world: int, of_node: int) -> tuple[float, float]:
    """Return the bytes that a shard's owner sends within its node and to other nodes.

    size: bytes of the shard's columns of n rows.
    """
    if kind in ("table_wise", "column_wise"):
        return (of_node - 1) * size, (world - of_node) * size
    if kind == "row_wise":
        return 2 * (of_node - 1) * size, 2 * (world - of_node) * size
    return 2 * (of_node - 1) / of_node * world * size, (world / of_node - 1) * size
