"""Users' sequences as flat arrays with the exposures that a baseline scores.

Legend: R rows (users), T events of all rows, X exposures (labelled events that belong to the split, that is, from the
row's `target_start` on), N items.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from hllm_torchrec.common.arrays import Doubles, Ints
from hllm_torchrec.common.progress import progress
from hllm_torchrec.config.eval_protocols import delay_problems
from hllm_torchrec.data.dataset import Dataset, RowGroup
from hllm_torchrec.data.event_schema import EventSchema
from hllm_torchrec.data.events import Sequences
from hllm_torchrec.data.predictions import PredictionColumns, join_columns
from hllm_torchrec.data.task_targets import kept_shares, targets_of
from hllm_torchrec.data.visibility import visible_at_each_event
from hllm_torchrec.distributed import coordination
from hllm_torchrec.distributed.collectives import global_sum

ALL = slice(None)


@dataclass(frozen=True)
class Histories(Sequences):
    """Rows of a part's sequences, and the rule by which an exposure sees only events from an earlier "second" or
    "position".

    feedback_delay: seconds from an event until it may be seen; schema: schema of the dataset's events.
    """

    visibility: str = field(kw_only=True)
    feedback_delay: int = field(kw_only=True, default=0)
    schema: EventSchema = field(kw_only=True, default_factory=EventSchema)

    @cached_property
    def row_of_event(self) -> Ints:
        """[T] row of each event."""
        return np.repeat(np.arange(self.user_ids.size), np.diff(self.offsets))

    @cached_property
    def position(self) -> Ints:
        """[T] index of each event in its user's sequence."""
        return np.arange(self.item_ids.size) - self.offsets[self.row_of_event]

    @cached_property
    def events_of_earlier_seconds(self) -> Ints:
        """[T] number of events of the same user that are more than `feedback_delay` seconds earlier."""
        return visible_at_each_event(self.timestamps, self.offsets, self.feedback_delay)

    @cached_property
    def seen(self) -> Ints:
        """[T] number of events of the same user, from the first on, that an exposure at each event may see."""
        return self.events_of_earlier_seconds if self.visibility == "second" else self.position

    @cached_property
    def exposures(self) -> Ints:
        """[X] indices of the events to score: the labelled events of the split's part."""
        in_part = self.position >= self.target_start[self.row_of_event]
        return np.flatnonzero(in_part & ~np.isnan(self.labels))

    def sum_of_seen(self, values: NDArray) -> NDArray:
        """[X] sum of `values` [T] over the events that each exposure may see."""
        # Differences of one running sum over all rows, which avoids a loop over users.
        total = np.concatenate([[0], np.cumsum(values)])
        start = self.offsets[self.row_of_event[self.exposures]]
        return total[start + self.seen[self.exposures]] - total[start]

    def prediction_columns(
        self, scores: NDArray, probabilities: NDArray, cold: NDArray[np.bool_], rows: Ints | slice = ALL
    ) -> PredictionColumns:
        """Columns of the exposures' predictions, in the predictions format (`hllm_torchrec.data.predictions`).

        Args:
            scores, probabilities: one value for each exposure of `rows`.
            cold: bool [N], True for items without a training event.
            rows: indices of exposures; by default all of them.
        """
        events = self.exposures[rows]
        items = self.item_ids[events]
        schema, rates = self.schema, kept_shares(self, events)
        weights = targets_of(self[events], (), schema, rates, training=False)["weights"]
        return {
            "user_id": self.user_ids[self.row_of_event[events]],
            "position": self.position[events].astype(np.int32),
            "item_id": items,
            "timestamp": self.timestamps[events],
            "label": self.labels[events].astype(np.float32),
            "score": scores.astype(np.float32),
            "probability": probabilities.astype(np.float32),
            "history_length": self.events_of_earlier_seconds[events].astype(np.int32),
            "item_is_cold": cold[items],
            **({"weight": weights} if schema.weighted or schema.sampled else {}),
        }


def rank_row_groups(dataset: Dataset, split: str) -> list[RowGroup]:
    """This rank's share of a split's row groups.

    Raises:
        ValueError: the split is empty.
    """
    groups = dataset.row_groups(split)
    if not groups:
        raise ValueError(f"{dataset.root}: split {split!r} is empty: prepare the dataset with another split rule")
    return groups[coordination.rank() :: coordination.world_size()]


def read_histories(dataset: Dataset, groups: Sequence[RowGroup], feedback_delay: int = 0) -> Histories:
    """The rows of the row groups as `Histories` (no groups: no rows).

    Raises:
        ValueError: a feedback delay in a dataset whose visibility rule or timestamps do not support one.
    """
    for problem in delay_problems(feedback_delay, dataset.manifest):
        raise ValueError(problem)
    rows = dataset.sequences(groups)
    columns = {f.name: getattr(rows, f.name) for f in fields(rows)}
    return Histories(**columns, visibility=dataset.visibility, feedback_delay=feedback_delay, schema=dataset.schema)


def score_by_group(
    dataset: Dataset,
    split: str,
    cold: NDArray[np.bool_],
    score: Callable[[Histories], tuple[NDArray, NDArray]],
    feedback_delay: int = 0,
) -> PredictionColumns:
    """This rank's predictions of a split, one row group in memory at a time.

    Args:
        cold: bool [N], True for items without a training event.
        score: maps histories (possibly without rows) to scores [X] and probabilities [X].

    Raises:
        ValueError: the split is empty.
    """
    groups = rank_row_groups(dataset, split)
    parts = []
    with progress(len(groups), f"score {split}", coordination.rank() == 0) as bar:
        # A rank without row groups scores zero rows once, so that its predictions have all columns.
        for share in [[group] for group in groups] or [[]]:
            histories = read_histories(dataset, share, feedback_delay)
            parts.append(histories.prediction_columns(*score(histories), cold))
            bar.update(len(share))
    return join_columns(parts)


@dataclass(frozen=True)
class ItemLabels:
    """Number and sum of the training labels of each item; float64 [N]."""

    count: Doubles
    total: Doubles

    @property
    def mean(self) -> float:
        """Mean label of the training part; 0.5 without any label."""
        return float(self.total.sum() / self.count.sum()) if self.count.sum() else 0.5

    def bias(self, shrinkage: float) -> Doubles:
        """[N] each item's mean label minus the overall mean, shrunk by `shrinkage` pseudo-labels of that mean.

        bias_i = (total_i - count_i * mean) / (count_i + shrinkage); 0 for items without a training label.
        """
        surplus = self.total - self.count * self.mean
        return np.divide(surplus, self.count + shrinkage, out=np.zeros_like(surplus), where=self.count > 0)


def training_labels(dataset: Dataset) -> ItemLabels:
    """Counts and sums of the training labels of every item, over all ranks. Collective."""
    groups = rank_row_groups(dataset, "train")
    sums = np.zeros((2, dataset.num_items))
    with progress(len(groups), "item means", coordination.rank() == 0) as bar:
        for group in groups:
            events = dataset.sequences([group], ["item_ids", "labels"])
            known = events[~np.isnan(events.labels)]
            sums[0] += np.bincount(known.item_ids, minlength=dataset.num_items)
            sums[1] += np.bincount(known.item_ids, known.labels, minlength=dataset.num_items)
            bar.update(1)
    count, total = global_sum(torch.from_numpy(sums)).numpy()
    return ItemLabels(count, total)
