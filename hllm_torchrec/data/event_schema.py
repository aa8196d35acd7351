"""`EventSchema`: columns of events in addition to item, time, first label and action, declared in the manifest.

The table mapping declares labels of several kinds, a weight, a sampling rate and request context; the manifest stores
the declaration, and all code from ingest to scoring takes the columns from `EventSchema`, so no code contains a column
name of a source. A dataset without a declaration has one binary label.

An exposure is an event whose first label is known. The first label is the column `labels` of `Events`; all other
declared columns are in `Events.extra`:

    label_<name>      float32: 0 or 1, a number, or the index of an ordinal value; NaN where it is not defined
    weight            float32, at least 0
    sampling_rate     float32 in (0, 1]: kept share of the exposures with first label 0 where the row comes from
    context_<name>    int32 id of a categorical value (0: unknown), or float32 number (NaN: unknown)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hllm_torchrec.common.errors import did_you_mean
from hllm_torchrec.data.events import EVENT_COLUMNS, EventColumn

LABEL_KINDS = ("binary", "regression", "ordinal")
CONTEXT_KINDS = ("categorical", "numeric")
TRANSFORMS = ("log1p",)
WEIGHT, SAMPLING_RATE = "weight", "sampling_rate"
WHOLE_FLOAT = r"^(-?\d+)\.0+$"
"""Regular expression of a whole number that was written as a float: categorical values are read without the zeros."""
LABEL, CONTEXT = "label_", "context_"
"""Prefixes of the columns of labels and of context."""


@dataclass(frozen=True)
class LabelColumn:
    """A label: its kind and where it is defined.

    transform: for regression, "log1p" (the loss compares transformed values) or None; values: for ordinal, all values
    in order; given: name of another label; this label is defined only where that label is 1 (a like, given a click).
    """

    name: str
    kind: Literal["binary", "regression", "ordinal"] = "binary"
    transform: Literal["log1p"] | None = None
    values: tuple[float | str, ...] = ()
    given: str | None = None

    @property
    def column(self) -> str:
        """Name of the label's column in `Events.extra`; not used for the first label."""
        return f"{LABEL}{self.name}"

    def to_json(self) -> dict[str, Any]:
        """The label's entry in the manifest."""
        optional = {"kind": self.kind, "transform": self.transform, "values": list(self.values), "given": self.given}
        return {"name": self.name} | {key: value for key, value in optional.items() if value}


@dataclass(frozen=True)
class ContextColumn:
    """A declared value of the request: categorical or numeric."""

    name: str
    kind: Literal["categorical", "numeric"] = "categorical"

    @property
    def column(self) -> str:
        """Name of the column in `Events.extra`."""
        return f"{CONTEXT}{self.name}"


