"""YAML files of users', read without surprises: plain values only, and no more of them than the file seems to hold."""

from pathlib import Path
from typing import Any

import yaml

MAX_VALUES = 100_000
"""Aliases (`*name`) may repeat a part so often that a short file would fill the memory, or hold itself."""


def read_yaml(path: Path) -> Any:
    """The content of a file, None where it is empty.

    Raises:
        ValueError: it is no YAML, no UTF-8, or its aliases stand for more than MAX_VALUES values; says what, without
            the file's name.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError, OSError, OverflowError) as error:
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())[:500]}") from error
    left, count = [content], 0
    while left:
        value = left.pop()
        count += 1
        if count > MAX_VALUES:
            raise ValueError(
                f"not valid YAML: more than {MAX_VALUES} values, or one that holds itself: mend its aliases"
            )
        if isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, list | tuple | set):
            left += value
    return content


def abbreviate(value: Any, length: int = 200) -> str:
    """A value of a file as a message shows it: not longer than `length`."""
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."
