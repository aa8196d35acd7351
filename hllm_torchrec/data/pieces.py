"""Cutting long users into pieces, choosing a share of users, and sharing pieces out to ranks by cost."""

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hllm_torchrec.common.hashing import hash_columns

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Pieces:
    """Columns, one entry per piece: row group, row in it, stretch [start, end), exposures from `first_target` on."""

    group: Ints
    row: Ints
    start: Ints
    first_target: Ints
    end: Ints

    def __len__(self) -> int:
        return self.row.size

    @property
    def lengths(self) -> Ints:
        """Events per piece: what it costs."""
        return self.end - self.start


def cut_into_pieces(
    group: Ints, row: Ints, lengths: Ints, target_start: Ints, max_history: int, extend_history: bool = False
) -> Pieces:
    """Cut rows into stretches of at most `max_history` events that cover every exposure once.

    group, row, lengths, target_start: [n] int64, one entry per row: where it is, its number of events, and its first
    exposure. The pieces come in no order that matters.

    Every exposure sees all of its history or at least max_history / 2 events of it. extend_history: where a row's
    exposures fit into one stretch, it is as long as allowed, so that the exposures see more.
    """
    half = max_history // 2
    every = np.arange(lengths.size)
    start = np.where(lengths <= max_history, 0, np.maximum(0, target_start - half))
    if extend_history:
        start = np.minimum(start, np.maximum(0, lengths - max_history))
    end = np.minimum(lengths, start + max_history)
    parts = [(every, start, target_start, end)]
    left, reached = every, end
    while (unfinished := reached < lengths[left]).any():  # one round per further piece of the longest user
        left, first = left[unfinished], reached[unfinished]
        start = first - half
        reached = np.minimum(lengths[left], start + max_history)
        parts.append((left, start, first, reached))
    index, starts, firsts, ends = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((starts, index))
    index = index[order]
    return Pieces(group[index], row[index], starts[order], firsts[order], ends[order])


def in_user_sample(user_ids: Ints, share: float) -> NDArray[np.bool_]:
    """Which users (bool [n]) are of a share of all, by a hash of the id; a smaller share is part of a larger one."""
    return (hash_columns(user_ids) >> np.uint64(11)) < share * 2**53  # 53 bits: what a double holds exactly


def assign_balanced(pieces: Ints, costs: Ints, world_size: int, max_per_rank: int) -> list[Ints]:
    """Greedy (LPT) load balancing over `world_size` ranks: costliest first, each to the least loaded rank.

    pieces: [n] int64 numbers; costs: of all pieces that there are, by number; max_per_rank: pieces that a rank can
    hold: there are at most world_size x max_per_rank.
    """
    assigned: list[list[int]] = [[] for _ in range(world_size)]
    loads = [(0, 0, rank) for rank in range(world_size)]  # (cost, pieces, rank): a heap already
    for piece in pieces[np.argsort(-costs[pieces], kind="stable")].tolist():
        load, number, rank = heapq.heappop(loads)
        assigned[rank].append(piece)
        if number + 1 < max_per_rank:
            heapq.heappush(loads, (load + int(costs[piece]), number + 1, rank))
    return [np.array(share, dtype=np.int64) for share in assigned]