@dataclass(frozen=True)
class EventSchema:
    """Labels, weight, sampling rate and context of a dataset's events; see the module docstring."""

    labels: tuple[LabelColumn, ...] = (LabelColumn("label"),)
    weighted: bool = False
    sampled: bool = False
    context: tuple[ContextColumn, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict, compare=False)
    """Number of ids of each categorical context, the unknown id 0 included; empty while they are not known."""

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> "EventSchema":
        """The schema of a dataset; without a declaration it has one binary label.

        Raises:
            ValueError: the declaration is damaged.
        """
        declared = manifest.get("event_schema")
        if declared is None:
            return cls()
        try:
            return cls(
                tuple(LabelColumn(**one | {"values": tuple(one.get("values", ()))}) for one in declared["labels"]),
                bool(declared[WEIGHT]),
                bool(declared[SAMPLING_RATE]),
                tuple(ContextColumn(**one) for one in declared["context"]),
                {name: int(one["size"]) for name, one in manifest.get("context_features", {}).items()},
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the event schema is damaged ({error}); prepare the dataset again") from error

    def to_json(self) -> dict[str, Any]:
        """The manifest's `event_schema`."""
        return {
            "labels": [label.to_json() for label in self.labels],
            WEIGHT: self.weighted,
            SAMPLING_RATE: self.sampled,
            "context": [{"name": one.name, "kind": one.kind} for one in self.context],
        }

    @property
    def described(self) -> dict[str, Any]:
        """Description -> declaration of each part of the schema, for comparisons: equal if and only if schemas are
        equal."""
        found: dict[str, Any] = {f"label {one.name}": one.to_json() for one in self.labels}
        found |= {"labels": list(self.label_names), "context": [one.name for one in self.context]}
        found |= {WEIGHT: self.weighted, SAMPLING_RATE: self.sampled}
        return found | {f"context {one.name}": one.kind for one in self.context}

    @property
    def is_default(self) -> bool:
        """True if events have one binary label and nothing else."""
        return self == EventSchema()

    @cached_property
    def extra(self) -> tuple[EventColumn, ...]:
        """The columns of `Events.extra`, in order."""
        names = [label.column for label in self.labels[1:]]
        names += [WEIGHT] * self.weighted + [SAMPLING_RATE] * self.sampled
        columns = [_number(name) for name in names]
        columns += [_id(one.column) if one.kind == "categorical" else _number(one.column) for one in self.context]
        return tuple(columns)

    @property
    def columns(self) -> tuple[EventColumn, ...]:
        """All columns of an event, in the order of the files."""
        return (*EVENT_COLUMNS, *self.extra)

    @property
    def categorical(self) -> tuple[str, ...]:
        """Names of the categorical context."""
        return tuple(one.name for one in self.context if one.kind == "categorical")

    @property
    def numeric(self) -> tuple[str, ...]:
        """Names of the numeric context."""
        return tuple(one.name for one in self.context if one.kind == "numeric")

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the labels; the first one defines exposures."""
        return tuple(label.name for label in self.labels)

    def label(self, name: str) -> LabelColumn:
        """The label with this name.

        Raises:
            ValueError: the dataset has no such label; the message lists its labels.
        """
        for label in self.labels:
            if label.name == name:
                return label
        known = self.label_names
        raise ValueError(f"no label {name!r}{did_you_mean(name, known)}; the dataset has {', '.join(known)}")

    def label_values(self, name: str, labels: NDArray[Any], extra: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """The values [n] of the label `name`, taken from events' `labels` or `extra`; NaN where it is not defined."""
        return labels if name == self.labels[0].name else extra[self.label(name).column]

    def broken_rule(self, column: str, values: NDArray[Any]) -> tuple[NDArray[np.bool_], str]:
        """(mask (bool [n]) of the values that are not allowed in a column of `extra`, the rule). NaN: unknown, allowed.

        Weights and sampling rates must not be NaN.
        """
        known = ~np.isnan(values)
        if column == WEIGHT:
            return ~((values >= 0) & (values < np.inf)), "a weight is a number of at least 0"
        if column == SAMPLING_RATE:
            return ~((values > 0) & (values <= 1)), "a sampling rate is above 0 and at most 1"
        for one in self.context:
            if one.column == column and one.name in self.categorical:
                size = self.sizes.get(one.name, 2**31)
                return (values < 0) | (values >= size), f"the dataset's {one.name} has the ids 0..{size - 1}"
            if one.column == column:
                return known & np.isinf(values), f"{one.name} is a finite number, or unknown"
        label = next(one for one in self.labels if one.column == column)
        return known & ~label_range(label, values), f"the label {label.name} is {label_rule(label)}"


def label_range(label: LabelColumn, values: NDArray[Any]) -> NDArray[np.bool_]:
    """Mask (bool [n]) of the stored values that a label of this kind can have."""
    if label.kind == "binary":
        return (values == 0) | (values == 1)
    if label.kind == "ordinal":
        return (values >= 0) & (values < len(label.values)) & (values == np.floor(values))
    return np.isfinite(values) & (values > -1 if label.transform == "log1p" else True)


def label_rule(label: LabelColumn) -> str:
    """Description of the values that a label of this kind can have, for messages."""
    if label.kind == "binary":
        return "0 or 1"
    if label.kind == "ordinal":
        return f"one of {', '.join(map(str, label.values))}"
    return "a number above -1 (log1p)" if label.transform == "log1p" else "a number"


def schema_problems(schema: EventSchema) -> list[str]:
    """All broken rules of a declaration, each as 'field: problem; remedy'."""
    found, names = [], schema.label_names
    first = schema.labels[0]
    if first.kind != "binary" or first.given:
        found.append(
            f"labels.{first.name}: the first label says which events are exposures and which are positive, so it must "
            "be binary and without `given`: name such a label first"
        )
    for label in schema.labels:
        if label.given is not None:
            earlier = schema.labels[: schema.labels.index(label)]
            others = [one.name for one in earlier if one.kind == "binary"]
            if label.given not in others:
                hint = did_you_mean(label.given, others)
                found.append(
                    f"labels.{label.name}.given: {label.given!r} is no binary label declared before it{hint}; there "
                    f"are {', '.join(others) or 'none'}"
                )
        if label.transform is not None and label.kind != "regression":
            found.append(f"labels.{label.name}.transform: only for kind regression; leave it out")
        if (label.kind == "ordinal") != bool(label.values) or len(set(label.values)) != len(label.values):
            found.append(
                f"labels.{label.name}.values: an ordinal label, and only that, lists its different values in order, "
                "such as [1, 2, 3, 4, 5]"
            )
        if label.kind == "ordinal" and len(label.values) == 1:
            found.append(f"labels.{label.name}.values: give at least two values")
    seen: set[str] = set()
    for name in (*names, *(one.name for one in schema.context)):
        if name in seen:
            found.append(f"{name!r} names two columns of events; give each its own name")
        seen.add(name)
    return found


def _number(name: str) -> EventColumn:
    return EventColumn(name, name, pa.float32(), np.float32, np.nan)


def _id(name: str) -> EventColumn:
    return EventColumn(name, name, pa.int32(), np.int64, 0)
