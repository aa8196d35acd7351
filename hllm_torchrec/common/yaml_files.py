"""Safe reading of users' YAML files: plain values only, with a limit on the expansion of aliases."""

from pathlib import Path
from typing import Any

import yaml

MAX_VALUES = 100_000
"""Limit on values after expansion: aliases (`*name`) can make a short file expand beyond memory or contain itself."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader, except that a key given twice in a mapping is an error (PyYAML silently keeps the last),
    and that a date is text."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:timestamp"]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

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
        loader = _UniqueKeyLoader(path.read_text(encoding="utf-8"))
        content = loader.get_single_data()
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
