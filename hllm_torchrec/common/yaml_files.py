"""Safe reading of users' YAML files: plain values only, with a limit on the expansion of aliases."""

from pathlib import Path
from typing import Any

import yaml

MAX_VALUES = 100_000
"""Limit on values after expansion: aliases (`*name`) can make a short file expand beyond memory or contain itself."""


def read_yaml(path: Path) -> Any:
    """Content of a file; None if it is empty.

    Raises:
        ValueError: it is not YAML or not UTF-8, or its aliases expand to more than MAX_VALUES values; the message does
            not contain the file's name.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError, OSError, OverflowError) as error:
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())[:500]}") from error
    # An alias is the same object in memory, so the loader is safe, but each visit counts as a copy would.
    left, count = [content], 0
    while left:
        value = left.pop()
        count += 1
        if count > MAX_VALUES:
            raise ValueError(
                f"not valid YAML: more than {MAX_VALUES} values, or one that contains itself: correct its aliases"
            )
        if isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, list | tuple | set):
            left += value
    return content


def abbreviate(value: Any, length: int = 200) -> str:
    """repr of a value for messages, truncated to `length` characters."""
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."
