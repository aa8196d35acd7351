"""Turns pieces of users into a `HybridBatch`, in numpy on the loader's background thread."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.numeric import NUMERIC_FEATURES, numeric_columns
from hllm_torchrec.modules.timestamps import TIME_FEATURES, split_timestamps

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Bags = tuple[Ints, Ints]
"""(values, lengths): one bag per slot."""


@dataclass(frozen=True)
class Piece:
    """A stretch of one user's events; exposures are those from `first` on (an index into the stretch).

    offset: index of the stretch's first event in the user's whole sequence; labels: NaN where not an exposure.
    """

    user_id: int
    offset: int
    first: int
    item_ids: Ints
    timestamps: Ints
    labels: Floats
    actions: Ints


@dataclass(frozen=True)
class BatchRecipe:
    """What a batch holds.

    visibility: an exposure sees earlier "second"s (ranking) or "position"s (leave-one-out retrieval);
    negatives: how many items are drawn per step (0: none, and no generative targets);
    id_dropout: probability that an ID is read as unknown, in training.
    """

    fusion: Literal["late", "early", "none"]
    history: Literal["all", "positive"] = "all"
    visibility: Literal["second", "position"] = "second"
    negatives: int = 0
    positive_targets_only: bool = True
    item_id: bool = True
    action: bool = True
    time_depth: int = 6
    item_features: tuple[str, ...] = ()
    user_features: tuple[str, ...] = ()
    numeric_features: tuple[str, ...] = ()
    id_dropout: float = 0.0

    def tables(self, dataset: Dataset) -> dict[str, int]:
        """Rows of every summed table (time components excluded), in the order of the batch's keys."""
        sizes = dataset.manifest
        tables = {"item_id": dataset.num_items} if self.item_id else {}
        if self.action:
            tables["action"] = sizes["actions"]["number"]
        tables |= {name: sizes["item_features"][name]["size"] for name in self.item_features}
        return tables | {name: sizes["user_features"][name]["size"] for name in self.user_features}


@dataclass(frozen=True)
class _PieceView:
    """One piece after the history filter: what it contributes to each part of the batch."""

    items: Ints
    times: Ints
    actions: Ints
    targets: Ints  # indices of exposures in the stretch
    query_of_target: Ints
    query_times: Ints
    query_visible: Ints
    next_rows: Ints
    next_items: Ints
    numeric: Floats


