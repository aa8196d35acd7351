"""`BatchScorer`: scores of `Scorer` for many requests in one pass, from precomputed inputs.

    scorer = BatchScorer.of_run(Path("runs/early"))
    logits = scorer.score_batch([Request(state, items, time), ...])

The items' inputs are computed once for the catalogue (`SlotInputs`). The linear layers of the user encoder run over the
candidates of all requests. With late fusion the item's part of the head is precomputed (`PreparedHead`).

Legend: R requests, m candidates of one request, M of all requests, O outputs of all tasks, F numeric features, D width.
"""

import itertools
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hllm_torchrec.common.arrays import Floats, Ints
from hllm_torchrec.common.errors import configured_by
from hllm_torchrec.modules.attention.keys_values import HistoryCache
from hllm_torchrec.modules.heads import PredictionHead
from hllm_torchrec.modules.history_cache import begin_requests, read_history
from hllm_torchrec.modules.prepared_head import PreparedHead, can_prepare
from hllm_torchrec.serving.raw_context import ContextValue
from hllm_torchrec.serving.scorer import Scorer
from hllm_torchrec.serving.slot_inputs import SlotInputs
from hllm_torchrec.serving.task_scores import output_shape
from hllm_torchrec.serving.user_state import UserHistory, UserState

ROWS_AT_ONCE = 8192
"""Largest number of candidates, of all requests together, that are computed at a time."""

DICT_ITEMS = 2_000_000
"""Largest number of items whose raw ids are looked up in a dictionary: about 150 bytes per item, and ten times as fast
as the index `RawIds`, which larger catalogues use."""


@dataclass(frozen=True)
class Request:
    """Candidates of a user at one point in time.

    state: made by this scorer; items: [m] dense ids; time: seconds UTC; context: columns [1] of the request's context,
    from `BatchScorer.context_columns`.
    """

    state: UserState
    items: Ints
    time: int
    context: Mapping[str, NDArray[Any]] = field(default_factory=dict)


