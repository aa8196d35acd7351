"""Ranks of targets in a catalogue whose vectors are sharded over the ranks of the process group.

Each rank counts, for the queries of all ranks, the items of its own shard that rank before the target; the sum of the
counts equals the result of one process. Queries are gathered; item vectors are not communicated.

Legend: B rows of this rank, A rows of all ranks, n items of this rank's share, D width, S seen items of all rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch import distributed as dist

from hllm_torchrec.distributed.collectives import all_gather_variable, global_sum, world_size
from hllm_torchrec.metrics.retrieval_metrics import (
    BLOCK_SIZE,
    TIE_TOLERANCE,
    check_targets,
    count_ahead,
    scores_to_beat,
    seen_pairs,
)


@dataclass(frozen=True)
class CatalogueShard:
    """Vectors [n, D] of the items `first` to `first + n - 1`, of `total` items (including the unknown item 0).

    excluded: ids that are no candidates; as a target one still ranks among the candidates.
    """

    vectors: Tensor
    first: int
    total: int
    excluded: Tensor | None = None

    @classmethod
    def of_rank(cls, vectors: Tensor) -> "CatalogueShard":
        """This rank's shard of vectors [N, D] that every rank holds completely (a view)."""
        first, end = shard_bounds(len(vectors))
        return cls(vectors[first:end], first, len(vectors))

    @property
    def end(self) -> int:
        """One after the last item."""
        return self.first + len(self.vectors)

    def normalized(self) -> "CatalogueShard":
        """The shard with vectors of length 1, float32."""
        return replace(self, vectors=torch.nn.functional.normalize(self.vectors.float(), dim=-1))


def shard_bounds(total: int) -> tuple[int, int]:
    """(first, end) of this rank's items: contiguous, in rank order, with sizes that differ by at most 1."""
    rank = dist.get_rank() if world_size() > 1 else 0
    return total * rank // world_size(), total * (rank + 1) // world_size()


def equal_chunks(rows: Tensor, at_once: int) -> Iterator[Tensor]:
    """Chunks of at most `at_once` of this rank's rows [B]; the same number on every rank, the last may be empty.

    Collective. A rank with fewer rows yields empty chunks, so that all ranks run the same collectives per chunk.
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
    tie_tolerance: float = TIE_TOLERANCE,
) -> Tensor:
    """Rank of each row's target over all shards, see `target_ranks`; ranks may differ in numbers of rows. Collective.

    Memory: the vectors of the shard, and [A, block] scores at a time.

    Returns:
        int64 [B], 1 = best, of this rank's rows.

    Raises:
        ValueError: as `target_ranks`; for an invalid target or score on every rank.
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
    # The shard's items from 1 on: the unknown item 0 is not ranked.
    ahead_A = count_ahead(
        lambda start, stop: _scores(queries_AD, items, start, stop),
        _scores_to_beat(queries_AD, items, target_A, tie_tolerance),
        target_A,
        (max(items.first, 1), items.end),
        seen,
        block_size,
    )
    return 1 + global_sum(ahead_A)[before : before + len(target_B)]


def _scores(queries_AD: Tensor, items: CatalogueShard, start: int, stop: int) -> Tensor:
    """Scores [A, stop - start] of the items from `start` to before `stop`; -inf of those that are no candidates."""
    scores = queries_AD @ items.vectors[start - items.first : stop - items.first].float().T
    if items.excluded is not None:
        here = items.excluded[(items.excluded >= start) & (items.excluded < stop)]
        scores[:, here - start] = -torch.inf
    return scores


def _scores_to_beat(queries_AD: Tensor, items: CatalogueShard, target_A: Tensor, tie_tolerance: float) -> Tensor:
    """Scores to beat [A]: each computed by the rank whose shard has the target; the other ranks add 0. Collective."""
    here = torch.nonzero((target_A >= items.first) & (target_A < items.end)).flatten()
    least_A = queries_AD.new_zeros(len(target_A))
    least_A[here] = scores_to_beat(queries_AD[here], items.vectors[target_A[here] - items.first], tie_tolerance)
    return global_sum(least_A)
