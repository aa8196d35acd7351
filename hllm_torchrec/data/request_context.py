"""Context of requests (device, position, hour, price) as inputs of a model: ids and numbers of each query.

A value that no training exposure has is replaced by the unknown value, because its embedding is untrained, and is
counted. The values of the training exposures are part of a run (`state`), since the dataset may grow. Context is an
input of queries, never of the history.

Legend: Q queries, C numeric columns.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from hllm_torchrec.common.arrays import Floats, Ints
from hllm_torchrec.common.errors import did_you_mean
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.event_schema import CONTEXT, EventSchema
from hllm_torchrec.data.events import Events


class RequestContext:
    """Reads the declared context `names` of events.

    unseen: name -> number of values replaced by the unknown value because they do not occur in training; counted only
    outside of training.
    """

    def __init__(self, schema: EventSchema, names: Sequence[str], seen: Mapping[str, Iterable[int]]) -> None:
        self.names = tuple(names)
        self._columns = {
            one.name: column for one in schema.context for column in schema.extra if one.column == column.name
        }
        self.categorical = tuple(name for name in names if name in schema.categorical)
        self.numeric = tuple(name for name in names if name in schema.numeric)
        """Names of the categorical and of the numeric context."""
        self._seen = {name: np.array(sorted(seen.get(name, ())), np.int64) for name in self.categorical}
        self.unseen: Counter[str] = Counter()

    def state(self) -> dict[str, list[int]]:
        """Name -> ids that occur in training, as JSON values for checkpoints."""
        return {name: ids.tolist() for name, ids in self._seen.items()}

    def restore(self, state: Mapping[str, Sequence[int]]) -> None:
        """Replace the ids of the dataset's training exposures by the ids that a run was trained with."""
        self._seen |= {name: np.array(state[name], np.int64) for name in self.categorical if name in state}

    def ids(self, events: Events, name: str, *, count: bool) -> Ints:
        """[Q] ids of a categorical context, 0 if unknown or not in training; count: count the latter in `unseen`."""
        ids = events.column(self._columns[name]).astype(np.int64, copy=False)
        known = np.isin(ids, self._seen[name])
        if count:
            self.unseen[name] += int((~known & (ids > 0)).sum())
        return np.where(known, ids, 0)

    def numbers(self, events: Events) -> Floats:
        """[Q, C] numeric context; NaN: unknown."""
        columns = [events.column(self._columns[name]).astype(np.float32, copy=False) for name in self.numeric]
        return np.stack(columns, axis=1) if columns else np.empty((len(events), 0), np.float32)

    def keys(self, events: Events, names: Sequence[str]) -> list[Ints]:
        """int64 columns [n] of the context `names`; two events have equal keys exactly if they have equal context."""
        columns = [events.column(self._columns[name]) for name in names]
        # Use the bits of floats, so that unknown numbers (NaN) are equal too.
        bits = [column.view(np.int32) if column.dtype == np.float32 else column for column in map(np.array, columns)]
        return [column.astype(np.int64) for column in bits]


def fit_context(dataset: Dataset, names: Sequence[str], since: int = 0) -> tuple[RequestContext, NDArray[np.float64]]:
    """(context `names` with the ids of training exposures from second `since` on, [C, 2] mean and standard deviation).

    names: without `context_problems`; the deviation of a constant is 1.
    """
    schema = dataset.schema
    context = RequestContext(schema, names, {})
    columns = [f"{CONTEXT}{name}" for name in context.names]
    seen: dict[str, set[int]] = {name: set() for name in context.categorical}
    sums = np.zeros((3, len(context.numeric)))
    for rows in dataset.recent("train", since, ["labels", "timestamps", *columns]):
        events = rows[~np.isnan(rows.labels)]
        for name in context.categorical:
            seen[name] |= set(np.unique(events.extra[f"{CONTEXT}{name}"]).tolist()) - {0}
        numbers = context.numbers(events).astype(np.float64)
        known = ~np.isnan(numbers)
        numbers = np.where(known, numbers, 0)
        sums += [known.sum(0), numbers.sum(0), (numbers**2).sum(0)]
    count = np.maximum(sums[0], 1)
    mean = sums[1] / count
    deviation = np.sqrt(np.maximum(sums[2] / count - mean**2, 0))
    return RequestContext(schema, names, seen), np.stack([mean, np.where(deviation > 0, deviation, 1)], axis=1)


def context_problems(field: str, names: Sequence[str], schema: EventSchema) -> list[str]:
    """One message for each name that is not a context of the dataset, and for each name that is given twice."""
    known = [one.name for one in schema.context]
    twice = [
        f"{field}: {name!r} is named twice; once is enough" for name, number in Counter(names).items() if number > 1
    ]
    return twice + [
        f"{field}: {name!r}: no context of the dataset{did_you_mean(name, known)}; it has {', '.join(known) or 'none'}"
        for name in names
        if name not in known
    ]


def bias_problems(field: str, names: Sequence[str], schema: EventSchema) -> list[str]:
    """`context_problems` of the context of a position bias, and one message for each that is numeric."""
    return context_problems(field, names, schema) + [
        f"{field}: {name!r} is numeric; only categorical context has a bias of its own: leave it out"
        for name in names
        if name in schema.numeric
    ]