class BatchScorer(Scorer):
    """A `Scorer` with `score_batch` for many requests. One thread scores; other threads may add items meanwhile."""

    _inputs: SlotInputs | None = None
    _numbers_of: dict[str, int] | None = None

    def _make_collator(self) -> None:
        dataset, known = self.experiment.dataset, self.experiment.dataset.num_table_items
        if self._inputs is None:
            self._inputs = SlotInputs(self.experiment)
            head = self.hllm.head
            self._head = PreparedHead(head) if isinstance(head, PredictionHead) and can_prepare(head) else None
            if known <= DICT_ITEMS:
                raw = dataset.items["raw_item_id"].slice(0, known - 1).to_pylist()
                self._numbers_of = {text: number for number, text in enumerate(raw, 1) if text}
        else:
            self._inputs.extend(known)  # a new item may also have been given another text
        if self._head is not None:
            self._prepared = self._head.items(self._inputs.items)
        super()._make_collator()  # after the above, because it makes the new ids known to other threads
        if self._numbers_of is not None:
            new = dataset.items["raw_item_id"].slice(known - 1).to_pylist()
            self._numbers_of.update({text: number for number, text in enumerate(new, known)})

    def item_ids(self, items: Any, what: str = "candidates") -> Ints:
        """See `Scorer.item_ids`. Known raw ids are looked up in a dictionary, which has strings only, so dense ids are
        never found there."""
        if self._numbers_of is not None and isinstance(items, list):
            with suppress(KeyError, TypeError):
                return np.fromiter(map(self._numbers_of.__getitem__, items), np.int64, len(items))
        return super().item_ids(items, what)

    @property
    def inputs(self) -> SlotInputs:
        """Prepared inputs of the user encoder."""
        assert self._inputs is not None
        return self._inputs

    @property
    def catalogue_bytes(self) -> int:
        """Bytes of the precomputed tensors of all items."""
        return self.inputs.items.nbytes + (0 if self._head is None else self._prepared.nbytes)

    def seen_part(self, history: UserHistory, time: int) -> UserHistory:
        """The events that a request at `time` may see."""
        count = self.rules.seen(history, time)
        return history if count == len(history) else UserHistory(history.user_id, **history[:count].columns)

    @torch.no_grad()
    def score_batch(self, requests: Sequence[Request]) -> list[NDArray[np.float32]]:
        """Logits [m] of each request, or outputs [m, O] if the model has several tasks; equal to those of `Scorer` up
        to rounding.

        Raises:
            ValueError: a state was made by another model, or a leave-one-out request is earlier than the last event.
        """
        outputs = [np.empty((0, *output_shape(self.hllm)), np.float32)] * len(requests)
        nonempty = [number for number, request in enumerate(requests) if request.items.size]
        ready = [self._with_its_state(requests[number]) for number in nonempty]
        with configured_by("user.shape", length="data.max_history"):
            scores = [logits for group in _groups(ready) for logits in self._score_group(group)]
        for number, logits in zip(nonempty, scores, strict=True):
            outputs[number] = logits
        return outputs

    def _with_its_state(self, request: Request) -> Request:
        """Return the request, with a state whose first event is that of the request's window.

        A state with another first event is replaced by a new one, encoded from the visible events alone.
        """
        state, seen = request.state, self.rules.seen(request.state.history, request.time)
        self._check_state(state)
        if self.rules.start(seen) == state.start:
            return request
        return replace(request, state=self.read(self.seen_part(state.history, request.time)))

    def window(self, request: Request) -> tuple[UserHistory, Floats | None]:
        """The events that the model reads for a request, and the request's numeric features [1, F] (None: no such
        features)."""
        request = self._with_its_state(request)
        seen = self.seen_part(request.state.history, request.time)
        return seen.since(request.state.start), self.rules.numbers(request.state, request.time)

    def context_columns(self, given: Mapping[str, ContextValue] | None) -> Mapping[str, NDArray[Any]]:
        """Convert the raw context values of a request to `Request.context`; see `Scorer.score`.

        Raises:
            ValueError: a value is missing, its name is unknown, or it is not a valid number.
        """
        return self._context.columns(given, 1)

    def _score(
        self, state: UserState, items: Ints, moment: int, context: Mapping[str, NDArray[Any]]
    ) -> NDArray[np.float32]:
        return self.score_batch([Request(state, items, moment, context)])[0]

    def _score_group(self, requests: Sequence[Request]) -> list[NDArray[np.float32]]:
        """Logits of a group of requests, which have at most ROWS_AT_ONCE candidates in total, or of a single request
        with any number of candidates."""
        states, times = [one.state for one in requests], [one.time for one in requests]
        visible = [self.rules.visible(state, time) for state, time in zip(states, times, strict=True)]
        ask = begin_requests(self.hllm.user, [state.cache for state in states], times, visible)
        numbers = [self.rules.numbers(state, time) for state, time in zip(states, times, strict=True)]
        numeric = np.concatenate([one for one in numbers if one is not None]) if numbers[0] is not None else None
        context = {name: np.concatenate([one.context[name] for one in requests]) for name in requests[0].context}
        x_RD = self.inputs.requests([state.history.user_id for state in states], times, numeric, context)
        # The loop has several steps only for a group of one request, so `users` is the same in all steps.
        sizes = [one.items.size for one in requests]
        late = self.hllm.fusion.query_is_user
        users = ask(x_RD, [1] * len(requests)) if late else x_RD
        logits = []
        for start in range(0, sum(sizes), ROWS_AT_ONCE):
            parts = [one.items[start : start + ROWS_AT_ONCE] for one in requests]
            counts = [part.size for part in parts]
            items = concatenated(parts)
            ids = torch.from_numpy(items).to(x_RD.device)
            rows = None  # a group of one request: the user's vector is broadcast
            if len(parts) > 1:
                rows = torch.from_numpy(np.repeat(np.arange(len(parts)), counts)).to(ids.device)
            evidence = self._evidence(states, counts, items, times)
            if late:
                logits.append(self._late(users, rows, ids, evidence))
            else:
                x_MD = self.inputs.items.index_select(0, ids)
                x_MD = x_MD + (users if rows is None else users.index_select(0, rows))
                logits.append(self.hllm.head(ask(x_MD, counts), None, evidence))
        values = self.hllm.biased(logits[0] if len(logits) == 1 else torch.cat(logits)).float().cpu().numpy()
        return split(values, sizes)

    def _late(self, users_RD: Tensor, rows: Tensor | None, ids: Tensor, evidence: Tensor | None) -> Tensor:
        if self._head is None:
            targets = self.inputs.items.index_select(0, ids)
            users = users_RD.expand(len(ids), -1) if rows is None else users_RD.index_select(0, rows)
            logits: Tensor = self.hllm.head(users, targets, evidence)
            return logits
        return self._head.score(users_RD, rows, self._prepared.index_select(0, ids), evidence)

    def _read(self, events: UserHistory, cache: HistoryCache | None) -> HistoryCache:
        x_TD, times = self.inputs.history(events)
        with configured_by("user.shape", length="data.max_history"):
            return read_history(self.hllm.user, x_TD, times, cache)


def concatenated(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Same as `np.concatenate`, but does not copy if there is a single part."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def split(values: NDArray[Any], sizes: Sequence[int]) -> list[NDArray[Any]]:
    """Consecutive parts of the given sizes, as views."""
    ends = itertools.accumulate(sizes)
    return [values[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _groups(requests: Sequence[Request]) -> list[list[Request]]:
    """Divide requests, in order, into groups of at most ROWS_AT_ONCE candidates; a larger request is a group alone."""
    groups: list[list[Request]] = []
    rows = 0
    for request in requests:
        size = request.items.size
        if not groups or rows + size > ROWS_AT_ONCE:
            groups.append([])
            rows = 0
        groups[-1].append(request)
        rows += size
    return groups
