"""`CreativeLoader`: batches for training and evaluation on personalized texts (creatives).

The user encoder reads a user's history in one pass for up to PER_PASS creatives, each of which is a query at its own
second: it sees only events of strictly earlier seconds. Every query of a pass sees at least the latest half of
`max_history` of these events (or all, if there are fewer). The plan of an epoch is a function of (table, dataset,
settings, world size, epoch). The interface is that of `Loader`.

Legend: N creatives of the part whose texts have tokens.
"""

from collections import OrderedDict
from collections.abc import Generator
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch

from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.data.background import prefetch
from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.data.collate import Collator
from hllm_torchrec.data.creative_batch import CreativeBatch
from hllm_torchrec.data.creative_table import WHOLE_HISTORY, CreativeRows
from hllm_torchrec.data.creative_tokens import CreativeTokens
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.events import Events, Piece
from hllm_torchrec.data.loader import LoaderSpec
from hllm_torchrec.data.pieces import assign_balanced
from hllm_torchrec.data.visibility import visible_before

PER_PASS = 4
"""Maximum number of creatives of one pass, so that a step has texts of several users."""
_USERS_KEPT = 4096


class CreativeLoader:
    """Iterates over the batches of creatives for one rank.

    Args:
        collator: builds the batches; its visibility must be by second.
        part, tokens: the creatives of a part, and their texts as tokens.
        spec: settings, of which seed, shuffle, max_history, prefetch and timeout are used.
        per_batch: maximum number of creatives per rank and step, on average over the ranks (a step has at least one
            pass). The ranks of a step get about the same number of tokens.
        never_alone: if only one user would be left for the last step of an epoch, add this user to the step before.

    Raises:
        ValueError: the part has no creatives.
    """

    def __init__(
        self,
        dataset: Dataset,
        collator: Collator,
        part: CreativeRows,
        tokens: CreativeTokens,
        spec: LoaderSpec,
        per_batch: int,
        rank: int = 0,
        world_size: int = 1,
        never_alone: bool = False,
    ) -> None:
        self.dataset, self.collator, self.part, self.tokens = dataset, collator, part, tokens
        self.spec, self.per_batch, self.never_alone = spec, per_batch, never_alone
        self.rank, self.world_size = rank, world_size
        self._cached: OrderedDict[int, Events] = OrderedDict()
        if not len(tokens):
            raise ValueError(
                f"{dataset.root}: the table of creatives has no rows in {spec.split}: build it with another split"
            )

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def _seen(self) -> Ints:
        """[N] number of the user's events that each creative may see."""
        found = np.empty(len(self.tokens), np.int64)
        users = self.part.user_ids[self.tokens.rows]
        for rows in np.split(np.arange(users.size), np.flatnonzero(np.diff(users)) + 1):
            events = self._events(int(users[rows[0]]))
            found[rows] = visible_before(events.timestamps, self.seconds(rows) - self.collator.spec.feedback_delay)
        return found

    def seconds(self, index: Ints) -> Ints:
        """Return the seconds (UTC) of creatives.

        A creative that sees all events gets the earliest second at which all are visible.
        """
        seconds = self.part.timestamps[self.tokens.rows[index]].copy()
        for i in np.flatnonzero(seconds == WHOLE_HISTORY):
            events = self._events(int(self.part.user_ids[self.tokens.rows[index[i]]]))
            last = int(events.timestamps[-1]) if len(events) else 0
            seconds[i] = last + 1 + self.collator.spec.feedback_delay
        return seconds

    @cached_property
    def passes(self) -> list[Ints]:
        """Creatives of each pass, as indices into the tokens: all of one user, in order of time."""
        users, found = self.part.user_ids[self.tokens.rows], []
        first = 0
        for i in range(1, users.size + 1):
            if i == users.size or users[i] != users[first] or i - first == PER_PASS or not self._fits(first, i):
                found.append(np.arange(first, i))
                first = i
        return found

    def _fits(self, first: int, last: int) -> bool:
        """True if the window of events for the creatives `first` to `last` has at most `max_history` events."""
        start, end = self._window(first, last)
        return end - start <= self.spec.max_history

    def _window(self, first: int, last: int) -> tuple[int, int]:
        """Return (start, end) of the events that a pass for the creatives `first` to `last` reads."""
        end = int(self._seen[last])
        return min(
            max(0, end - self.spec.max_history), max(0, int(self._seen[first]) - self.spec.max_history // 2)
        ), end

    def steps(self, epoch: int) -> int:
        """Number of steps of an epoch, the same on every rank."""
        return len(self._plan(epoch))

    def batches(self, epoch: int, first_step: int = 0) -> Generator[HybridBatch, None, None]:
        """Yield this rank's batches from `first_step` on. Close the generator to stop before its end."""
        plan = self._plan(epoch)[first_step:]
        where = f"{self.dataset.root}: creatives, rank {self.rank} of {self.world_size}, epoch {epoch}"
        batches = (self._build(ranks[self.rank], epoch, first_step + i) for i, ranks in enumerate(plan))
        return prefetch(batches, self.spec.prefetch, self.spec.timeout, where)

    def _plan(self, epoch: int) -> list[list[Ints]]:
        """Return the passes of each step and rank, as indices into `passes`.

        With equal `per_batch` x `world_size`, a step has the same passes, divided among any number of ranks.
        """
        count = len(self.passes)
        order = np.arange(count)
        if self.spec.shuffle:
            order = np.random.default_rng((self.spec.seed, epoch)).permutation(count)
        sizes = np.array([index.size for index in self.passes], np.int64)
        costs = np.array([int(self.tokens.lengths[index].sum()) for index in self.passes], np.int64)
        spent, budget, plan, at = np.cumsum(sizes[order]), self.per_batch * self.world_size, [], 0
        while at < count:
            before = spent[at - 1] if at else 0
            end = max(at + 1, int(np.searchsorted(spent, before + budget, side="right")))
            if self.never_alone and 0 < count - end <= budget and self._users_of(order[end:]).size == 1:
                end = count
            plan.append(assign_balanced(order[at:end], costs, self.world_size, end - at))
            at = end
        return plan

    def _users_of(self, passes: Ints) -> Ints:
        """Return the distinct users of passes."""
        return np.unique(self.part.user_ids[self.tokens.rows[[self.passes[one][0] for one in passes]]])

    def _build(self, passes: Ints, epoch: int, step: int) -> HybridBatch:
        index = np.concatenate([np.empty(0, np.int64), *(self.passes[one] for one in passes)]).astype(np.int64)
        pieces = [self._piece(self.passes[one]) for one in passes]
        batch = self.collator(pieces, epoch, step, self.rank)
        rows = np.asarray(self.tokens.rows[index])
        negatives = batch.negative_items.numpy()
        may_match = np.ones((index.size, negatives.size), bool)
        if negatives.size:
            for n, row in enumerate(rows):
                may_match[n] = ~np.isin(negatives, self._own_items(int(self.part.user_ids[row])))
        creative = CreativeBatch(
            rows=torch.from_numpy(rows.copy()),
            user_ids=torch.from_numpy(self.part.user_ids[rows]),
            weights=torch.from_numpy(self.part.weights[rows]),
            texts=self.tokens.gather(index),
            may_match=torch.from_numpy(may_match),
            profiles=self.tokens.gather_profiles(index),
        )
        if batch.request_query is None:
            empty = torch.empty(0, dtype=torch.int64)
            return replace(batch, creative=creative, request_query=empty, request_index=empty)
        return replace(batch, creative=creative)

    def _piece(self, index: Ints) -> Piece:
        """Return the piece of a pass for the creatives `index`: their events and requests, without exposures."""
        rows = self.tokens.rows[index]
        user = int(self.part.user_ids[rows[0]])
        events = self._events(user)
        start, end = self._window(int(index[0]), int(index[-1]))
        requests = Events.at(self.seconds(index), item_ids=self.part.item_ids[rows])
        return Piece(
            **events[start:end].columns,
            user_id=user,
            offset=start,
            first_target=end - start,
            complete=events,
            requests=requests,
        )

    def _own_items(self, user: int) -> Ints:
        """Return the items of a user's events and creatives; they are not used as negatives for this user."""
        first, last = np.searchsorted(self.part.user_ids, [user, user + 1])
        return np.union1d(self._events(user).item_ids, self.part.item_ids[first:last])

    def _events(self, user: int) -> Events:
        if user not in self._cached:
            self._cached[user] = self.dataset.user_events(user)
            while len(self._cached) > _USERS_KEPT:
                self._cached.popitem(last=False)
        self._cached.move_to_end(user)
        return self._cached[user]
