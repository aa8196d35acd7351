"""Positions of targets in a ranking of a catalogue whose vectors are sharded over the ranks of the process group.

For the queries of all ranks, each rank counts the items of its shard that are ranked before the target. The sum of
these counts over the ranks equals the result of one process. Queries are gathered; item vectors are not communicated.

Legend: B rows of this rank, A rows of all ranks, n items of this rank's shard, N items of all shards, D width, S seen
items of all rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch import distributed as dist

from hllm_torchrec.distributed.collectives import all_gather_variable, global_sum, world_size
from hllm_torchrec.metrics.retrieval_metrics import (
    BLOCK_SIZE,
    check_targets,
    count_ahead,
    scores_to_beat,
    seen_pairs,
)


@dataclass(frozen=True)
class CatalogueShard:
    """Vectors [n, D] of the items `first` to `first + n - 1`, of `total` items (including the unknown item 0).

    excluded: ids of items that are not candidates. An excluded item may be a target: it is then ranked among the
    candidates.
    """

    vectors: Tensor
    first: int
    total: int
    excluded: Tensor | None = None

    @classmethod
    def of_rank(cls, vectors: Tensor) -> "CatalogueShard":
        """Return this rank's shard, a view, of vectors [N, D] that are complete on every rank."""
        first, end = shard_bounds(len(vectors))
        return cls(vectors[first:end], first, len(vectors))

    @property
    def end(self) -> int:
        """Id of the last item, plus 1."""
        return self.first + len(self.vectors)

    def normalized(self) -> "CatalogueShard":
        """Return the shard with float32 vectors of length 1."""
        return replace(self, vectors=torch.nn.functional.normalize(self.vectors.float(), dim=-1))


def shard_bounds(total: int) -> tuple[int, int]:
    """Return (first, end) of this rank's items: contiguous shards in rank order, whose sizes differ by at most 1."""
    rank = dist.get_rank() if world_size() > 1 else 0
    return total * rank // world_size(), total * (rank + 1) // world_size()


def equal_chunks(rows: Tensor, at_once: int) -> Iterator[Tensor]:
    """Yield chunks of at most `at_once` of this rank's rows [B], the same number of chunks on every rank. Collective.

    A rank with fewer rows yields empty chunks at the end, so that all ranks run the same collectives for each chunk.
    """
    needed = -(-rows.numel() // at_once)
    rounds = int(all_gather_variable(torch.tensor([needed], device=rows.device)).max())
    for number in range(rounds):
        yield rows[number * at_once : (number + 1) * at_once]


def distributed_target_ranks(
    queries_BD: Tensor,
    items: CatalogueShard,
    target_B: Tensor,
    *,
    seen_items_S: Tensor | None = None,
    seen_offsets: Tensor | None = None,
    block_size: int = BLOCK_SIZE,
) -> Tensor:
    """Compute the position of each row's target in the ranking over all shards, as `target_ranks`. Collective.

    Processes may have different numbers of rows. Memory: the vectors of the shard, and [A, block] scores at a time.

    Returns:
        Position of the target for each row of this process, int64 [B], 1 = best.

    Raises:
        ValueError: as `target_ranks`. An invalid target or target score raises on every rank.
    """
    seen = seen_pairs(seen_items_S, seen_offsets, target_B)
    sizes = all_gather_variable(torch.tensor([len(target_B)], device=target_B.device)).tolist()
    before = sum(sizes[: dist.get_rank()]) if world_size() > 1 else 0
    queries_AD, target_A = all_gather_variable(queries_BD.float()), all_gather_variable(target_B)
    check_targets(target_A, len(queries_AD), items.total)  # of all ranks, so that every rank raises
    if seen is not None:
        rows, ids = seen
        # Rows are renumbered to their positions among the gathered queries.
        seen = all_gather_variable(rows + before), all_gather_variable(ids)
    # The unknown item 0 is not ranked.
    ahead_A = count_ahead(
        lambda start, stop: _scores(queries_AD, items, start, stop),
        _scores_to_beat(queries_AD, items, target_A),
        target_A,
        (max(items.first, 1), items.end),
        seen,
        block_size,
    )
    return 1 + global_sum(ahead_A)[before : before + len(target_B)]


def _scores(queries_AD: Tensor, items: CatalogueShard, start: int, stop: int) -> Tensor:
    """Compute the scores [A, stop - start] of the items start..stop - 1; -inf for excluded items."""
    scores = queries_AD @ items.vectors[start - items.first : stop - items.first].float().T
    if items.excluded is not None:
        here = items.excluded[(items.excluded >= start) & (items.excluded < stop)]
        scores[:, here - start] = -torch.inf
    return scores


def _scores_to_beat(queries_AD: Tensor, items: CatalogueShard, target_A: Tensor) -> Tensor:
    """Compute the scores to beat [A]: the rank whose shard has the target computes it, the others add 0. Collective."""
    here = torch.nonzero((target_A >= items.first) & (target_A < items.end)).flatten()
    least_A = queries_AD.new_zeros(len(target_A))
    least_A[here] = scores_to_beat(queries_AD[here], items.vectors[target_A[here] - items.first])
    return global_sum(least_A)
