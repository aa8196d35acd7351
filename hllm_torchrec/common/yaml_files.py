"""Safe reading of YAML: plain values only, with limits on nesting and on the expansion of aliases and merge keys."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from hllm_torchrec.common.machine_errors import is_machine_error

MAX_VALUES = 100_000
"""Limit on values after expansion: aliases (`*name`) can make a short file expand beyond memory or contain itself."""
MAX_DEPTH = 200
"""Limit on nesting: parsers in C end the process by a stack overflow where Python raises RecursionError."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader, except that a key given twice in a mapping is an error (PyYAML silently keeps the last),
    and that a date is text.

    Merge keys (`<<: *name`) are expanded while the text is loaded, so their number is limited here.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:timestamp"]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
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
            yaml.constructor.ConstructorError: a key occurs twice; has its line.
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
        ValueError: it is not YAML or not UTF-8, a key occurs twice in a mapping, or its aliases expand to more than
            MAX_VALUES values; the message does not contain the file's name.
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
        ValueError: as `read_yaml`, or it is nested more than MAX_DEPTH levels deep.
    """
    try:
        check_depth(text)
        content = _UniqueKeyLoader(text).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
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


def check_depth(text: str) -> None:
    """Check an upper bound of the nesting that YAML text can have on one line; other nesting is quadratic in length.

    Raises:
        yaml.YAMLError: it is above MAX_DEPTH.
    """
    depth = 0
    for bracket in re.finditer(r"[\[{\]}]", text):
        depth += 1 if bracket[0] in "[{" else -1
        if depth > MAX_DEPTH:
            break
    if depth > MAX_DEPTH or re.search(rf"(?:[-?:] +){{{MAX_DEPTH}}}", text):
        raise yaml.YAMLError(f"nested more than {MAX_DEPTH} levels deep, or with as many open brackets: shorten it")


def limited(load: Callable[[str], Any]) -> Callable[[str], Any]:
    """`load`, a parser of YAML, with the limits of this module: it raises yaml.YAMLError beyond them."""

    def load_within_limits(text: str) -> Any:
        check_depth(text)
        if "*" in text:  # only aliases expand
            try:
                parse_yaml(text)
            except ValueError as error:
                raise yaml.YAMLError(str(error)) from error
        return load(text)

    return load_within_limits


def abbreviate(value: Any, length: int = 200) -> str:
    """repr of a value for messages, truncated to `length` characters."""
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."