class Collator:
    """Builds batches by `recipe` from pieces of `dataset`."""

    def __init__(self, dataset: Dataset, recipe: BatchRecipe, seed: int = 0, training: bool = False) -> None:
        self.dataset, self.recipe, self.seed, self.training = dataset, recipe, seed, training
        self._bags = {name: dataset.feature_ids("item", name) for name in recipe.item_features}
        self._bags |= {name: dataset.feature_ids("user", name) for name in recipe.user_features}

    def negatives(self, epoch: int, step: int) -> Ints:
        """[K] distinct items drawn uniformly; a function of (seed, epoch, step), so the same on every rank."""
        wanted, catalogue = self.recipe.negatives, self.dataset.num_items - 1
        rng = np.random.default_rng((self.seed, epoch, step))
        if wanted >= catalogue:
            return np.arange(1, catalogue + 1)
        return rng.choice(catalogue, size=wanted, replace=False).astype(np.int64) + 1

    def __call__(self, pieces: Sequence[Piece], epoch: int, step: int, rank: int = 0) -> HybridBatch:
        """The batch of this rank's `pieces` (may be empty) at (epoch, step)."""
        views = [self._view(piece) for piece in pieces]
        items, times, actions = (_cat([getattr(v, k) for v in views]) for k in ("items", "times", "actions"))
        targets = _cat([piece.item_ids[view.targets] for piece, view in zip(pieces, views, strict=True)])
        seq_offsets = _offsets([v.items.size for v in views])
        query_offsets = _offsets([v.query_times.size for v in views])
        target_query = _cat([v.query_of_target + start for v, start in zip(views, query_offsets, strict=False)])
        next_rows = _cat([v.next_rows + start for v, start in zip(views, seq_offsets, strict=False)])
        next_items = _cat([v.next_items for v in views])
        negatives = self.negatives(epoch, step) if self.recipe.negatives else _cat([])
        unique, index = np.unique(np.concatenate([items, targets, next_items, negatives]), return_inverse=True)
        history_index, target_index, next_index, negative_index = np.split(
            index, np.cumsum([items.size, targets.size, next_items.size])
        )
        users = np.array([piece.user_id for piece in pieces], dtype=np.int64)
        query_times = _cat([v.query_times for v in views])
        query_users = np.repeat(users, np.diff(query_offsets))
        rng = np.random.default_rng((self.seed, epoch, step, rank + 1))
        labels = np.concatenate([np.empty(0, np.float32), *(p.labels[v.targets] for p, v in zip(pieces, views, strict=True))])
        early = self.recipe.fusion == "early"
        return HybridBatch(
            user_ids=torch.from_numpy(users),
            seq_offsets=torch.from_numpy(seq_offsets),
            item_ids=torch.from_numpy(items),
            timestamps=torch.from_numpy(times),
            query_offsets=torch.from_numpy(query_offsets),
            query_times=torch.from_numpy(query_times),
            query_visible=torch.from_numpy(_cat([v.query_visible for v in views])),
            query_target=torch.arange(targets.size) if early else torch.empty(0, dtype=torch.int64),
            target_query=torch.from_numpy(target_query),
            target_items=torch.from_numpy(targets),
            labels=torch.from_numpy(labels),
            weights=torch.ones(labels.size),
            positions=torch.from_numpy(_cat([v.targets + p.offset for p, v in zip(pieces, views, strict=True)])),
            history_lengths=torch.from_numpy(
                _cat([np.searchsorted(p.timestamps, p.timestamps[v.targets]) + p.offset for p, v in zip(pieces, views, strict=True)])
            ),
            next_rows=torch.from_numpy(next_rows),
            next_items=torch.from_numpy(next_items),
            negative_items=torch.from_numpy(negatives),
            unique_items=torch.from_numpy(unique),
            history_index=torch.from_numpy(history_index),
            target_index=torch.from_numpy(target_index),
            next_index=torch.from_numpy(next_index),
            negative_index=torch.from_numpy(negative_index),
            features=self._features(items, times, actions, targets, query_times, query_users, rng),
            numeric=self._numeric(items.size, views, targets.size),
        )

    def _view(self, piece: Piece) -> _PieceView:
        """Filter the history, find what each exposure sees and what each position generates."""
        kept = np.flatnonzero(piece.labels == 1) if self.recipe.history == "positive" else np.arange(piece.item_ids.size)
        targets = piece.first + np.flatnonzero(~np.isnan(piece.labels[piece.first :]))
        if self.recipe.visibility == "second":
            visible = np.searchsorted(piece.timestamps[kept], piece.timestamps[targets], side="left")
        else:
            visible = np.searchsorted(kept, targets, side="left")
        numeric = numeric_columns(self.recipe.numeric_features, piece.timestamps, piece.labels, targets)
        next_rows, next_items = self._generative(piece, kept)
        end = max(int(visible.max(initial=0)), int(next_rows.max(initial=-1)) + 1)
        queries, query_of_target = self._queries(piece, targets, visible)
        seen = kept[:end]
        return _PieceView(
            items=piece.item_ids[seen],
            times=piece.timestamps[seen],
            actions=piece.actions[seen],
            targets=targets,
            query_of_target=query_of_target,
            query_times=piece.timestamps[targets[queries]],
            query_visible=visible[queries],
            next_rows=next_rows,
            next_items=next_items,
            numeric=numeric[queries],
        )

    def _queries(self, piece: Piece, targets: Ints, visible: Ints) -> tuple[Ints, Ints]:
        """(exposure that stands for each query, query of each exposure).

        Early: one query per exposure. Late: exposures that see the same at the same second share one.
        """
        if self.recipe.fusion != "late":
            every = np.arange(targets.size)
            return every, every
        moments = np.stack([visible, piece.timestamps[targets]])
        _, first, inverse = np.unique(moments, axis=1, return_index=True, return_inverse=True)
        return first, inverse.reshape(-1)

    def _generative(self, piece: Piece, kept: Ints) -> tuple[Ints, Ints]:
        """Rows of the kept history whose next kept item is a generative target of this piece."""
        if not self.recipe.negatives or kept.size < 2 or not self.training:
            return _cat([]), _cat([])
        following = kept[1:]
        wanted = following >= piece.first
        if self.recipe.positive_targets_only:
            wanted &= (piece.labels[following] > 0) | np.isnan(piece.labels[following])
        return np.flatnonzero(wanted), piece.item_ids[following[wanted]]

    def _features(
        self, items: Ints, times: Ints, actions: Ints, targets: Ints, query_times: Ints, query_users: Ints, rng: np.random.Generator
    ) -> KeyedJaggedTensor:
        """One bag per key and slot; an absent value is an empty bag."""
        recipe = self.recipe
        queries = query_times.size if recipe.fusion != "none" else 0
        # Whose item each slot bears: late queries bear none (-1) and the targets follow as slots of their own.
        if recipe.fusion == "early":
            bearer = np.concatenate([items, targets])
        elif recipe.fusion == "late":
            bearer = np.concatenate([items, np.full(queries, -1), targets])
        else:
            bearer = items
        user_of_slot = np.full(bearer.size, -1)
        user_of_slot[items.size : items.size + queries] = query_users[:queries]
        bags: dict[str, Bags] = {}
        if recipe.item_id:
            ids = bearer.copy()
            if self.training and recipe.id_dropout:
                ids[(rng.random(ids.size) < recipe.id_dropout) & (ids > 0)] = 0
            bags["item_id"] = ids[ids >= 0], (ids >= 0).astype(np.int64)
        if recipe.action:
            unknown = np.zeros(queries, dtype=np.int64)  # the candidate's own action is what we predict
            bags["action"] = np.concatenate([actions, unknown]), _present(items.size + queries, bearer.size)
        for name in recipe.item_features:
            bags[name] = gather_bags(*self._bags[name], bearer)
        for name in recipe.user_features:
            bags[name] = gather_bags(*self._bags[name], user_of_slot)
        if recipe.time_depth:
            stamps = np.concatenate([times, query_times[:queries]])
            parts = split_timestamps(torch.from_numpy(stamps), recipe.time_depth).numpy()
            for column, name in enumerate(TIME_FEATURES[: recipe.time_depth]):
                bags[name] = parts[:, column], _present(stamps.size, bearer.size)
        return KeyedJaggedTensor(
            keys=list(bags),
            values=torch.from_numpy(_cat([values for values, _ in bags.values()])),
            lengths=torch.from_numpy(_cat([lengths for _, lengths in bags.values()])),
            stride=bearer.size,
        )

    def _numeric(self, history: int, views: Sequence[_PieceView], targets: int) -> torch.Tensor | None:
        if not self.recipe.numeric_features:
            return None
        width = len(self.recipe.numeric_features)
        before = np.zeros((history, width), dtype=np.float32)
        after = np.zeros((targets if self.recipe.fusion == "late" else 0, width), dtype=np.float32)
        queries = [view.numeric for view in views] if self.recipe.fusion != "none" else []
        return torch.from_numpy(np.concatenate([before, *queries, after]))


