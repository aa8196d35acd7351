"""Conversion of a request's context from raw values (strings and numbers) to columns of events, for serving."""

import re
from collections import Counter
from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hllm_torchrec.common.errors import did_you_mean
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.event_schema import WHOLE_FLOAT, ContextColumn

ContextValue = str | bool | float | None
"""Value of a context column: a number if it is numeric; a string, a number or a boolean (the category `true` or
`false`) if it is categorical. None: unknown."""

WHOLE = re.compile(WHOLE_FLOAT)

FLOAT32_MAX = float(np.finfo(np.float32).max)


def category(value: object) -> str:
    """The text of a categorical value in a dataset: without space around it, whole floats as integers, booleans as
    true or false."""
    text = str(value).lower() if isinstance(value, bool | np.bool_) else str(value).strip()
    return WHOLE.sub(r"\1", text)


class RawContext:
    """Converts the context columns that a model reads.

    unknown: context column -> number of requests whose categorical value the dataset does not have.
    """

    def __init__(self, dataset: Dataset, names: tuple[str, ...]) -> None:
        self._read = [one for one in dataset.schema.context if one.name in names]
        self._known = [one.name for one in dataset.schema.context]
        self._ids = {
            one.name: {str(value): i for i, value in enumerate(dataset.feature_values(one.name).to_pylist(), start=1)}
            for one in self._read
            if one.kind == "categorical"
        }
        self.unknown: Counter[str] = Counter()

    def columns(self, given: Mapping[str, ContextValue] | None, rows: int) -> dict[str, NDArray[Any]]:
        """Columns [rows] of `Events.extra` for one request, whose values are repeated in every row.

        Raises:
            ValueError: a value that the model reads is missing (an unknown value must be given as None); a name is not
                a context column of the dataset; or a numeric value is not a finite number.
        """
        given = given or {}
        for name in given:
            if name not in self._known:
                has = ", ".join(self._known) or "none"
                raise ValueError(
                    f"context {name!r}: the dataset has no such context{did_you_mean(name, self._known)}; it has {has}"
                )
        return {one.column: np.full(rows, self._value(one, given)) for one in self._read}

    def _value(self, one: ContextColumn, given: Mapping[str, ContextValue]) -> Any:
        """Id (int64) of a categorical value, or a numeric value as float32."""
        if one.name not in given:
            raise ValueError(
                f"the request has no {one.name!r}, which the model reads; give it in context (None or null: unknown)"
            )
        value = given[one.name]
        if one.kind == "categorical":
            if not isinstance(value, str | Real | np.bool_ | None):
                raise ValueError(f"context {one.name!r} is {value!r}; it must be a text, a number, a boolean, or None")
            found = 0 if value is None else self._id(one.name, value)
            self.unknown[one.name] += value is not None and not found
            return np.int64(found)
        if value is None:
            return np.float32(np.nan)
        if not isinstance(value, Real) or isinstance(value, bool) or not abs(value) <= FLOAT32_MAX:
            raise ValueError(f"context {one.name!r} is {value!r}; it must be a finite number, or None")
        return np.float32(value)

    def _id(self, name: str, value: ContextValue) -> int:
        """Id of a categorical value, which is read as `hllm prepare` reads a cell (`category`); 0 if it is unknown."""
        return self._ids[name].get(category(value), 0)
