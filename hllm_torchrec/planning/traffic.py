"""Traffic and memory of lookups in sharded tables, by the sharding plan.

With a bag per event, the output of a lookup has the batch of all ranks, W x n rows, on every rank that has a shard of
the table. The traffic differs much between kinds of sharding:

    table_wise, column_wise   the owner sends n rows to each of W - 1 ranks, and receives as many gradients
    row_wise                  every rank sums its part of all W x n rows: reduce-scatter, and all-gather of gradients
    table_row_wise            the same among the ranks of one node, each of which then sends its share to other nodes

Legend: W ranks, L ranks of a node, n rows that a rank looks up.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

FLOAT = 4


@dataclass(frozen=True)
class TableTraffic:
    """Largest figures of a rank, in bytes: sent within its node, sent to other nodes, and held of all ranks' rows."""

    within: float
    across: float
    held: float


def shards_of(shardings: Iterable[tuple[str, Any]]) -> list[tuple[str, int, int, int]]:
    """List (table, rank, rows, columns) of every shard of a plan; replicated tables have none."""
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
        shardings: a plan's (table, ParameterSharding).
        rows: n, of each table.
        world, of_node: W and L.
        rates: bytes/s within a node and across nodes; used to find the slowest rank.
    """
    within, across, held = (defaultdict[int, float](float) for _ in range(3))
    for _, sharding in shardings:
        if sharding.sharding_spec is None:
            continue
        by_rank = {
            shard.placement.rank(): FLOAT * rows * shard.shard_sizes[1] for shard in sharding.sharding_spec.shards
        }
        for rank, size in by_rank.items():
            # The outputs for the rows of the other W - 1 ranks exist on the owner until they are sent.
            held[rank] += (world - 1) * size
            inside, outside = _sent(sharding.sharding_type, size, world, of_node)
            within[rank] += inside
            across[rank] += outside
        # Gradients of a rank's n rows go to the owners; row_wise has them in `_sent` already (all-gather).
        for rank in range(world):
            if sharding.sharding_type != "row_wise":
                size = sum(by_rank.values()) if sharding.sharding_type == "column_wise" else max(by_rank.values())
                near = any(owner // of_node == rank // of_node for owner in by_rank)
                (within if near else across)[rank] += size
    slowest = max(range(world), key=lambda rank: within[rank] / rates[0] + across[rank] / rates[1])
    return TableTraffic(within[slowest], across[slowest], max(held.values(), default=0.0))


def _sent(kind: str, size: float, world: int, of_node: int) -> tuple[float, float]:
    """Return the bytes that an owner sends within its node and to other nodes; size: bytes of n rows of its columns."""
    if kind in ("table_wise", "column_wise"):
        return (of_node - 1) * size, (world - of_node) * size
    if kind == "row_wise":
        return 2 * (of_node - 1) * size, 2 * (world - of_node) * size
    return 2 * (of_node - 1) / of_node * world * size, (world / of_node - 1) * size
