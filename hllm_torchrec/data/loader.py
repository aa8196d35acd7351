"""`Loader`: the batches of a split for one rank, sharded, shuffled by (seed, epoch), prefetched and resumable.

The plan of an epoch is a pure function of (dataset, settings, world size, epoch). So every rank knows the number of
steps of all ranks without communication (a rank that has no more pieces yields empty batches), and a resumed run starts
in the middle of an epoch without reading the earlier batches.

- Up to SHARED_EVENTS events: every rank holds the complete split, and each global batch is divided so that ranks get
  equal work. At any world size with the same global batch, a step has the same samples.
- More than SHARED_EVENTS events: each rank reads its own row groups, in windows that bound memory (also with one rank).
"""

from collections import OrderedDict
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.common.seconds import text_of
from hllm_torchrec.data.background import prefetch
from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.data.collate import Collator
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.events import Piece, Sequences
from hllm_torchrec.data.jagged_arrays import concat_ranges, offsets_from_lengths
from hllm_torchrec.data.pieces import Pieces, assign_balanced, cut_into_pieces, in_user_sample, pieces_of_requests
from hllm_torchrec.data.visibility import visible_at_each_event

SHARED_EVENTS = 20_000_000
"""Maximum number of events of a split that every rank holds in memory: about half a gigabyte."""
WINDOW_ROW_GROUPS = 8
"""Number of row groups that are shuffled together (and held in memory) if each rank reads its own row groups."""


@dataclass(frozen=True)
class LoaderSpec:
    """Settings of a loader: the part of the dataset that it reads, and the composition of batches."""

    split: str
    batch_users: int
    """Number of pieces per rank and step."""
    max_history: int
    """Maximum number of events of a piece; see `cut_into_pieces`."""
    seed: int = 0
    shuffle: bool = False
    """Shuffle by (seed, epoch); evaluation keeps the files' order."""
    batch_cost: int = 0
    """If above 0, it replaces `batch_users`: the pieces of a step cost at most this per rank, on average over the ranks
    (or are a single piece that costs more), so that all steps have about the same cost."""
    item_costs: Ints | None = None
    """[N] cost of each item (its tokens); a piece's cost is the sum over its events. None: 1 per event."""
    all_events: bool = False
    """Treat every event as part of the split, including those of earlier parts, and include the training users
    without an event in the split."""
    since: int = 0
    """Second UTC: only events from this second on are exposures and targets, and users without such an event are left
    out; earlier events are history."""
    late: tuple[Ints, Ints] | None = None
    """(users [n], ascending, positions [n] in their sequences) of events before `since` that are exposures and targets
    too: see `late_events`."""
    extend_history: bool = False
    """See `cut_into_pieces`."""
    as_requests: bool = False
    """Cut rows longer than `max_history` so that each exposure reads the history that a request in serving would read:
    see `pieces_of_requests`."""
    user_share: float = 1.0
    """Share of the users to load. The users are the same for every split, and a subset of those of a larger share."""
    prefetch: int = 2
    """Number of batches prepared ahead."""
    timeout: float = 600.0
    """Seconds to wait for a prefetched batch."""


