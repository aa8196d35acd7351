"""Cutting of long users into pieces, selection of a share of users, and assignment of pieces to ranks by cost."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hllm_torchrec.common.hashing import hash_columns
from hllm_torchrec.data.jagged_arrays import concat_ranges

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Pieces:
    """Columns with one entry per piece: row group, row in the group, range [start, end) of events, first exposure."""

    group: Ints
    row: Ints
    start: Ints
    first_target: Ints
    end: Ints

    def __len__(self) -> int:
        return self.row.size

    @property
    def lengths(self) -> Ints:
        """Number of events per piece, which is its default cost."""
        return self.end - self.start

    @classmethod
    def concat(cls, parts: "Sequence[Pieces]") -> "Pieces":
        """All pieces of `parts` (at least one), sorted by group, row and first target."""
        columns = [np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)]
        pieces = cls(*columns)
        order = np.lexsort((pieces.first_target, pieces.row, pieces.group))
        return cls(*(column[order] for column in columns))


def cut_into_pieces(
    group: Ints, row: Ints, lengths: Ints, target_start: Ints, max_history: int, extend_history: bool = False
) -> Pieces:
    """Cut rows into pieces of at most `max_history` events that cover every exposure exactly once.

    group, row, lengths, target_start: [n] int64, one entry per row: its location, its number of events, and the index
    of its first exposure. The pieces are sorted by row, then by start.

    Every exposure sees its complete history or at least max_history / 2 events of it: consecutive pieces overlap by
    half. extend_history: if a row's exposures fit into one piece, the piece starts as early as `max_history` allows,
    so that the exposures see more.
    """
    half = max_history // 2
    every = np.arange(lengths.size)
    # A row with at most max_history events is one piece; else half of the first piece is before the first exposure.
    start = np.where(lengths <= max_history, 0, np.maximum(0, target_start - half))
    if extend_history:
        start = np.minimum(start, np.maximum(0, lengths - max_history))
    end = np.minimum(lengths, start + max_history)
    parts = [(every, start, target_start, end)]
    left, reached = every, end
    # Vectorized over rows: each round adds one more piece to every row that is not yet covered to its end.
    while (unfinished := reached < lengths[left]).any():
        left, first = left[unfinished], reached[unfinished]
        start = first - half
        reached = np.minimum(lengths[left], start + max_history)
        parts.append((left, start, first, reached))
    index, starts, firsts, ends = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((starts, index))
    index = index[order]
    return Pieces(group[index], row[index], starts[order], firsts[order], ends[order])


def window_start(seen: int | Ints, max_history: int) -> Any:
    """Index of the first event that a request reads, given that it may see the first `seen` events.

    A request reads at most max_history - 1 events. The index moves in steps of max_history / 2, so a new event usually
    extends an encoded history, which must be encoded again only every max_history / 2 events. Evaluation and serving
    both use this rule. seen: int, or int64 [n].
    """
    # Events above the limit, rounded up to a multiple of the step.
    step = max(1, max_history // 2)
    return np.maximum(0, -(-(seen - (max_history - 1)) // step) * step)


def pieces_of_requests(
    group: Ints, row: Ints, target_start: Ints, seen: Ints, offsets: Ints, max_history: int
) -> Pieces:
    """Cut rows into pieces whose exposures see the same events as the same requests in serving; see `window_start`.

    group, row, target_start: [n] int64, one entry per row; seen: [T] number of its user's events that a request at
    each event may see, not decreasing within a row; offsets: [n + 1] boundaries of the rows in `seen`.

    A piece begins at the first event that its exposures read, and has at most `max_history` exposures.
    """
    lengths = np.diff(offsets)
    index = np.repeat(np.arange(lengths.size), lengths - target_start)
    position = concat_ranges(target_start, lengths - target_start)
    start = window_start(seen[offsets[index] + position], max_history)
    begins = np.flatnonzero((np.diff(index, prepend=-1) != 0) | (np.diff(start, prepend=-1) != 0))
    begin_of = np.repeat(begins, np.diff(np.append(begins, index.size)))
    first = np.flatnonzero((np.arange(index.size) - begin_of) % max_history == 0)
    last = np.append(first[1:], index.size) - 1
    rows = index[first]
    return Pieces(group[rows], row[rows], start[first], position[first], position[last] + 1)


def in_user_sample(user_ids: Ints, share: float) -> NDArray[np.bool_]:
    """Mask (bool [n]) of the users in a sample of this share, by a hash of the id; a larger sample contains it."""
    return (hash_columns(user_ids) >> np.uint64(11)) < share * 2**53  # a double represents 53 bits exactly


def assign_balanced(pieces: Ints, costs: Ints, world_size: int, max_per_rank: int) -> list[Ints]:
    """Greedy load balancing (LPT): pieces in descending order of cost, each to the least loaded rank.

    pieces: [n] int64 indices, n <= world_size * max_per_rank; costs: costs of all pieces by index; max_per_rank:
    maximum number of pieces of a rank.
    """
    assigned: list[list[int]] = [[] for _ in range(world_size)]
    loads = [(0, 0, rank) for rank in range(world_size)]  # (cost, pieces, rank); sorted, hence a valid heap
    # A stable sort and the rank in the key make ties deterministic: every rank computes the same assignment.
    for piece in pieces[np.argsort(-costs[pieces], kind="stable")].tolist():
        load, number, rank = heapq.heappop(loads)
        assigned[rank].append(piece)
        if number + 1 < max_per_rank:  # a full rank does not return to the heap
            heapq.heappush(loads, (load + int(costs[piece]), number + 1, rank))
    return [np.array(share, dtype=np.int64) for share in assigned]
