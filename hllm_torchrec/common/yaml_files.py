"""Safe reading of YAML: plain values only, with limits on nesting and on the expansion of aliases and merge keys."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from hllm_torchrec.common.machine_errors import is_machine_error

MAX_VALUES = 100_000
"""Limit on the number of values after expansion of aliases (`*name`). Aliases can make a short file expand to more than
fits into memory, or a value contain itself."""
MAX_DEPTH = 200
"""Limit on nesting: deep nesting overflows the stack of a parser in C, which ends the process; Python's parser would
raise RecursionError."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader with two changes: a key given twice in a mapping is an error (PyYAML silently keeps the last
    value), and a date is loaded as text.

    Merge keys (`<<: *name`) are expanded while the text is loaded, so the number of merged values is limited here.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    merged = 0

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Expand the merge keys of a mapping."""
        before = len(node.value)
        super().flatten_mapping(node)
        self.merged += max(len(node.value) - before, 0)
        if self.merged > MAX_VALUES:
            raise yaml.constructor.ConstructorError(
                None, None, f"more than {MAX_VALUES} merged values: correct its merge keys", node.start_mark
            )

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping of distinct keys.

        Raises:
            yaml.constructor.ConstructorError: a key occurs twice; the error contains its line number.
        """
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} occurs twice: keep one of them", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """Content of a file; None if it is empty.

    Raises:
        ValueError: the file does not exist, is not YAML or not UTF-8, a mapping has a key twice, or the content has
            more than MAX_VALUES values or may be nested more than MAX_DEPTH levels deep. The message may lack the path.
        OSError, MemoryError: an error of the machine (`is_machine_error`).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (ValueError, OSError) as error:
        if is_machine_error(error):
            raise
        raise ValueError(f"not valid YAML: {error}") from error
    return parse_yaml(text)


def parse_yaml(text: str) -> Any:
    """Content of a YAML text; None if it is empty.

    Raises:
        ValueError: as `read_yaml`, for the text.
    """
    try:
        check_depth(text)
        content = _UniqueKeyLoader(text).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())[:500]}") from error
    # An alias is a reference to the same object, so loading needs no extra memory; later code would visit or copy it
    # each time, so it is counted each time.
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


def check_depth(text: str) -> None:
    """Check upper bounds of the depth of YAML text: open brackets, and block indicators in a row (`- - - a`).

    Nesting by indentation is not checked: a depth of n needs a text of about n^2 characters.

    Raises:
        yaml.YAMLError: a bound exceeds MAX_DEPTH.
    """
    depth = 0
    for bracket in re.finditer(r"[\[{\]}]", text):
        depth += 1 if bracket[0] in "[{" else -1
        if depth > MAX_DEPTH:
            break
    if depth > MAX_DEPTH or re.search(rf"(?:[-?:] +){{{MAX_DEPTH}}}", text):
        raise yaml.YAMLError(f"nested more than {MAX_DEPTH} levels deep, or with as many open brackets: shorten it")


def limited(load: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return the YAML parser `load` with the limits of this module: beyond them it raises yaml.YAMLError."""

    def load_within_limits(text: str) -> Any:
        check_depth(text)
        if "*" in text:  # without an alias the content cannot expand
            try:
                parse_yaml(text)
            except ValueError as error:
                raise yaml.YAMLError(str(error)) from error
        return load(text)

    return load_within_limits


def abbreviate(value: Any, length: int = 200) -> str:
    """Return the repr of a value for messages, truncated to `length` characters."""
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."