class Loader:
    """Iterates over the batches of a split for one rank.

    Args:
        collator: builds the batches.
        rank, world_size: rank of this process and number of processes.

    Raises:
        ValueError: the split is empty, or none of its users is in the share of users and has an event from `since` on.
    """

    def __init__(
        self, dataset: Dataset, collator: Collator, spec: LoaderSpec, rank: int = 0, world_size: int = 1
    ) -> None:
        self.dataset, self.collator, self.spec = dataset, collator, spec
        self.rank, self.world_size = rank, world_size
        # A user with a late event may have no event from `since` on, so no group may be left out.
        since = spec.since if spec.late is None or not spec.late[0].size else 0
        self.groups = dataset.row_groups(spec.split, since or None)
        """The row groups; `pieces.group` has indices into this list."""
        own = len(self.groups)
        if spec.all_events and spec.split != "train":
            self.groups += dataset.row_groups("train", since or None)
        if not self.groups:
            self._refuse_empty()
        self.pieces = self._index(own)
        if not len(self.pieces):
            self._refuse_empty()
        self.sharded = int(self.pieces.lengths.sum()) > SHARED_EVENTS
        # Consecutive shuffled pieces are in different groups of a window; a smaller cache would decode groups again.
        keep = WINDOW_ROW_GROUPS if self.sharded else len(self.groups)
        self._rows = _RowCache(self._read, keep)
        self.costs = self.pieces.lengths if spec.item_costs is None else self._costs(spec.item_costs)
        self._epoch_batches: tuple[int, list[list[Ints]]] | None = None

    def _refuse_empty(self) -> NoReturn:
        """Raise ValueError with the reason why there are no pieces."""
        split, share = f"{self.dataset.root}: split {self.spec.split!r}", self.spec.user_share
        if not self.groups and not self.spec.since:
            raise ValueError(f"{split} is empty: prepare the dataset with another split rule")
        if self.spec.since:
            since = f"no event since {text_of(self.spec.since)} (data.train_since)"
            raise ValueError(f"{split} has {since} of the users in a share of {share}: name an earlier moment")
        raise ValueError(f"{split}: no user is in a share of {share}: raise the share")

    def _index(self, num_own_groups: int) -> Pieces:
        """The pieces of the selected share of users in all row groups.

        Groups from index `num_own_groups` on belong to the training part; from these only the users without an event in
        the split are used.
        """
        parts: list[Pieces] = []
        self._lengths: list[Ints] = []
        users_of_split: list[Ints] = [np.empty(0, np.int64)]
        for number, group in enumerate(self.groups):
            rows = self.dataset.heads(group, self.spec.since)
            wanted = in_user_sample(rows.user_ids, self.spec.user_share)
            if number < num_own_groups:
                users_of_split.append(rows.user_ids)
            else:
                wanted &= ~np.isin(rows.user_ids, np.concatenate(users_of_split))
            first_targets = np.zeros_like(rows.target_start) if self.spec.all_events else rows.target_start
            if self.spec.since:
                first_targets = np.maximum(first_targets, rows.before)
                if self.spec.late is not None:
                    parts.append(self._cut(number, *_late_ranges(self.spec.late, np.where(wanted, rows.user_ids, 0))))
                wanted &= first_targets < rows.lengths
            chosen = np.flatnonzero(wanted)
            self._lengths.append(rows.lengths)
            parts.append(self._cut(number, chosen, rows.lengths[chosen], first_targets[chosen]))
        return Pieces.concat(parts)

    def _cut(self, number: int, rows: Ints, lengths: Ints, first_targets: Ints) -> Pieces:
        """The pieces of the rows with the indices `rows` [n] in group `number`; lengths, first_targets: [n]."""
        group, longest = np.full(rows.size, number), self.spec.max_history
        # Both rules read a row that fits into one piece from its first event on.
        long = (lengths > longest) & self.spec.as_requests
        short = ~long
        parts = [
            cut_into_pieces(
                group[short], rows[short], lengths[short], first_targets[short], longest, self.spec.extend_history
            )
        ]
        if long.any():
            events = self.dataset.sequences([self.groups[number]], ["timestamps"])
            seen = visible_at_each_event(events.timestamps, events.offsets, self.collator.spec.feedback_delay)
            seen = seen[concat_ranges(events.offsets[rows[long]], lengths[long])]
            bounds = offsets_from_lengths(lengths[long])
            parts.append(pieces_of_requests(group[long], rows[long], first_targets[long], seen, bounds, longest))
        return Pieces.concat(parts)

    def _costs(self, item_costs: Ints) -> Ints:
        """int64 [number of pieces] total cost of the events of each piece."""
        costs = np.empty(len(self.pieces), np.int64)
        for number, group in enumerate(self.groups):
            rows = self.dataset.sequences([group], ["item_ids"])
            sums = offsets_from_lengths(item_costs[rows.item_ids])
            # Differences of the running sum of costs; piece bounds are relative to the start of their row.
            inside = np.flatnonzero(self.pieces.group == number)
            first = rows.offsets[self.pieces.row[inside]]
            costs[inside] = sums[first + self.pieces.end[inside]] - sums[first + self.pieces.start[inside]]
        return costs

    def _read(self, number: int) -> Sequences:
        """The rows of a group, without leading events that no piece reads if these are at least half of all events."""
        group, lengths = self.groups[number], self._lengths[number]
        inside = slice(*np.searchsorted(self.pieces.group, [number, number + 1]))
        skipped = lengths.copy()  # users without a piece are skipped completely
        np.minimum.at(skipped, self.pieces.row[inside], self.pieces.start[inside])
        # Evidence is computed from complete sequences.
        if self.collator.evidence is not None or 2 * skipped.sum() < lengths.sum():
            return self.dataset.sequences([group])
        return self.dataset.tails(group, skipped)

    def steps(self, epoch: int) -> int:
        """Number of steps of an epoch, the same on every rank."""
        if not self.sharded and not self.spec.batch_cost:
            return -(-len(self.pieces) // (self.spec.batch_users * self.world_size))
        # Every step has collectives, so all ranks take as many steps as the rank with the most batches.
        return max(len(batches) for batches in self.rank_batches(epoch))

    def batches(self, epoch: int, first_step: int = 0) -> Generator[HybridBatch, None, None]:
        """This rank's batches from `first_step` on, exactly `steps(epoch) - first_step` of them.

        To stop before the end, close the generator; this stops its thread.

        Raises:
            TimeoutError: the background thread produced no batch within `timeout` seconds.
            RuntimeError: the background thread ended with an exception that is not an `Exception`, such as SystemExit.
        """
        mine = self.rank_batches(epoch)[self.rank]
        work = (
            (step, mine[step] if step < len(mine) else np.empty(0, np.int64))
            for step in range(first_step, self.steps(epoch))
        )
        where = f"{self.dataset.root}: rank {self.rank} of {self.world_size}, epoch {epoch} from step {first_step} on"
        batches = (self._build(index, epoch, step) for step, index in work)
        return prefetch(batches, self.spec.prefetch, self.spec.timeout, where)

    def _build(self, index: Ints, epoch: int, step: int) -> HybridBatch:
        return self.collator([self._piece(i) for i in index], epoch, step, self.rank)

    def _piece(self, i: int) -> Piece:
        pieces = self.pieces
        row, start, end, first = (
            int(column[i]) for column in (pieces.row, pieces.start, pieces.end, pieces.first_target)
        )
        return self._rows[int(pieces.group[i])].cut(row, start, end, first)

    def rank_batches(self, epoch: int) -> list[list[Ints]]:
        """The batches of every rank; a batch is an array of indices into `pieces` (int64 [b])."""
        if self._epoch_batches is None or self._epoch_batches[0] != epoch:
            # All ranks compute the plan of all ranks from the same generator, so that they agree without communication.
            rng = np.random.default_rng((self.spec.seed, epoch)) if self.spec.shuffle else None
            make = self._batches_of_own_groups if self.sharded else self._batches_of_shared_groups
            self._epoch_batches = (epoch, make(rng))
        return self._epoch_batches[1]

    def _batches_of_shared_groups(self, rng: np.random.Generator | None) -> list[list[Ints]]:
        """The plan if every rank holds all row groups: global batches of all pieces, balanced over the ranks."""
        count = len(self.pieces)
        order = rng.permutation(count) if rng is not None else np.arange(count)
        plan: list[list[Ints]] = [[] for _ in range(self.world_size)]
        for batch in self._cut_batches(order, self.world_size):
            # With a cost budget the number of pieces per rank is not limited.
            most = batch.size if self.spec.batch_cost else self.spec.batch_users
            # Pieces are balanced only within the global batch, so the pieces of a step do not depend on the world size.
            for rank, share in enumerate(assign_balanced(batch, self.costs, self.world_size, most)):
                plan[rank].append(share)
        return plan

    def _cut_batches(self, order: Ints, world_size: int) -> list[Ints]:
        """Cut the pieces in `order` into batches for `world_size` ranks together, by `batch_users` or `batch_cost`."""
        if not self.spec.batch_cost:
            size = self.spec.batch_users * world_size
            return [order[i : i + size] for i in range(0, order.size, size)]
        spent, budget, batches, at = offsets_from_lengths(self.costs[order]), self.spec.batch_cost * world_size, [], 0
        while at < order.size:
            # The longest range within the budget, but at least one piece, which may exceed the budget.
            end = max(at + 1, int(np.searchsorted(spent, spent[at] + budget, side="right")) - 1)
            batches.append(order[at:end])
            at = end
        return batches

    def _batches_of_own_groups(self, rng: np.random.Generator | None) -> list[list[Ints]]:
        """The plan if each rank reads its own row groups: shuffled groups, then shuffled pieces within a window."""
        groups = np.arange(len(self.groups))
        if rng is not None:
            rng.shuffle(groups)
        # `_index` appends pieces by group, so each group's pieces are a contiguous range.
        first_of = np.searchsorted(self.pieces.group, np.arange(len(self.groups) + 1))
        plan = []
        # Every rank computes the batches of all ranks, because `steps` is the maximum over them.
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


def _late_ranges(late: tuple[Ints, Ints], user_ids: Ints) -> tuple[Ints, Ints, Ints]:
    """(row, end, start) of each range of consecutive late events of the users `user_ids` [R]; id 0: skip the row."""
    users, positions = late
    chosen = np.isin(users, user_ids)
    users, positions = users[chosen], positions[chosen]
    # A range begins where the user changes, or where a position is not the previous position + 1.
    first = np.flatnonzero((np.diff(users, prepend=0) != 0) | (np.diff(positions, prepend=-1) != 1))
    last = np.append(first[1:], users.size) - 1
    order = np.argsort(user_ids, kind="stable")
    rows = order[np.searchsorted(user_ids[order], users[first])]
    return rows, positions[last[: first.size]] + 1, positions[first]


class _RowCache:
    """Least-recently-used cache of decoded row groups."""

    def __init__(self, read: Callable[[int], Sequences], capacity: int) -> None:
        self._read, self._capacity = read, capacity
        self._cached: OrderedDict[int, Sequences] = OrderedDict()

    def __getitem__(self, number: int) -> Sequences:
        if number not in self._cached:
            self._cached[number] = self._read(number)
            while len(self._cached) > self._capacity:
                self._cached.popitem(last=False)
        self._cached.move_to_end(number)
        return self._cached[number]
