"""Inputs of the user encoder for serving. A request needs no collator, and TorchRec's modules only for hash tables.

The part that depends on the item alone, c(item) = P(E) + ID + item features, is computed once for the complete
catalogue by the model itself. The other parts are looked up in plain tensors: action and gate for each event, user
features and time for each request. The definitions are those of `data.collate` and `HybridFeatures`; a test compares
every slot with theirs.

    x_i = c(item_i) * (1 + g(action_i)) + action_i + MLP(time_i)                             history position
    x_q = c(item_q) + action_0 + user features + context + MLP(time_q) + W n_q               query, early fusion
    x_q = [USER]    + action_0 + user features + context + MLP(time_q) + W n_q               query, late fusion

Legend: g action gate, n_q numeric features of query q, W the linear layer of numeric features, N items, T history
positions, R requests, D width, F numeric features.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hllm_torchrec.common.arrays import Floats, Ints
from hllm_torchrec.data.bad_rows import MAX_SECOND
from hllm_torchrec.data.collate import gather_bags
from hllm_torchrec.data.event_schema import CONTEXT
from hllm_torchrec.data.events import Events
from hllm_torchrec.embedding.tables import assemble_tensor
from hllm_torchrec.evaluation.catalogue_retrieval import ITEMS_AT_ONCE, vectors_by_features
from hllm_torchrec.models.experiment import Experiment
from hllm_torchrec.modules.features.hybrid import ACTION_GATE, pad_empty_batch
from hllm_torchrec.modules.features.sum_pooling import sum_bags
from hllm_torchrec.modules.features.timestamps import split_timestamps

Extra = Mapping[str, NDArray[Any]]
USERS_KEPT = 65_536
"""Number of users whose sum of features is cached; the least recently used ones are dropped."""
_TABLES = "features.tables.embedding_bags."


class SlotInputs:
    """Input vectors of histories and requests for one model with loaded weights.

    Rows of items that are added later are computed by `extend`.
    """

    def __init__(self, experiment: Experiment) -> None:
        self._experiment, self._spec, self._hllm = experiment, experiment.batch_spec, experiment.hllm
        self.tables = _plain_tables(experiment)
        """Table name -> weights, of the tables that are read for each event or request."""
        self._user_bags = {name: experiment.dataset.feature_ids("user", name) for name in self._spec.user_features}
        self._of_user = lru_cache(USERS_KEPT)(lambda user: self.user_features(np.array([user]))[0])
        self.items = torch.empty(0, self._hllm.user.width, device=experiment.device)
        """c [N, D] float32 of every item; row 0 is the unknown item."""
        self.extend()

    @torch.no_grad()
    def extend(self, changed_from: int = 0) -> None:
        """Compute the rows of items that were added to the dataset.

        changed_from: first of the rows that are computed again; 0: existing rows are kept.
        """
        dataset = self._experiment.dataset
        kept = self.items[: changed_from or len(self.items)]
        collator = self._experiment.request_collator(self._spec)
        self._keys = collator.item_features(np.empty(0, np.int64)).keys()
        missing = np.arange(len(kept), dataset.num_items)
        blocks = np.split(missing, range(ITEMS_AT_ONCE, missing.size, ITEMS_AT_ONCE))
        rows = [vectors_by_features(self._experiment, collator, block) for block in blocks if block.size]
        self.items = torch.cat([kept, *rows])

    def history(self, events: Events) -> tuple[Tensor, Tensor]:
        """Inputs x [T, D] and times [T] of a user's events; with interleaved actions an event has two positions."""
        if self._spec.history == "positive":
            events = events[events.labels == 1]
        actions = self._tensor(events.actions)
        x_TD = self.items[self._tensor(events.item_ids)]
        if ACTION_GATE in self.tables:
            x_TD = x_TD * (1 + self._rows(ACTION_GATE, actions))
        times = self._tensor(events.timestamps)
        if self._hllm.features.merge_time is not None:
            x_TD = x_TD + self._time(times)
        if not self._spec.action:
            return x_TD, times
        of_action = self._rows("action", actions)
        if self._spec.interleaved:
            return torch.stack([x_TD, of_action], dim=1).flatten(0, 1), times.repeat_interleave(2)
        return x_TD + of_action, times

    def requests(
        self, users: Sequence[int], times: Sequence[int], numeric: Floats | None, context: Extra | None = None
    ) -> Tensor:
        """Input [R, D] that all queries of a request share: all terms of x_q except the candidate's c(item).

        numeric: [R, F]; context: name -> column [R] of `Events.extra`.
        """
        x_RD = torch.stack([self._of_user(user) for user in users])
        if self._hllm.features.merge_time is not None:
            x_RD = self._time(self._tensor(np.minimum(np.array(times, np.int64), MAX_SECOND))) + x_RD
        for row in self._of_query:
            x_RD = x_RD + row
        numbers = [] if numeric is None else [numeric]
        known = self._experiment.context
        if known is not None and self._spec.context:
            queries = Events.at(times, labels=np.zeros(len(times)), extra=context or {})
            for name in (name for name in self._spec.context if name in known.categorical):
                x_RD = x_RD + self._rows(CONTEXT + name, self._tensor(known.ids(queries, name, count=True)))
            numbers += [known.numbers(queries)] if known.numeric else []
        if numbers and self._hllm.features.numeric is not None:
            given = torch.from_numpy(np.concatenate(numbers, axis=1)).to(x_RD.device)
            x_RD = x_RD + self._hllm.features.numeric(self._hllm.standardized_numbers(given))
        return x_RD

    @cached_property
    def _of_query(self) -> list[Tensor]:
        """Terms [D] that are the same for all queries: the unknown action's row and, with late fusion, [USER]."""
        rows = []
        if self._spec.action and not self._spec.interleaved:
            rows.append(self._rows("action", torch.zeros(1, dtype=torch.int64, device=self.items.device))[0])
        return [*rows, self._hllm.user_token] if self._spec.fusion.query_is_user else rows

    def _time(self, times: Tensor) -> Tensor:
        """MLP(time) [T, D]."""
        merge, names = self._hllm.features.merge_time, self._hllm.features.time_features
        assert merge is not None
        parts = split_timestamps(times, len(names))
        rows = [self._rows(name, parts[:, column]) for column, name in enumerate(names)]
        merged: Tensor = merge(torch.cat(rows, dim=1))
        return merged

    def user_features(self, users: Ints) -> Tensor:
        """Sum of the features of users [R]: [R, D]."""
        total = self.items.new_zeros(users.size, self.items.shape[1])
        for name, bags in self._user_bags.items():
            values, lengths = (self._tensor(part) for part in gather_bags(*bags, users))
            total = total + sum_bags(self._rows(name, values), lengths)
        return total

    def _rows(self, table: str, ids: Tensor) -> Tensor:
        """Rows [n, D] float32 of ids [n]."""
        if table not in self._hllm.features.hash_tables:
            return self.tables[table].index_select(0, ids).float()
        assert self._hllm.features.hashed is not None
        # TorchRec's sharded tables expect the keys of their first batch.
        lengths = torch.cat([torch.full_like(ids, int(key == table)) for key in self._keys])
        jagged = KeyedJaggedTensor(self._keys, ids, lengths=lengths, stride=ids.numel())
        rows: Tensor = self._hllm.features.hashed(pad_empty_batch(jagged)).to_dict()[table]
        return rows[: ids.numel()].float()

    def _tensor(self, array: Ints) -> Tensor:
        return torch.tensor(array, device=self._experiment.device)  # a copy: Arrow's arrays are not writable


def _plain_tables(experiment: Experiment) -> dict[str, Tensor]:
    """Table name -> weights of the tables that are read for each event or request, in their dtype in the model.

    Raises:
        ValueError: the tables are quantized.
    """
    spec = experiment.batch_spec
    names = {*spec.user_features, "action", ACTION_GATE, *experiment.hllm.features.time_features}
    names |= {CONTEXT + name for name in spec.context}
    found = {
        name.removeprefix(_TABLES).removesuffix(".weight"): assemble_tensor(value).detach().to(experiment.device)
        for name, value in experiment.model.state_dict().items()
        if name.startswith(_TABLES) and name.removeprefix(_TABLES).removesuffix(".weight") in names
    }
    missing = {name for name in spec.user_features if name not in experiment.hllm.features.hash_tables}
    if missing - found.keys():
        raise ValueError("table_dtype: a scorer of batches reads the tables as trained: leave it out")
    return found
