"""Turns pieces of users into a `HybridBatch`, in numpy on the loader's background thread."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hllm_torchrec.common.arrays import Floats, Ints
from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.data.batch_spec import BatchSpec
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.events import Events, Piece
from hllm_torchrec.data.item_factors import scaled_values, value_scale
from hllm_torchrec.data.jagged_arrays import concat_ranges, offsets_from_lengths
from hllm_torchrec.data.numeric_features import numeric_columns
from hllm_torchrec.data.stochastic_length import StochasticLength
from hllm_torchrec.data.visibility import visible_before
from hllm_torchrec.modules.features.hybrid import ACTION_GATE
from hllm_torchrec.modules.features.timestamps import TIME_FEATURES, split_timestamps

Bags = tuple[Ints, Ints]
"""(values, lengths): one bag per slot."""


@dataclass(frozen=True)
class _View:
    """What one piece brings to a batch after the history filter; joined, what all of them do.

    history [T], queries [Q], targets [X]: the events that are read, those whose second and context a query has, and the
    exposures. The other names are those of `HybridBatch`; `target_query` and `next_rows` count from the piece's first
    query and row until pieces are joined. numeric: [Q, F].
    """

    history: Events
    next_times: Ints
    queries: Events
    query_visible: Ints
    target_query: Ints
    targets: Events
    target_values: Floats
    positions: Ints
    history_lengths: Ints
    next_rows: Ints
    next_items: Ints
    numeric: Floats
    full_history_items: Ints


class Collator:
    """Builds batches by `spec` from pieces of `dataset`; `training` adds id dropout and L_gen's targets.

    stochastic_length: in training, what of a long history is read; every exposure and generative target stays (see
    `_view`).
    """

    def __init__(
        self,
        dataset: Dataset,
        spec: BatchSpec,
        seed: int = 0,
        training: bool = False,
        item_vectors: Floats | None = None,
        stochastic_length: StochasticLength | None = None,
    ) -> None:
        self.dataset, self.spec, self.seed, self.training = dataset, spec, seed, training
        self.item_vectors, self.stochastic_length = item_vectors, stochastic_length if training else None
        self._value_scale = value_scale(dataset.action_values)
        self._cold = dataset.training_item_counts() == 0 if spec.cold_dropout else None
        self._negatives = _items_of_train(dataset) if "hold_out_items" in dataset.manifest["split"] else None
        self._bags = {name: dataset.feature_ids("item", name) for name in spec.item_features}
        self._bags |= {name: dataset.feature_ids("user", name) for name in spec.user_features}

    def negatives(self, epoch: int, step: int) -> Ints:
        """[K] distinct items, drawn uniformly by (seed, epoch, step): the same on every rank.

        Items that the split holds out of train do not exist yet in training: they are no negatives.
        """
        wanted = self.spec.negatives
        rng = np.random.default_rng((self.seed, epoch, step))
        if self._negatives is not None:
            drawn = rng.choice(self._negatives, size=min(wanted, self._negatives.size), replace=False)
            return drawn.astype(np.int64)
        catalogue = self.dataset.num_items - 1
        if wanted >= catalogue:
            return np.arange(1, catalogue + 1)
        return rng.choice(catalogue, size=wanted, replace=False).astype(np.int64) + 1

    def __call__(self, pieces: Sequence[Piece], epoch: int, step: int, rank: int = 0) -> HybridBatch:
        """The batch of this rank's `pieces` (may be empty) at (epoch, step)."""
        views = [self._view(piece, epoch) for piece in pieces]
        seq_offsets = offsets_from_lengths([len(view.history) for view in views])
        query_offsets = offsets_from_lengths([len(view.queries) for view in views])
        # Without pieces: the view of a piece without events has every field, empty.
        view = _join(views or [self._view(_NO_EVENTS)], seq_offsets, query_offsets)
        negatives = self.negatives(epoch, step) if self.spec.negatives else np.empty(0, np.int64)
        users = np.array([piece.user_id for piece in pieces], dtype=np.int64)
        early = self.spec.fusion.query_is_target
        arrays: dict[str, NDArray] = {
            "user_ids": users,
            "seq_offsets": seq_offsets,
            "query_offsets": query_offsets,
            "query_target": np.arange(len(view.targets) if early else 0),
            "weights": np.ones(len(view.targets), np.float32),
            "negative_items": negatives,
            "item_ids": view.history.item_ids,
            "timestamps": view.history.timestamps,
            "query_times": view.queries.timestamps,
            "target_items": view.targets.item_ids,
            "labels": view.targets.labels,
            **{name: getattr(view, name) for name in _BATCH_FIELDS},
            **_unique_items(view, negatives),
        }
        if self.stochastic_length is not None:
            arrays |= {
                "full_history_items": view.full_history_items,
                "full_history_offsets": offsets_from_lengths([view.full_history_items.size for view in views]),
            }
        rng = np.random.default_rng((self.seed, epoch, step, rank + 1))
        unique = arrays["unique_items"]
        unknown = self._read_as_unknown(unique, rng)
        vectors = None if self.item_vectors is None else np.where(unknown[:, None], 0, self.item_vectors[unique])
        slots = unique if self.spec.item_slots and self.training else unique[:0]
        return HybridBatch(
            **{name: torch.from_numpy(array) for name, array in arrays.items()},
            features=self._features(view, np.repeat(users, np.diff(query_offsets)), slots, rng, unique[unknown]),
            numeric=self._numeric(view, slots.size),
            item_vectors=None if vectors is None else torch.from_numpy(vectors),
        )

    def item_features(self, items: Ints) -> KeyedJaggedTensor:
        """The bags of `items` [n] by themselves: slots as a batch has them for its unique items."""
        rng = np.random.default_rng(0)  # nothing is drawn: IDs are dropped of histories and targets only
        unknown = items[:0] if self._cold is None else items[self._cold[items]]
        return self._features(self._view(_NO_EVENTS), np.empty(0, np.int64), items, rng, unknown)

    def _read_as_unknown(self, unique: Ints, rng: np.random.Generator) -> NDArray[np.bool_]:
        """Of the batch's items [U], those whose IDs and vectors the model is not to see."""
        if self._cold is None:
            return np.zeros(unique.size, bool)
        drawn = rng.random(unique.size) < self.spec.cold_dropout if self.training else False
        return self._cold[unique] | drawn

    def _view(self, piece: Piece, epoch: int = 0) -> _View:
        """Filter the history, find what each exposure sees and what each position generates.

        Where the history is shortened, an exposure sees what is left of its history, and the next item that an event
        would generate is generated by the last event left up to that one: an event may then have several targets.
        """
        spec, times = self.spec, piece.timestamps
        # The events that can be history, and the place of each event in the order that visibility goes by.
        kept = np.flatnonzero(piece.labels == 1) if spec.history == "positive" else np.arange(len(piece))
        targets = piece.exposures
        order = times if spec.visibility == "second" else np.arange(len(piece))
        visible = visible_before(order[kept], order[targets])
        next_rows, next_items = self._generative(piece, kept)
        # Events after the last one that a query sees, or that generates something, would be read for nothing.
        seen = kept[: max(int(visible.max(initial=0)), int(next_rows.max(initial=-1)) + 1)]
        queries, query_of_target = self._queries(times[targets], visible)
        read = self._read(piece, times[seen], epoch)
        view = _View(
            history=piece[seen[read]],
            next_times=times[np.append(kept[1:], kept[-1:])[read]],
            queries=piece[targets[queries]],
            # Counted in `kept` so far; the batch counts in what is read of it.
            query_visible=np.searchsorted(read, visible[queries], side="left"),
            target_query=query_of_target,
            targets=piece[targets],
            target_values=scaled_values(piece.labels[targets], piece.actions[targets], self._value_scale),
            positions=targets + piece.offset,
            history_lengths=visible_before(times, times[targets]) + piece.offset,
            next_rows=np.searchsorted(read, next_rows, side="right") - 1,
            next_items=next_items,
            numeric=numeric_columns(spec.numeric_features, times, piece.labels, targets)[queries],
            full_history_items=piece.item_ids[seen],
        )
        return _interleaved(view) if spec.interleaved else view

    def _read(self, piece: Piece, times: Ints, epoch: int) -> Ints:
        """Which of the history's events, at `times` [n], are read: indices, sorted."""
        if self.stochastic_length is None:
            return np.arange(times.size)
        return self.stochastic_length.choose(times, epoch=epoch, user=piece.user_id, offset=piece.offset)

    def _queries(self, request_times: Ints, visible: Ints) -> tuple[Ints, Ints]:
        """(exposure that stands for each query, query of each exposure).

        Early: one query per exposure. Late: exposures that see the same at the same second share one.
        """
        if not self.spec.fusion.query_is_user:
            every = np.arange(visible.size)
            return every, every
        moments = np.stack([visible, request_times])
        _, first, inverse = np.unique(moments, axis=1, return_index=True, return_inverse=True)
        return first, inverse.reshape(-1)

    def _generative(self, piece: Piece, kept: Ints) -> tuple[Ints, Ints]:
        """Rows of the kept history whose next kept item is a generative target of this piece."""
        if not self.spec.negatives or kept.size < 2 or not self.training:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        following = kept[1:]
        wanted = following >= piece.first_target
        if self.spec.positive_targets_only:
            wanted &= (piece.labels[following] > 0) | np.isnan(piece.labels[following])
        return np.flatnonzero(wanted), piece.item_ids[following[wanted]]

    def _features(
        self, view: _View, query_users: Ints, items: Ints, rng: np.random.Generator, unknown: Ints
    ) -> KeyedJaggedTensor:
        """One bag per key and slot; an absent value is an empty bag. query_users [Q]: whose each query is; items:
        those with a slot of their own, after all others; unknown: items whose IDs are read as 0."""
        spec, history = self.spec, len(view.history)
        queries = len(view.queries) if spec.fusion.has_queries else 0
        is_item, is_action = self._tokens(history)
        asks = np.ones(queries, bool)
        of_events = self._item_of_slot(view, queries)
        item_of_slot = np.concatenate([of_events, items])
        slots = item_of_slot.size
        user_of_slot = np.full(slots, -1)
        user_of_slot[history : history + queries] = query_users[:queries]
        bags: dict[str, Bags] = {}
        if spec.item_id:
            ids = np.concatenate([self._drop_ids(of_events, rng), items])
            ids = np.where(np.isin(ids, unknown), 0, ids) if unknown.size else ids
            bags["item_id"] = ids[ids >= 0], (ids >= 0).astype(np.int64)
        if spec.action:
            # The candidate's own action is what we predict: unknown, or after the query, which is an item's token.
            not_yet = np.zeros(0 if spec.interleaved else queries, dtype=np.int64)
            given = np.concatenate([is_action, asks & (not spec.interleaved)])
            bags["action"] = np.concatenate([view.history.actions[is_action], not_yet]), _present(given, slots)
        if spec.action_gate:
            bags[ACTION_GATE] = view.history.actions, _present(is_action, slots)
        for name in spec.item_features:
            bags[name] = gather_bags(*self._bags[name], item_of_slot)
        for name in spec.user_features:
            bags[name] = gather_bags(*self._bags[name], user_of_slot)
        if spec.time_depth:
            stamps = np.concatenate([view.history.timestamps[is_item], view.queries.timestamps[:queries]])
            timed = np.concatenate([is_item, asks])
            parts = split_timestamps(torch.from_numpy(stamps), spec.time_depth).numpy()
            for column, name in enumerate(TIME_FEATURES[: spec.time_depth]):
                bags[name] = parts[:, column], _present(timed, slots)
        return KeyedJaggedTensor(
            keys=list(bags),
            values=torch.from_numpy(_cat([values for values, _ in bags.values()])),
            lengths=torch.from_numpy(_cat([lengths for _, lengths in bags.values()])),
            stride=slots,
        )

    def _tokens(self, history: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """[T] which history tokens bear an item, and which an action: all both, or in turn."""
        every = np.ones(history, bool)
        if not self.spec.interleaved:
            return every, every
        is_item = np.arange(history) % 2 == 0
        return is_item, ~is_item

    def _item_of_slot(self, view: _View, queries: int) -> Ints:
        """[S] whose item each slot bears; -1: none (action tokens; late queries, whose targets follow as slots)."""
        of_history = np.where(self._tokens(len(view.history))[0], view.history.item_ids, -1)
        if not self.spec.fusion.has_queries:
            return of_history
        none = np.full(queries if self.spec.fusion.query_is_user else 0, -1)
        return np.concatenate([of_history, none, view.targets.item_ids])

    def _drop_ids(self, item_of_slot: Ints, rng: np.random.Generator) -> Ints:
        """In training, some ids become 0: the unknown row learns what to say about cold items."""
        if not (self.training and self.spec.id_dropout):
            return item_of_slot
        dropped = rng.random(item_of_slot.size) < self.spec.id_dropout
        return np.where(dropped & (item_of_slot > 0), 0, item_of_slot)

    def _numeric(self, view: _View, item_slots: int) -> torch.Tensor | None:
        """[S, F], zero but at queries; None without numeric features."""
        if not self.spec.numeric_features:
            return None
        fusion = self.spec.fusion
        at_queries = view.numeric if fusion.has_queries else view.numeric[:0]
        after = item_slots + (len(view.targets) if fusion.query_is_user else 0)
        return torch.from_numpy(np.pad(at_queries, ((len(view.history), after), (0, 0))))


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
"""Of a view, the fields that are the batch's as they are."""
_NO_EVENTS = Piece(**Events.at([]).columns, user_id=0, first_target=0)


def _interleaved(view: _View) -> _View:
    """The view with two tokens for each event of the history, of its item and of its action, at the event's second.

    A query sees both tokens of each event that it sees; the next item is generated at the action's token.
    """
    return replace(
        view,
        history=view.history[np.repeat(np.arange(len(view.history)), 2)],
        next_times=np.stack([view.history.timestamps, view.next_times], axis=1).reshape(-1),
        query_visible=2 * view.query_visible,
        next_rows=2 * view.next_rows + 1,
        full_history_items=np.repeat(view.full_history_items, 2),
    )


def _join(views: Sequence[_View], seq_offsets: Ints, query_offsets: Ints) -> _View:
    """The views one after the other; rows and queries count through all of them."""
    counted_from = {"target_query": query_offsets, "next_rows": seq_offsets}
    joined: dict[str, Any] = {}
    for name in (field.name for field in fields(_View)):
        parts = [getattr(view, name) for view in views]
        if name in counted_from:
            parts = [part + first for part, first in zip(parts, counted_from[name], strict=False)]
        joined[name] = Events.concat(parts) if isinstance(parts[0], Events) else np.concatenate(parts)
    return _View(**joined)


def _unique_items(view: _View, negatives: Ints) -> dict[str, Ints]:
    """Every item of the batch once, and where the items of each kind stand among them."""
    kinds = {
        "history_index": view.history.item_ids,
        "target_index": view.targets.item_ids,
        "next_index": view.next_items,
        "negative_index": negatives,
    }
    unique, index = np.unique(np.concatenate(list(kinds.values())), return_inverse=True)
    ends = np.cumsum([items.size for items in kinds.values()])
    return {"unique_items": unique, **dict(zip(kinds, np.split(index, ends[:-1]), strict=True))}


def gather_bags(values: Ints, offsets: Ints, ids: Ints) -> Bags:
    """Bags of `ids` [S] from jagged `values`; a negative id gives an empty bag."""
    known = np.maximum(ids, 0)
    lengths = np.where(ids >= 0, offsets[known + 1] - offsets[known], 0)
    return values[concat_ranges(offsets[known], lengths)], lengths


def _items_of_train(dataset: Dataset) -> Ints:
    """Items with a training event."""
    return np.flatnonzero(dataset.training_item_counts())


def _present(where: NDArray[np.bool_], total: int) -> Ints:
    """Bag lengths [total]: one value in each slot where `where` is true, none in the others and after them."""
    return np.pad(where.astype(np.int64), (0, total - where.size))


def _cat(parts: Sequence[Ints]) -> Ints:
    """Concatenated, int64 also when there is no part."""
    return np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int64, copy=False)
