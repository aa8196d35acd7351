"""Batches of a split for one rank: sharded, shuffled by (seed, epoch), prepared ahead, resumable.

The plan of an epoch is a pure function of (dataset, world size, seed, epoch), so every rank knows how many
steps all ranks will take (a rank that runs out earlier yields empty batches) and a resumed run starts in the
middle without reading what came before.

- Up to SHARED_EVENTS events: every rank holds the whole split, and each global batch is dealt out so that
  ranks get equal work. The same samples form a step at any world size (of the same global batch).
- Beyond: each rank reads its own row groups, in windows that bound memory (with one rank, too).
"""

import heapq
import itertools
import queue
import threading
from collections import OrderedDict
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.common.hashing import hash_columns
from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.data.collate import Collator, Piece
from hllm_torchrec.data.dataset import Dataset, RowGroup
from hllm_torchrec.data.jagged_arrays import offsets_from_lengths

SHARED_EVENTS = 20_000_000
"""Held by every rank up to here: about half a gigabyte."""
WINDOW_ROW_GROUPS = 8
"""Row groups that are shuffled together (and held in memory) when ranks read their own."""


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


class Loader:
    """Iterates over a split.

    Args:
        dataset, split: what to read.
        collator: builds the batches.
        batch_users: pieces per rank and step.
        batch_cost: where above 0, a step of a rank has pieces of at most this cost together (or a single one above
            it) instead of `batch_users`, so that steps cost alike.
        item_costs: [N], cost of each item (its tokens); a piece costs what its events do. None: 1 each.
        max_history: see `cut_into_pieces`.
        rank, world_size: this process and how many there are.
        all_events: every event counts as one of the split's part, those of earlier parts too, and the training users
            without an event in it come as well.
        extend_history: see `cut_into_pieces`.
        user_share: share of the users that come, the same ones whatever the split; a smaller share is part of a larger
        one.
        shuffle: reorder by (seed, epoch); evaluation keeps the file's order.
        prefetch: batches prepared ahead.
        timeout: seconds to wait for a batch that is prepared ahead.

    Raises:
        ValueError: the split is empty, or no user is left of it.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        collator: Collator,
        *,
        batch_users: int,
        max_history: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = False,
        prefetch: int = 2,
        batch_cost: int = 0,
        item_costs: Ints | None = None,
        all_events: bool = False,
        extend_history: bool = False,
        user_share: float = 1.0,
        timeout: float = 600.0,
    ) -> None:
        self.dataset, self.collator, self.timeout = dataset, collator, timeout
        self.batch_users, self.rank, self.world_size = batch_users, rank, world_size
        self.seed, self.shuffle, self.prefetch = seed, shuffle, prefetch
        self.batch_cost = batch_cost
        self._groups = dataset.row_groups(split)
        own = len(self._groups)
        if all_events and split != "train":
            self._groups += dataset.row_groups("train")
        if not self._groups:
            raise ValueError(f"{dataset.root}: split {split!r} is empty: prepare the dataset with another split rule")
        self.pieces = self._index(max_history, own, all_events, extend_history, user_share)
        if not len(self.pieces):
            raise ValueError(
                f"{dataset.root}: no user of split {split!r} is among a share of {user_share}: raise the share"
            )
        self.sharded = int(self.pieces.lengths.sum()) > SHARED_EVENTS
        keep = WINDOW_ROW_GROUPS if self.sharded else len(self._groups)
        self._rows = _RowCache(dataset, self._groups, keep)
        self.costs = self.pieces.lengths if item_costs is None else self._costs(item_costs)
        self._epoch_batches: tuple[int, list[list[Ints]]] | None = None

    def _index(
        self, max_history: int, num_own_groups: int, all_events: bool, extend_history: bool, share: float
    ) -> Pieces:
        """The pieces of a share of users in all row groups; of those from number `num_own_groups` on, whom the others
        lack."""
        columns: list[tuple[Ints, Ints, Ints, Ints]] = []
        users: list[Ints] = []
        for number, group in enumerate(self._groups):
            names = ["user_id", "target_start", "actions"]
            table = self.dataset.read_row_group(group.path, group.index, columns=names)
            users.append(table["user_id"].to_numpy())
            lengths = pc.list_value_length(table["actions"]).to_numpy().astype(np.int64)
            starts = table["target_start"].to_numpy().astype(np.int64)
            starts = np.zeros_like(starts) if all_events else starts
            is_new = (
                np.ones(lengths.size, bool)
                if number < num_own_groups
                else ~np.isin(users[-1], np.concatenate(users[:num_own_groups]))
            )
            rows = np.flatnonzero(is_new & in_user_sample(users[-1], share))
            columns.append((np.full(rows.size, number), rows, lengths[rows], starts[rows]))
        numbers, all_rows, all_lengths, all_starts = (np.concatenate(c) for c in zip(*columns, strict=True))
        return cut_into_pieces(numbers, all_rows, all_lengths, all_starts, max_history, extend_history)

    def _costs(self, item_costs: Ints) -> Ints:
        """[pieces] what the events of each piece cost."""
        costs = np.empty(len(self.pieces), np.int64)
        for number, group in enumerate(self._groups):
            table = self.dataset.read_row_group(group.path, group.index, columns=["item_ids"])
            lists = table["item_ids"].combine_chunks()
            sums = offsets_from_lengths(item_costs[lists.flatten().to_numpy()])
            inside = np.flatnonzero(self.pieces.group == number)
            first = offsets_from_lengths(pc.list_value_length(lists).to_numpy())[self.pieces.row[inside]]
            costs[inside] = sums[first + self.pieces.end[inside]] - sums[first + self.pieces.start[inside]]
        return costs

    def steps(self, epoch: int) -> int:
        """Steps of an epoch, the same on every rank."""
        if not self.sharded and not self.batch_cost:
            return -(-len(self.pieces) // (self.batch_users * self.world_size))
        return max(len(batches) for batches in self.rank_batches(epoch))

    def batches(self, epoch: int, first_step: int = 0) -> Generator[HybridBatch, None, None]:
        """This rank's batches from `first_step` on, exactly `steps(epoch) - first_step` of them.

        Close the generator when leaving early: that stops its thread.

        Raises:
            TimeoutError: the thread that prepares them made none in `timeout` seconds; RuntimeError: it was ended.
        """
        mine = self.rank_batches(epoch)[self.rank]
        work = (
            (step, mine[step] if step < len(mine) else np.empty(0, np.int64))
            for step in range(first_step, self.steps(epoch))
        )
        where = f"{self.dataset.root}: rank {self.rank} of {self.world_size}, epoch {epoch} from step {first_step} on"
        return _prefetch((self._build(index, epoch, step) for step, index in work), self.prefetch, self.timeout, where)

    def _build(self, index: Ints, epoch: int, step: int) -> HybridBatch:
        return self.collator([self._piece(i) for i in index], epoch, step, self.rank)

    def _piece(self, i: int) -> Piece:
        pieces = self.pieces
        start, first, end = int(pieces.start[i]), int(pieces.first_target[i]), int(pieces.end[i])
        rows = self._rows[int(pieces.group[i])]
        row = int(pieces.row[i])
        cut = slice(rows.offsets[row] + start, rows.offsets[row] + end)
        return Piece(
            int(rows.user_ids[row]),
            start,
            first - start,
            rows.item_ids[cut],
            rows.timestamps[cut],
            rows.labels[cut],
            rows.actions[cut],
        )

    def rank_batches(self, epoch: int) -> list[list[Ints]]:
        """For every rank, the pieces [b] int64 (numbers into `pieces`) of each of its batches."""
        if self._epoch_batches is None or self._epoch_batches[0] != epoch:
            rng = np.random.default_rng((self.seed, epoch)) if self.shuffle else None
            make = self._batches_of_own_groups if self.sharded else self._batches_of_shared_groups
            self._epoch_batches = (epoch, make(rng))
        return self._epoch_batches[1]

    def _batches_of_shared_groups(self, rng: np.random.Generator | None) -> list[list[Ints]]:
        count = len(self.pieces)
        order = rng.permutation(count) if rng is not None else np.arange(count)
        plan: list[list[Ints]] = [[] for _ in range(self.world_size)]
        for batch in self._cut_batches(order, self.world_size):
            most = batch.size if self.batch_cost else self.batch_users
            for rank, share in enumerate(assign_balanced(batch, self.costs, self.world_size, most)):
                plan[rank].append(share)
        return plan

    def _cut_batches(self, order: Ints, world_size: int) -> list[Ints]:
        """Batches for `world_size` together, of so many users or of so much cost."""
        if not self.batch_cost:
            size = self.batch_users * world_size
            return [order[i : i + size] for i in range(0, order.size, size)]
        spent, budget, batches, at = offsets_from_lengths(self.costs[order]), self.batch_cost * world_size, [], 0
        while at < order.size:
            end = max(at + 1, int(np.searchsorted(spent, spent[at] + budget, side="right")) - 1)
            batches.append(order[at:end])
            at = end
        return batches

    def _batches_of_own_groups(self, rng: np.random.Generator | None) -> list[list[Ints]]:
        groups = np.arange(len(self._groups))
        if rng is not None:
            rng.shuffle(groups)
        first_of = np.searchsorted(self.pieces.group, np.arange(len(self._groups) + 1))
        plan = []
        for rank in range(self.world_size):
            own, batches = groups[rank :: self.world_size], []
            for at in range(0, own.size, WINDOW_ROW_GROUPS):
                inside = own[at : at + WINDOW_ROW_GROUPS]
                window = np.concatenate([np.arange(first_of[g], first_of[g + 1]) for g in inside])
                if rng is not None:
                    rng.shuffle(window)
                batches += self._cut_batches(window, world_size=1)
            plan.append(batches)
        return plan


def in_user_sample(user_ids: Ints, share: float) -> NDArray[np.bool_]:
    """Which users (bool [n]) are of a share of all, by a hash of the id; a smaller share is part of a larger one."""
    return (hash_columns(user_ids) >> np.uint64(11)) < share * 2**53  # 53 bits: what a double holds exactly


def assign_balanced(pieces: Ints, costs: Ints, world_size: int, max_per_rank: int) -> list[Ints]:
    """Greedy (LPT) load balancing over `world_size` ranks: costliest first, each to the least loaded rank.

    pieces: [n] int64 numbers; costs: of all pieces that there are, by number; max_per_rank: pieces that a rank can
    hold:
    there are at most world_size x max_per_rank.
    """
    assigned: list[list[int]] = [[] for _ in range(world_size)]
    loads = [(0, 0, rank) for rank in range(world_size)]  # (cost, pieces, rank): a heap already
    for piece in pieces[np.argsort(-costs[pieces], kind="stable")].tolist():
        load, number, rank = heapq.heappop(loads)
        assigned[rank].append(piece)
        if number + 1 < max_per_rank:
            heapq.heappush(loads, (load + int(costs[piece]), number + 1, rank))
    return [np.array(share, dtype=np.int64) for share in assigned]


@dataclass(frozen=True)
class _Rows:
    """A decoded row group."""

    user_ids: Ints
    offsets: Ints
    item_ids: Ints
    timestamps: Ints
    labels: NDArray[np.float32]
    actions: Ints


class _RowCache:
    """Decoded row groups, the least recently used dropped first."""

    def __init__(self, dataset: Dataset, groups: list[RowGroup], capacity: int) -> None:
        self._dataset, self._groups, self._capacity = dataset, groups, capacity
        self._cached: OrderedDict[int, _Rows] = OrderedDict()

    def __getitem__(self, number: int) -> _Rows:
        if number not in self._cached:
            group = self._groups[number]
            self._cached[number] = _decode(self._dataset.read_row_group(group.path, group.index))
            while len(self._cached) > self._capacity:
                self._cached.popitem(last=False)
        self._cached.move_to_end(number)
        return self._cached[number]


def _decode(table: pa.Table) -> _Rows:
    table = table.combine_chunks()
    lengths = pc.list_value_length(table["item_ids"]).to_numpy()
    flat = {name: pc.list_flatten(table[name]) for name in ("item_ids", "timestamps", "labels", "actions")}
    return _Rows(
        user_ids=table["user_id"].to_numpy(),
        offsets=offsets_from_lengths(lengths),
        item_ids=flat["item_ids"].to_numpy(),
        timestamps=flat["timestamps"].to_numpy(),
        labels=flat["labels"].to_numpy().astype(np.float32),  # a null becomes NaN
        actions=flat["actions"].to_numpy().astype(np.int64),
    )


def _prefetch(
    batches: Iterator[HybridBatch], depth: int, timeout: float, where: str
) -> Generator[HybridBatch, None, None]:
    """Run an iterator on a background thread, `depth` items ahead; its errors are raised here.

    Closing the generator stops the thread. timeout: seconds to wait for an item; where: for the message after that.
    """
    if depth <= 0:
        yield from batches
        return
    producer = _Producer(batches, depth, where)
    try:
        for number in itertools.count():
            try:
                kind, value = producer.ready.get(timeout=timeout)
            except queue.Empty:
                raise TimeoutError(
                    f"{where}: no batch for {timeout:g} s, after {number}; the dataset's disk does not answer, or a "
                    "batch takes longer than parallel.timeout"
                ) from None
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        producer.stop()


class _Producer:
    """A thread that runs an iterator; in `ready` are ("batch", batch), and then ("end", None) or ("error", error)."""

    def __init__(self, batches: Iterator[HybridBatch], depth: int, where: str) -> None:
        self.ready: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(batches, where), name="hllm-loader", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the batch that it is making, and wait for that, but not for long."""
        self._stopped.set()
        self._thread.join(timeout=5)

    def _run(self, batches: Iterator[HybridBatch], where: str) -> None:
        try:
            for batch in batches:
                if not self._put("batch", batch):
                    return
            self._put("end", None)
        except Exception as error:  # handed to the consumer, who raises it
            self._put("error", error)
        except BaseException as error:  # raised as it is, a SystemExit would end the job as if all were well
            self._put("error", RuntimeError(f"{where}: the thread that prepares batches was ended by {error!r}"))

    def _put(self, kind: str, value: Any) -> bool:
        while not self._stopped.is_set():
            try:
                self.ready.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
