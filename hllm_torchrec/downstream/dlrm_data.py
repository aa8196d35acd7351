"""Batches of the DLRM baseline: one row per exposure, with the history as two bags of item ids.

Legend: B rows of a batch, X exposures and T events of a window, F numeric features, C columns of numeric context, K
tasks, P contexts of the position bias.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hllm_torchrec.common.arrays import Floats, Ints
from hllm_torchrec.common.errors import ConfigError, did_you_mean
from hllm_torchrec.data.collate import Bags, gather_bags
from hllm_torchrec.data.dataset import Dataset, RowGroup
from hllm_torchrec.data.event_schema import CONTEXT
from hllm_torchrec.data.events import Events
from hllm_torchrec.data.histories import Histories, rank_row_groups, read_histories
from hllm_torchrec.data.jagged_arrays import concat_ranges
from hllm_torchrec.data.numeric_features import NUMERIC_FEATURES, numeric_columns
from hllm_torchrec.data.request_context import bias_problems, context_problems, fit_context
from hllm_torchrec.data.task_targets import is_kept, kept_shares, targets_of
from hllm_torchrec.distributed import coordination
from hllm_torchrec.downstream.dlrm_config import DLRMConfig
from hllm_torchrec.models.tasks import fit_tasks, resolve_tasks, task_problems

WINDOW_USERS = 65_536
"""Maximum number of users in a window, which is in memory and shuffled as one."""
SECONDS_PER_HOUR, HOURS, DAYS = 3600, 24, 7
TASKS = "dlrm.tasks"
"""Name of the setting of the tasks, for messages."""
EPOCH_WEEKDAY = 3
"""Day of the week of 1970-01-01, a Thursday; Monday is 0."""


@dataclass
class DLRMBatch:
    """A batch in the format of TorchRec's DLRM.

    dense_features: [B, F + C] float32 (`VectorData` appends stored vectors); sparse_features: one bag per key and row;
    labels: [B] float32 in [0, 1]; task_labels, task_weights: [B, K] of all tasks; logit_offset: [B] or None; bias_ids:
    [B, P] or None; as in `data.batch.HybridBatch`.
    """

    dense_features: Tensor
    sparse_features: KeyedJaggedTensor
    labels: Tensor
    task_labels: Tensor
    task_weights: Tensor
    logit_offset: Tensor | None = None
    bias_ids: Tensor | None = None

    def to(self, device: torch.device) -> "DLRMBatch":
        """A copy on `device`."""
        moved = {
            name: value.to(device) for field in fields(self) if (value := getattr(self, name := field.name)) is not None
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class ItemRanges:
    """A range of the list `items` for each exposure, from start [X] to end [X] (exclusive)."""

    items: Ints
    start: Ints
    end: Ints

    def bags(self, rows: Ints) -> Bags:
        """(values, lengths) of the exposures `rows`."""
        lengths = self.end[rows] - self.start[rows]
        return self.items[concat_ranges(self.start[rows], lengths)], lengths


@dataclass(frozen=True)
class Window:
    """Histories of users with inputs of their exposures: bags of liked and disliked items, numeric features [X, F]."""

    histories: Histories
    liked: ItemRanges
    disliked: ItemRanges
    numeric: NDArray[np.float32]

    @property
    def exposures(self) -> int:
        """Number of exposures X."""
        return self.histories.exposures.size


class DLRMData:
    """Reads this rank's part of a dataset as windows of exposures and builds batches of them.

    Users and items without a training event are replaced by the unknown id 0, because their rows would not be trained.

    Raises:
        ConfigError: a feature is unknown.
    """

    def __init__(self, dataset: Dataset, config: DLRMConfig) -> None:
        problems = check_features(config, dataset)
        if problems:
            raise ConfigError(problems)
        self.dataset, self.config = dataset, config
        self.tasks = fit_tasks(resolve_tasks(config.task_configs, dataset.schema, TASKS), dataset, setting=TASKS)
        self.context, self._scales = fit_context(dataset, config.context)
        self._bias = fit_context(dataset, config.position_bias)[0] if config.position_bias else None
        self.time = config.time and bool(dataset.manifest["has_timestamps"])
        self.item_is_known = dataset.training_item_counts() > 0
        self._user_is_known = np.zeros(dataset.num_users, dtype=bool)
        for group in dataset.row_groups("train"):
            self._user_is_known[dataset.sequences([group], ["user_id", "actions"]).user_ids] = True
        self._user_bags = {name: dataset.feature_ids("user", name) for name in config.user_features}
        self._window_cache: dict[str, Window] = {}

    @property
    def dense_width(self) -> int:
        """Number of dense features, not counting stored vectors: numeric features and numeric context."""
        return len(self.config.numeric_features) + len(self.context.numeric)

    @property
    def bias_rows(self) -> dict[str, int]:
        """Number of ids of each context of the position bias."""
        return {name: self.dataset.schema.sizes[name] for name in self.config.position_bias}

    @property
    def widths(self) -> list[int]:
        """Widths of the stored vectors after the other dense features of batches; none in this class."""
        return []

    def tables(self) -> dict[str, int]:
        """Sparse feature -> number of table rows; the ids of `item`, `liked` and `disliked` are items."""
        rows = dict.fromkeys(("item", "liked", "disliked"), self.dataset.num_items)
        if self.config.user_id:
            rows["user"] = self.dataset.num_users
        rows |= {name: self.dataset.feature_size("user", name) for name in self.config.user_features}
        rows |= {CONTEXT + name: self.dataset.schema.sizes[name] for name in self.context.categorical}
        return rows | ({"hour": HOURS, "weekday": DAYS} if self.time else {})

    def windows(self, split: str, rng: np.random.Generator | None = None) -> Iterator[Window]:
        """Yield this rank's exposures of a split, in at least one window. rng: shuffles the order of row groups.

        Raises:
            ValueError: the split is empty.
        """
        groups = rank_row_groups(self.dataset, split)
        # Collect row groups into windows of at most WINDOW_USERS users (more if a single group has more).
        cuts: list[list[RowGroup]] = [[]]
        for number in range(len(groups)) if rng is None else rng.permutation(len(groups)):
            if cuts[-1] and sum(group.rows for group in (*cuts[-1], groups[number])) > WINDOW_USERS:
                cuts.append([])
            cuts[-1].append(groups[number])
        for cut in cuts:
            if len(cuts) > 1:
                yield self._read(cut)
            else:  # a single window is cached across epochs
                self._window_cache[split] = self._window_cache.get(split) or self._read(groups)
                yield self._window_cache[split]

    def training_batches(self, epoch: int) -> Iterator[DLRMBatch]:
        """Yield this rank's batches of an epoch, shuffled by (seed, epoch, rank).

        The number of batches may differ between ranks.
        """
        size = max(1, self.config.batch // coordination.world_size())
        rng = np.random.default_rng((self.config.seed, epoch, coordination.rank()))
        for window in self.windows("train", rng):
            rows = self._drawn(window, epoch)
            order = rows[rng.permutation(rows.size)]
            for at in range(0, order.size, size):
                yield self.batch(window, order[at : at + size], rng)

    def _drawn(self, window: Window, epoch: int) -> Ints:
        """Indices of the exposures that an epoch trains on; same draws as the main model's at this seed and rate."""
        histories, rate = window.histories, self.config.negative_rate
        if rate == 1.0:
            return np.arange(window.exposures)
        events = histories.exposures
        users, positions = histories.user_ids[histories.row_of_event[events]], histories.position[events]
        seeds = (self.config.seed, epoch - 1)  # the main model counts epochs from 0
        return np.flatnonzero(is_kept(histories.labels[events], users, positions, rate, seeds))

    def empty_window(self) -> Window:
        """Return a window without users, for a rank that has finished before the others."""
        return self._read([])

    def batch(self, window: Window, rows: Ints, rng: np.random.Generator | None = None) -> DLRMBatch:
        """Build a batch of the exposures `rows` [B] of a window. rng: given in training, for ID dropout."""
        histories, config = window.histories, self.config
        events = histories.exposures[rows]
        users, seconds = histories.user_ids[histories.row_of_event[events]], histories.timestamps[events]
        items = _with_unknown(histories.item_ids[events], self.item_is_known, config.item_dropout, rng)
        bags = {"item": _one_each(items), "liked": window.liked.bags(rows)}
        bags["disliked"] = window.disliked.bags(rows)
        if config.user_id:
            bags["user"] = _one_each(_with_unknown(users, self._user_is_known, config.user_dropout, rng))
        for name, (values, offsets) in self._user_bags.items():
            bags[name] = gather_bags(values, offsets, users)
        targets = histories[events]
        for name in self.context.categorical:
            bags[CONTEXT + name] = _one_each(self.context.ids(targets, name, count=False))
        if self.time:
            hours = seconds // SECONDS_PER_HOUR
            bags["hour"] = _one_each(hours % HOURS)
            bags["weekday"] = _one_each((hours // HOURS + EPOCH_WEEKDAY) % DAYS)
        rates = kept_shares(histories, events, 1.0 if rng is None else config.negative_rate)
        names, training = [task.name for task in self.tasks], rng is not None
        fields = targets_of(targets, names, self.dataset.schema, rates, training)
        del fields["weights"]  # `task_weights` contain them
        if self._bias is not None:
            ids = [self._bias.ids(targets, name, count=False) for name in config.position_bias]
            fields["bias_ids"] = np.stack(ids, axis=1)
        return DLRMBatch(
            dense_features=torch.from_numpy(np.concatenate([window.numeric[rows], self._numbers(targets)], axis=1)),
            sparse_features=KeyedJaggedTensor(
                keys=list(bags),
                values=torch.from_numpy(np.concatenate([values for values, _ in bags.values()])),
                lengths=torch.from_numpy(np.concatenate([lengths for _, lengths in bags.values()])),
                stride=rows.size,
            ),
            labels=torch.from_numpy(targets.labels),
            **{name: torch.from_numpy(values) for name, values in fields.items()},
        )

    def _numbers(self, targets: Events) -> Floats:
        """[B, C] numeric context, standardized by the mean and deviation in training; 0 where it is unknown."""
        center, scale = self._scales.T
        return np.nan_to_num((self.context.numbers(targets) - center) / scale).astype(np.float32)

    def _read(self, groups: Sequence[RowGroup]) -> Window:
        histories = read_histories(self.dataset, groups, self.config.feedback_delay)
        return Window(
            histories,
            liked=self._stretches(histories, histories.labels >= 0.5),
            disliked=self._stretches(histories, histories.labels < 0.5),
            numeric=_numeric(histories, self.config.numeric_features),
        )

    def _stretches(self, histories: Histories, chosen: NDArray[np.bool_]) -> ItemRanges:
        """For each exposure, the items of the last `max_bag` visible events that are `chosen` (bool [T])."""
        # before[t]: number of chosen events before event t, which is also an index into the list of chosen items.
        before = np.concatenate([[0], np.cumsum(chosen)])
        first = before[histories.offsets[histories.row_of_event[histories.exposures]]]
        end = first + histories.sum_of_seen(chosen)
        items = histories.item_ids[chosen]
        known = np.where(self.item_is_known[items], items, 0)
        return ItemRanges(known, np.maximum(first, end - self.config.max_bag), end)


def check_features(config: DLRMConfig, dataset: Dataset) -> list[str]:
    """One message for each unknown feature, context or task."""
    known = {"user_features": dataset.manifest["user_features"], "numeric_features": NUMERIC_FEATURES}
    return (
        task_problems(config.task_configs, dataset.schema, TASKS)
        + [
            f"dlrm.{kind}: {name!r}: unknown{did_you_mean(name, there)}; there are {', '.join(there) or 'none'}"
            for kind, there in known.items()
            for name in getattr(config, kind)
            if name not in there
        ]
        + context_problems("dlrm.context", config.context, dataset.schema)
        + bias_problems("dlrm.position_bias", config.position_bias, dataset.schema)
    )


def _numeric(histories: Histories, names: Sequence[str]) -> NDArray[np.float32]:
    """Numeric features [X, F], computed from the events that each exposure may see."""
    # Exposures are ascending event indices; bounds[row] is the index of the first exposure of each row.
    bounds = np.searchsorted(histories.exposures, histories.offsets)
    parts = [np.empty((0, len(names)), np.float32)]
    for row in range(histories.user_ids.size):
        first, end = histories.offsets[row : row + 2]
        targets = histories.exposures[bounds[row] : bounds[row + 1]] - first
        labels = histories.labels[first:end]
        parts.append(numeric_columns(names, histories.timestamps[first:end], labels, targets, histories.feedback_delay))
    return np.concatenate(parts)


def _with_unknown(ids: Ints, known: NDArray[np.bool_], dropout: float, rng: np.random.Generator | None) -> Ints:
    """Replace ids where `known` is False and, in training, a share `dropout` of the other ids by 0."""
    kept = known[ids]
    if rng is not None:
        kept = kept & (rng.random(ids.size) >= dropout)
    return np.where(kept, ids, 0)


def _one_each(ids: Ints) -> Bags:
    """Bags with one id per row."""
    return ids, np.ones(ids.size, dtype=np.int64)
