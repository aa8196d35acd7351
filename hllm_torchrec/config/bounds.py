"""Ranges of numbers, written as text such as ">= 0, < 1", and checks of numbers against them."""

import math
import operator
from collections.abc import Iterator, Mapping
from typing import Any

from hllm_torchrec.common.yaml_files import abbreviate

MAX_INTEGER = 2**63 - 1
COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


def out_of_bounds(config: Any, bounds: Mapping[str, str], prefix: str = "") -> Iterator[str]:
    """Yield a problem for each number outside its range; bounds: dotted attribute -> range. None is always valid."""
    for name, bound in bounds.items():
        value = operator.attrgetter(name)(config)
        if value is not None:
            yield from bound_problems(prefix + name, value, bound)


def bound_problems(name: str, value: float, bound: str) -> Iterator[str]:
    """Yield a problem if a number is outside its range, not finite, or a whole number of more than 64 bits."""
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        yield f"{name}: {abbreviate(value)}: must be at most {MAX_INTEGER} in magnitude"
    elif not math.isfinite(value):
        yield f"{name}: {value}: must be a finite number"
    elif not all(_holds(value, part) for part in bound.split(", ")):
        yield f"{name}: {value}: must be {bound.replace(', ', ' and ')}"


def _holds(value: float, comparison: str) -> bool:
    sign, limit = comparison.split()
    return bool(COMPARISONS[sign](value, float(limit)))
