"""Collation of pieces of users into a `HybridBatch`, in numpy on the loader's background thread.

Legend: as in `hllm_torchrec.data.batch` (B pieces, T history positions, Q queries, X exposures, G generative targets,
K negatives, U unique items, S slots, N requests, F numeric or evidence columns, P contexts of the position bias).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hllm_torchrec.common.arrays import Floats, Ints
from hllm_torchrec.data.bad_rows import MAX_SECOND
from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.data.batch_spec import BatchSpec
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.drawn_negatives import NegativeDraws, pool_of
from hllm_torchrec.data.event_schema import CONTEXT
from hllm_torchrec.data.events import Events, Piece
from hllm_torchrec.data.evidence import Evidence
from hllm_torchrec.data.item_factors import scaled_values, value_scale
from hllm_torchrec.data.jagged_arrays import concat_ranges, offsets_from_lengths
from hllm_torchrec.data.numeric_features import numeric_columns
from hllm_torchrec.data.piece_views import PieceView, interleaved_view, join_views, unique_items
from hllm_torchrec.data.request_context import RequestContext
from hllm_torchrec.data.stochastic_length import StochasticLength
from hllm_torchrec.data.task_targets import drawn_exposures, targets_of
from hllm_torchrec.data.visibility import visible_before
from hllm_torchrec.modules.features.hybrid import ACTION_GATE
from hllm_torchrec.modules.features.timestamps import TIME_FEATURES, split_timestamps

Bags = tuple[Ints, Ints]
"""(values, lengths): one bag per slot."""


class Collator:
    """Builds batches from pieces of `dataset` according to `spec`; `training` adds the dropouts and the generative
    targets.

    context: reads the context of the requests; None if the spec names no context.

    evidence: computes the evidence features of the exposures; of_fit: True if the pieces' exposures are the training
        exposures to which the evidence was fitted.

    stochastic_length: in training, selects the events of a long history that are read; every exposure and generative
    target stays (see `_view`).

    draws: draws the negatives that are added to the exposures; None: no negatives are added.
    """

    def __init__(
        self,
        dataset: Dataset,
        spec: BatchSpec,
        seed: int = 0,
        training: bool = False,
        item_vectors: Floats | None = None,
        stochastic_length: StochasticLength | None = None,
        evidence: Evidence | None = None,
        of_fit: bool = False,
        context: RequestContext | None = None,
        draws: NegativeDraws | None = None,
    ) -> None:
        self.draws = draws
        self.dataset, self.spec, self.seed, self.training = dataset, spec, seed, training
        self.item_vectors, self.stochastic_length = item_vectors, stochastic_length if training else None
        self.evidence, self.of_fit = evidence, of_fit
        assert context is not None or not (spec.context or spec.bias), "the spec names context"
        self.context = context or RequestContext(dataset.schema, (), {})
        self._value_scale = value_scale(dataset.action_values)
        self._cold = dataset.training_item_counts() == 0 if spec.cold_dropout else None
        self._negatives = possible_negatives(dataset) if spec.negatives else None
        self._bags = {name: dataset.feature_ids("item", name) for name in spec.item_features}
        self._bags |= {name: dataset.feature_ids("user", name) for name in spec.user_features}

    def negatives(self, epoch: int, step: int) -> Ints:
        """[K] distinct items, sampled uniformly from a generator seeded by (seed, epoch, step): equal on every rank.

        Items that the split holds out of train are never negatives, since they do not exist yet in training. Nor are
        withdrawn and forgotten items (`Dataset.excluded_items`); see `possible_negatives`.
        """
        wanted = self.spec.negatives
        # The rank is not part of the seed, so that all ranks have the same negatives, and each item is encoded once.
        rng = np.random.default_rng((self.seed, epoch, step))
        if self._negatives is not None:
            drawn = rng.choice(self._negatives, size=min(wanted, self._negatives.size), replace=False)
            return drawn.astype(np.int64)
        catalogue = self.dataset.num_items - 1
        if wanted >= catalogue:
            return np.arange(1, catalogue + 1)
        return rng.choice(catalogue, size=wanted, replace=False).astype(np.int64) + 1  # item 0 is the unknown item

    def __call__(self, pieces: Sequence[Piece], epoch: int, step: int, rank: int = 0) -> HybridBatch:
        """The batch of this rank's `pieces` (possibly none) at (epoch, step)."""
        pool = pool_of(pieces) if self.draws is not None else _NO_EVENTS.item_ids
        views = [self._view(piece, epoch, pool) for piece in pieces]
        seq_offsets = offsets_from_lengths([len(view.history) for view in views])
        query_offsets = offsets_from_lengths([len(view.queries) for view in views])
        # A rank without pieces still takes part in the step's collectives: the view of an empty piece has every field
        # with its dtype and zero rows.
        view = join_views(views or [self._view(_NO_EVENTS)], seq_offsets, query_offsets)
        negatives = self.negatives(epoch, step) if self.spec.negatives else np.empty(0, np.int64)
        users = np.array([piece.user_id for piece in pieces], dtype=np.int64)
        early = self.spec.fusion.query_is_target
        arrays: dict[str, NDArray] = {
            "user_ids": users,
            "seq_offsets": seq_offsets,
            "query_offsets": query_offsets,
            "query_target": np.arange(len(view.targets) if early else 0),
            **targets_of(view.targets, self.spec.tasks, self.dataset.schema, view.rates, self.training),
            "negative_items": negatives,
            "item_ids": view.history.item_ids,
            "timestamps": view.history.timestamps,
            "query_times": view.queries.timestamps,
            "target_items": view.targets.item_ids,
            "labels": view.targets.labels,
            **{name: getattr(view, name) for name in _BATCH_FIELDS},
            **unique_items(view, negatives),
        }
        if len(view.requests):
            arrays["request_query"] = view.request_query
        else:
            del arrays["request_index"]
        if self.stochastic_length is not None:
            arrays |= {
                "full_history_items": view.full_history_items,
                "full_history_offsets": offsets_from_lengths([view.full_history_items.size for view in views]),
            }
        # Dropout differs between ranks; rank + 1 also keeps rank 0 apart from the generator of the negatives.
        rng = np.random.default_rng((self.seed, epoch, step, rank + 1))
        unique = arrays["unique_items"]
        unknown = self._read_as_unknown(unique, rng)
        vectors = None if self.item_vectors is None else np.where(unknown[:, None], 0, self.item_vectors[unique])
        # Slots for the unique items cost lookups, so they exist only if the generative loss reads them.
        slots = unique if self.spec.item_slots and self.training else unique[:0]
        tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return HybridBatch(
            **tensors,
            features=self._features(view, np.repeat(users, np.diff(query_offsets)), slots, rng, unique[unknown]),
            numeric=self._numeric(view, slots.size),
            evidence=None if self.evidence is None else torch.from_numpy(view.evidence),
            item_vectors=None if vectors is None else torch.from_numpy(vectors),
            bias_ids=self._bias_ids(view.targets),
        )

    def item_features(self, items: Ints) -> KeyedJaggedTensor:
        """The bags of `items` [n], one slot per item, in the layout of the slots for a batch's unique items."""
        rng = np.random.default_rng(0)  # unused: ID dropout applies to histories and targets only
        unknown = items[:0] if self._cold is None else items[self._cold[items]]
        return self._features(self._view(_NO_EVENTS), np.empty(0, np.int64), items, rng, unknown)

    def _read_as_unknown(self, unique: Ints, rng: np.random.Generator) -> NDArray[np.bool_]:
        """Mask [U] of the batch's items whose IDs and vectors are replaced by the unknown item's (zeros)."""
        if self._cold is None:
            return np.zeros(unique.size, bool)
        # Drawn by item, not by slot, so that within a batch an item is cold everywhere or nowhere, as at evaluation.
        drawn = rng.random(unique.size) < self.spec.cold_dropout if self.training else False
        return self._cold[unique] | drawn

    def _view(self, piece: Piece, epoch: int = 0, pool: Ints | None = None) -> PieceView:
        """Filter the history, then compute the events that each exposure sees and the item that each position predicts.

        pool: items of the exposures of all pieces, from which negatives are drawn by "batch".

        If Stochastic Length shortens the history, an exposure sees the remaining events of its history. A next item is
        then predicted at the last remaining event at or before its original position, so an event may have several
        targets.
        """
        spec, times = self.spec, piece.timestamps
        # Three index spaces follow: events of the piece, `eligible` (events that can be history), and `read` (the
        # events of `eligible` that Stochastic Length keeps).
        eligible = np.flatnonzero(piece.labels == 1) if spec.history == "positive" else np.arange(len(piece))
        targets, rates = drawn_exposures(piece, spec.negative_rate if self.training else 1.0, (self.seed, epoch))
        order = times if spec.visibility == "second" else np.arange(len(piece))
        delay = spec.feedback_delay
        requests = Events.at([]) if piece.requests is None else piece.requests
        assert not len(requests) or spec.visibility == "second", "a request has a second, but no position"
        exposed, positions = piece[targets], targets + piece.offset
        if self.draws is not None and pool is not None:
            targets, exposed, rates, positions = self.draws.rows(piece, targets, epoch, pool)
        asked = exposed if not len(requests) else Events.concat([exposed, requests])
        visible = visible_before(order[eligible], np.concatenate([order[targets], requests.timestamps]) - delay)
        next_rows, next_items = self._generative(piece, eligible)
        # Drop the events after the last one that a query sees or that predicts a next item; no output depends on them.
        seen = eligible[: max(int(visible.max(initial=0)), int(next_rows.max(initial=-1)) + 1)]
        queries, query_of = self._queries(asked, visible)
        read = self._read(piece, times[seen], epoch)
        view = PieceView(
            history=piece[seen[read]],
            # The time of the following eligible event; the last one has no successor and repeats its own time.
            next_times=times[np.append(eligible[1:], eligible[-1:])[read]],
            queries=asked[queries],
            # From counts in `eligible` to counts in `read`: "left" is the number of read events before the limit.
            query_visible=np.searchsorted(read, visible[queries], side="left"),
            target_query=query_of[: targets.size],
            targets=exposed,
            target_values=scaled_values(exposed.labels, exposed.actions, self._value_scale),
            positions=positions,
            history_lengths=visible_before(times, times[targets] - delay) + piece.offset,
            # The last read event at or before the row; there is one, because `read` always contains event 0.
            next_rows=np.searchsorted(read, next_rows, side="right") - 1,
            next_items=next_items,
            numeric=self._numeric_of(piece, targets, requests)[queries],
            evidence=self._evidence(piece, targets, exposed.item_ids),
            rates=rates,
            full_history_items=piece.item_ids[seen],
            requests=requests,
            request_query=query_of[targets.size :],
        )
        return interleaved_view(view) if spec.interleaved else view

    def _numeric_of(self, piece: Piece, targets: Ints, requests: Events) -> Floats:
        """[X + N, F] numeric features of the exposures `targets` [X] and then of the requests [N] of a piece."""
        names, delay = self.spec.numeric_features, self.spec.feedback_delay
        found = [numeric_columns(names, piece.timestamps, piece.labels, targets, delay)]
        for second in requests.timestamps if names else ():
            # A request is not an event, so append it to the events before it, like the exposure of a nightly job.
            before = piece[: visible_before(piece.timestamps, int(second))]
            times, labels = np.append(before.timestamps, second), np.append(before.labels, np.float32(np.nan))
            found.append(numeric_columns(names, times, labels, np.array([len(before)]), delay))
        if not names:
            found.append(np.empty((len(requests), 0), np.float32))
        return np.concatenate(found)

    def _evidence(self, piece: Piece, targets: Ints, items: Ints) -> Floats:
        """[X, F] evidence of `items` [X] at the exposures `targets` [X] of a piece, from the complete sequence."""
        if self.evidence is None:
            return np.empty((targets.size, 0), np.float32)
        events, seconds = piece.complete or piece, piece.timestamps[targets]
        if self.spec.visibility == "second":
            seen = visible_before(events.timestamps, seconds - self.spec.feedback_delay)
        else:
            seen = targets + piece.offset
        return self.evidence.columns(events, seen, items, seconds, piece.user_id, self.of_fit)

    def _read(self, piece: Piece, times: Ints, epoch: int) -> Ints:
        """Sorted indices of the history events (at `times` [n]) that Stochastic Length selects; without it, all."""
        if self.stochastic_length is None:
            return np.arange(times.size)
        return self.stochastic_length.choose(times, epoch=epoch, user=piece.user_id, offset=piece.offset)

    def _queries(self, asked: Events, visible: Ints) -> tuple[Ints, Ints]:
        """(index in `asked` of the first event of each query [Q], query of each event [X + N]).

        asked: the exposures [X], then the requests [N]; visible: [X + N] number of eligible events that each sees.
        Early fusion: one query per event. Late fusion: events of the same second and context that see the same history
        share one query.
        """
        if not self.spec.fusion.query_is_user:
            every = np.arange(visible.size)
            return every, every
        # `visible` is part of the key, because with visibility by position, events of one second differ in history.
        moments = np.stack([visible, asked.timestamps, *self.context.keys(asked, self.spec.context)])
        _, first, inverse = np.unique(moments, axis=1, return_index=True, return_inverse=True)
        return first, inverse.reshape(-1)

    def _generative(self, piece: Piece, eligible: Ints) -> tuple[Ints, Ints]:
        """(rows [G] of the eligible history, next items [G]): the generative targets of this piece.

        A row's next item is the item of the eligible event after it. With a feedback delay, an event is a target of the
        last row that it may see, so a row may have several targets; an event that may see no row is not a target.
        """
        if not self.spec.negatives or eligible.size < 2 or not self.training:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        following = eligible[1:]
        # Overlapping pieces of a long user share events; only those from `first_target` on belong to this piece, so
        # that each next item is a target once.
        wanted = following >= piece.first_target
        if self.spec.positive_targets_only:
            # NaN: an event without a label is not a rejected exposure, so it stays a target.
            wanted &= (piece.labels[following] > 0) | np.isnan(piece.labels[following])
        if not self.spec.feedback_delay:
            return np.flatnonzero(wanted), piece.item_ids[following[wanted]]
        limits = piece.timestamps[following] - self.spec.feedback_delay
        seen = visible_before(piece.timestamps[eligible], limits)
        wanted &= seen > 0
        return seen[wanted] - 1, piece.item_ids[following[wanted]]

    def _features(
        self, view: PieceView, query_users: Ints, items: Ints, rng: np.random.Generator, unknown: Ints
    ) -> KeyedJaggedTensor:
        """One bag per key and slot; an absent value is an empty bag.

        Args:
            query_users: [Q] the user of each query.
            items: items with their own slot, after all other slots.
            unknown: items whose IDs are read as 0.
        """
        spec, history = self.spec, len(view.history)
        queries = len(view.queries) if spec.fusion.has_queries else 0
        is_item, is_action = self._tokens(history)
        asks = np.ones(queries, bool)
        of_events = self._item_of_slot(view, queries)
        item_of_slot = np.concatenate([of_events, items])
        slots = item_of_slot.size
        # User features are read only at queries, whose slots follow those of the history.
        user_of_slot = np.full(slots, -1)
        user_of_slot[history : history + queries] = query_users[:queries]
        bags: dict[str, Bags] = {}
        if spec.item_id:
            ids = np.concatenate([self._drop_ids(of_events, rng), items])
            ids = np.where(np.isin(ids, unknown), 0, ids) if unknown.size else ids
            ids = np.where(ids < self.dataset.num_table_items, ids, 0)
            bags["item_id"] = ids[ids >= 0], (ids >= 0).astype(np.int64)  # -1: a slot without an item, an empty bag
        if spec.action:
            # A query's own action is the label to predict, so it must not leak: the query reads the unknown action 0.
            # With interleaving a query is an item token, whose action token would come after it: no action bag.
            not_yet = np.zeros(0 if spec.interleaved else queries, dtype=np.int64)
            given = np.concatenate([is_action, asks & (not spec.interleaved)])
            bags["action"] = np.concatenate([view.history.actions[is_action], not_yet]), _present(given, slots)
        if spec.action_gate:
            bags[ACTION_GATE] = view.history.actions, _present(is_action, slots)
        for name in spec.item_features:
            bags[name] = gather_bags(*self._bags[name], item_of_slot)
        for name in spec.user_features:
            bags[name] = gather_bags(*self._bags[name], user_of_slot)
        for name in (name for name in spec.context if name in self.context.categorical):
            ids = self.context.ids(view.queries, name, count=not self.training)[:queries]
            bags[CONTEXT + name] = ids, _present(np.concatenate([np.zeros(history, bool), asks]), slots)
        if spec.time_depth:
            # A nightly job may request midnight after the last day of the time tables: use the last second of that day.
            asked = view.queries.timestamps[:queries]
            asked = np.where(asked == MAX_SECOND + 1, MAX_SECOND, asked)
            stamps = np.concatenate([view.history.timestamps[is_item], asked])
            timed = np.concatenate([is_item, asks])
            parts = split_timestamps(torch.from_numpy(stamps), spec.time_depth).numpy()
            for column, name in enumerate(TIME_FEATURES[: spec.time_depth]):
                bags[name] = parts[:, column], _present(timed, slots)
        # A KeyedJaggedTensor is key-major: all slots of the first key, then all slots of the next.
        return KeyedJaggedTensor(
            keys=list(bags),
            values=torch.from_numpy(_cat([values for values, _ in bags.values()])),
            lengths=torch.from_numpy(_cat([lengths for _, lengths in bags.values()])),
            stride=slots,
        )

    def _tokens(self, history: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Masks [T] of the history tokens with an item and with an action: every token both, or alternating."""
        every = np.ones(history, bool)
        if not self.spec.interleaved:
            return every, every
        is_item = np.arange(history) % 2 == 0
        return is_item, ~is_item

    def _item_of_slot(self, view: PieceView, queries: int) -> Ints:
        """Item of each slot before the slots of the unique items; -1: no item (action tokens, and late-fusion queries,
        whose targets have slots of their own).

        The order is that of `HybridBatch`: T history, then Q queries (early fusion: the targets themselves), then X
        targets for late fusion.
        """
        of_history = np.where(self._tokens(len(view.history))[0], view.history.item_ids, -1)
        if not self.spec.fusion.has_queries:
            return of_history
        none = np.full(queries if self.spec.fusion.query_is_user else 0, -1)
        return np.concatenate([of_history, none, view.targets.item_ids])

    def _drop_ids(self, item_of_slot: Ints, rng: np.random.Generator) -> Ints:
        """Replace ids by 0 with probability `id_dropout` in training, so that the unknown item's row is trained."""
        if not (self.training and self.spec.id_dropout):
            return item_of_slot
        dropped = rng.random(item_of_slot.size) < self.spec.id_dropout
        return np.where(dropped & (item_of_slot > 0), 0, item_of_slot)

    def _numeric(self, view: PieceView, item_slots: int) -> torch.Tensor | None:
        """[S, F] numeric features (0 outside of queries), then numeric context (NaN outside of queries), or None."""
        if not (self.spec.numeric_features or self.context.numeric):
            return None
        fusion = self.spec.fusion
        queries = len(view.queries) if fusion.has_queries else 0
        around = (len(view.history), item_slots + (len(view.targets) if fusion.query_is_user else 0)), (0, 0)
        numbers = np.pad(view.numeric[:queries], around)
        if self.context.numeric:
            context = np.pad(self.context.numbers(view.queries)[:queries], around, constant_values=np.nan)
            numbers = np.concatenate([numbers, context], axis=1)
        return torch.from_numpy(numbers)

    def _bias_ids(self, targets: Events) -> torch.Tensor | None:
        """[X, P] ids of the context of the position bias, or None."""
        if not self.spec.bias:
            return None
        ids = [self.context.ids(targets, name, count=False) for name in self.spec.bias]
        return torch.from_numpy(np.stack(ids, axis=1))


_BATCH_FIELDS = (
    "next_times",
    "query_visible",
    "target_query",
    "target_values",
    "positions",
    "history_lengths",
    "next_rows",
    "next_items",
)
"""Fields that a batch takes from the joined view unchanged."""
_NO_EVENTS = Piece(**Events.at([]).columns, user_id=0, first_target=0)


def gather_bags(values: Ints, offsets: Ints, ids: Ints) -> Bags:
    """Bags of `ids` [S] from jagged `values`; a negative id gives an empty bag."""
    known = np.maximum(ids, 0)  # -1 must not index the last row; its length is set to 0 below
    lengths = np.where(ids >= 0, offsets[known + 1] - offsets[known], 0)
    return values[concat_ranges(offsets[known], lengths)], lengths


def possible_negatives(dataset: Dataset) -> Ints | None:
    """Ids of the items that negatives are drawn from; None: all items.

    If the split holds items out of train, only items with a training event are drawn.
    """
    holds_out, excluded = "hold_out_items" in dataset.manifest["split"], dataset.excluded_items
    if not holds_out and not excluded.size:
        return None
    items = np.flatnonzero(dataset.training_item_counts()) if holds_out else np.arange(1, dataset.num_items)
    return np.setdiff1d(items, excluded)


def _present(where: NDArray[np.bool_], total: int) -> Ints:
    """Bag lengths [total]: 1 for slots where `where` is true, 0 for the others and for slots beyond `where`."""
    return np.pad(where.astype(np.int64), (0, total - where.size))


def _cat(parts: Sequence[Ints]) -> Ints:
    """Concatenate as int64; no parts give an empty array."""
    return np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int64, copy=False)