def gather_bags(values: Ints, offsets: Ints, ids: Ints) -> Bags:
    """Bags of `ids` [S] from jagged `values`; a negative id gives an empty bag."""
    known = np.maximum(ids, 0)
    lengths = np.where(ids >= 0, offsets[known + 1] - offsets[known], 0)
    starts = np.repeat(offsets[known] - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths)
    return values[starts + np.arange(lengths.sum())], lengths


def check_recipe(recipe: BatchRecipe, dataset: Dataset) -> list[str]:
    """Problems of a recipe with this dataset, one line each: unknown features."""
    problems = []
    for kind, names in (("item", recipe.item_features), ("user", recipe.user_features)):
        known = dataset.manifest[f"{kind}_features"]
        problems += [f"data.{kind}_features: {n!r}: not in the dataset; it has {sorted(known)}" for n in names if n not in known]
    problems += [
        f"data.numeric_features: {n!r}: unknown; there are {sorted(NUMERIC_FEATURES)}"
        for n in recipe.numeric_features
        if n not in NUMERIC_FEATURES
    ]
    return problems


def _present(first: int, total: int) -> Ints:
    """Bag lengths: one value in each of the first `first` slots, none after."""
    return (np.arange(total) < first).astype(np.int64)


def _cat(parts: Sequence[Ints]) -> Ints:
    return np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int64, copy=False)


def _offsets(lengths: Sequence[int]) -> Ints:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
