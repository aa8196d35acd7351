"""Full-catalogue retrieval metrics from the rank of each row's target.

Legend: B rows (users), I catalogue rows (including item 0, the unknown item), D width, S seen items of all rows.

Ties are pessimistic: an item with the same score as the target ranks before it. So if a model has collapsed and gives
all items the same score, its targets have the worst rank instead of the best.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

BLOCK_SIZE = 16_384
"""Number of catalogue rows scored at a time: the scores in memory are [B, block], never [B, I]."""

TIE_TOLERANCE = 1e-6
"""Scores that are lower than the target's by at most this share of |query| |target| count as tied with it: the scores
of two equal items may differ by float32 rounding, depending on their position in a block."""

ScoreBlock = Callable[[int, int], torch.Tensor]


def target_ranks(
    scores_BI: torch.Tensor,
    target_B: torch.Tensor,
    *,
    seen_items_S: torch.Tensor | None = None,
    seen_offsets: torch.Tensor | None = None,
    block_size: int = BLOCK_SIZE,
) -> torch.Tensor:
    """Compute the rank of each row's target among all items, from a matrix of scores.

    Args:
        scores_BI: column i scores item i; column 0 (unknown item) is never ranked. Any float type.
        target_B: item ids, 1..I-1, int64.
        seen_items_S: item ids to exclude from the ranking, concatenated over rows (the user's history), int64. The
            target itself is never excluded; duplicates and 0 are harmless.
        seen_offsets: row b's seen items are `seen_items_S[seen_offsets[b]:seen_offsets[b + 1]]`, int [B + 1],
            starting at 0.
        block_size: columns compared at a time.

    Returns:
        int64 [B], 1 = best. Items with a NaN score rank before the target.

    Raises:
        ValueError: a target is outside 1..I-1, its score is not finite, or the offsets are inconsistent.
    """
    catalogue = scores_BI.shape[1]
    check_targets(target_B, len(scores_BI), catalogue)
    target_scores_B = scores_BI.gather(1, target_B[:, None])[:, 0]
    # clone: `count_ahead` overwrites scores in the block.
    return 1 + count_ahead(
        lambda start, stop: scores_BI[:, start:stop].clone(),
        target_scores_B,
        target_B,
        (1, catalogue),
        seen_pairs(seen_items_S, seen_offsets, target_B),
        block_size,
    )


def scores_to_beat(queries_BD: torch.Tensor, targets_BD: torch.Tensor) -> torch.Tensor:
    """Compute the lowest score of an item that ranks before the target: the target's score minus the tolerance.

    queries_BD, targets_BD: vectors of the queries and of their targets; the result is float32 [B].
    """
    targets_BD = targets_BD.float()
    tolerance_B = TIE_TOLERANCE * queries_BD.norm(dim=1) * targets_BD.norm(dim=1)
    return (queries_BD * targets_BD).sum(1) - tolerance_B


def retrieval_metrics(
    item_ranks: torch.Tensor, ks: Sequence[int] = (1, 5, 10, 50, 200), group: dist.ProcessGroup | None = None
) -> dict[str, float | int | None]:
    """Compute Recall@K, HR@K, NDCG@K and MRR over the rows of all processes of the group. Collective.

    With one target per row, HR@K and Recall@K are equal; both names are returned because papers use either.
    NDCG@K = 1 / log2(rank + 1) if rank <= K, else 0 (the ideal DCG is 1). MRR = mean of 1 / rank, without a cut-off.

    Args:
        item_ranks: this process's target ranks, 1 = best, int64 [B]; may be empty on some processes.
        ks: cut-offs.
        group: process group, by default all ranks; only this process if torch.distributed is not initialized.

    Returns:
        `rows`, `mrr`, and `recall@K`, `hr@K`, `ndcg@K` for each K; the same on every process. Without rows, `rows` is 0
        and the metrics are None.

    Raises:
        ValueError: a rank or a cut-off below 1.
    """
    if len(ks) == 0 or min(ks) < 1:
        raise ValueError(f"ks is {tuple(ks)}; every cut-off is at least 1; pass e.g. (5, 10)")
    if item_ranks.numel() and int(item_ranks.min()) < 1:
        row = int(item_ranks.argmin())
        raise ValueError(f"ranks: row {row} is {int(item_ranks[row])}; ranks start at 1; add 1 to ranks counted from 0")
    # One all-reduce for the sums of all metrics. float64, because counts are summed as well.
    item_ranks = item_ranks.double()
    gains = 1 / torch.log2(item_ranks + 1)
    sums = [torch.ones_like(item_ranks).sum(), (1 / item_ranks).sum()]
    for k in ks:
        hit = item_ranks <= k
        sums += [hit.double().sum(), gains[hit].sum()]
    rows, reciprocal, *per_k = all_reduce_sum(torch.stack(sums), group).tolist()

    def mean(total: float) -> float | None:
        return total / rows if rows else None

    metrics: dict[str, float | int | None] = {"rows": int(rows), "mrr": mean(reciprocal)}
    for k, hits, gain in zip(ks, per_k[::2], per_k[1::2]):
        metrics |= {f"recall@{k}": mean(hits), f"hr@{k}": mean(hits), f"ndcg@{k}": mean(gain)}
    return metrics


def all_reduce_sum(sums: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Return the sum of a tensor over the processes of the group; without a group or other processes, the tensor.

    With nccl and several processes the result is on the GPU. Collective.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return sums
    total = sums.clone() if dist.get_backend(group) != "nccl" else sums.clone().cuda()
    dist.all_reduce(total, group=group)
    return total


def count_ahead(
    score_block: ScoreBlock,
    target_scores_B: torch.Tensor,
    target_B: torch.Tensor,
    items: tuple[int, int],
    seen: tuple[torch.Tensor, torch.Tensor] | None,
    block_size: int,
) -> torch.Tensor:
    """Count, for each row [B], the items that rank before the target: those whose score is not below target_scores_B.

    Args:
        score_block: (start, stop) of items -> their scores [B, stop - start]; the tensor is modified in place.
        items: (first, end) of the items to count.
        seen: (row [S], item [S]) of items that are not counted; the target is not counted either.

    Raises:
        ValueError: the score of a target is not finite.
    """
    finite_B = target_scores_B.isfinite()
    if not finite_B.all():
        row = int((~finite_B).int().argmax())
        raise ValueError(
            f"the target of row {row}, item {int(target_B[row])}, scores {target_scores_B[row].item()}; the "
            "score of a target must be finite; look in log.jsonl for the step at which the loss became nan"
        )
    rows_B = torch.arange(len(target_B), device=target_B.device)
    count_B = torch.zeros_like(target_B)
    for start in range(items[0], items[1], block_size):
        stop = min(start + block_size, items[1])
        scores = score_block(start, stop)
        # Excluded items get -inf, which never reaches a (finite) target score.
        excluded = [(rows_B, target_B)] if seen is None else [(rows_B, target_B), seen]
        for rows, ids in excluded:
            inside = (ids >= start) & (ids < stop)
            scores[rows[inside], ids[inside] - start] = -math.inf
        count_B += (~(scores < target_scores_B[:, None])).sum(1)  # not >=: a nan score must not improve the rank
    return count_B


def check_targets(target_B: torch.Tensor, rows: int, catalogue: int) -> None:
    """Raise ValueError if a row has no target, or a target is outside 1..catalogue - 1."""
    if target_B.shape != (rows,):
        raise ValueError(f"target has shape {tuple(target_B.shape)}; one target a row is expected: {(rows,)}")
    bad = (target_B < 1) | (target_B >= catalogue)
    if bad.any():
        row = int(bad.int().argmax())
        raise ValueError(
            f"target: row {row} is {int(target_B[row])}; targets are item ids in 1..{catalogue - 1} "
            "(0 is the unknown item); leave rows with an unknown target out"
        )


def seen_pairs(
    items_S: torch.Tensor | None, offsets: torch.Tensor | None, target_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return (row [S], item [S]) of the seen items, or None without them; raise ValueError for inconsistent offsets."""
    if items_S is None and offsets is None:
        return None
    if items_S is None or offsets is None:
        raise ValueError("seen_items_S and seen_offsets belong together; pass both or neither")
    lengths = offsets.diff()
    fits = len(offsets) == len(target_B) + 1 and offsets[0] == 0 and offsets[-1] == len(items_S)
    if not fits or (lengths < 0).any():
        raise ValueError(
            f"seen_offsets of length {len(offsets)} does not divide {len(items_S)} seen items among "
            f"{len(target_B)} rows; it must have one value more than there are rows, start at 0, never decrease, and "
            "end at the number of seen items"
        )
    rows = torch.repeat_interleave(torch.arange(len(target_B), device=items_S.device), lengths.to(items_S.device))
    return rows, items_S
