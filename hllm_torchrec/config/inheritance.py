"""Inheritance of configuration files: `base: other.yaml` starts from another file's values.

The path is relative to the file that contains the line, and a base may have a base itself. Mappings are merged key by
key at any depth; all other values, including lists and null, replace the base's value. A run saves the merged result,
without `base`.
"""

from pathlib import Path
from typing import Any

from hllm_torchrec.common.yaml_files import abbreviate, read_yaml

BASE = "base"
"""Key that names the base file; no configuration field has this name."""


def read_with_bases(path: Path, above: tuple[Path, ...] = ()) -> list[tuple[Path, Any]]:
    """Return (path, content without `base`) of the file and its bases; the base that has no base itself comes first.

    Args:
        above: chain of the files that are based on this one, used to detect cycles.

    Raises:
        ValueError: a file is missing, is not valid YAML, or is based on itself; the message starts with its path.
    """
    if path.resolve() in (file.resolve() for file in above):
        circle = " -> ".join(str(file) for file in (*above, path))
        raise ValueError(f"{above[-1]}: base: {circle}: a file cannot be based on itself; remove one of these lines")
    try:
        content = read_yaml(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(content, dict) or BASE not in content:
        return [(path, {} if content is None else content)]
    base = content.pop(BASE)
    if not isinstance(base, str):
        raise ValueError(f"{path}: base: {abbreviate(base)}: must be the path of a YAML file, relative to this one")
    target = path.parent / base
    if not target.is_file():
        raise ValueError(f"{path}: base: {base!r}: no such file; the path is relative to {path.parent}/")
    return [*read_with_bases(target, (*above, path)), (path, content)]


def merge(base: Any, changes: Any) -> Any:
    """Return `base` updated by `changes`: mappings are merged at any depth, other values are replaced."""
    if not (isinstance(base, dict) and isinstance(changes, dict)):
        return changes
    return base | {key: merge(base.get(key), value) for key, value in changes.items()}


def read_resolved(path: Path) -> Any:
    """Return the content of a file merged into that of its bases.

    Raises:
        ValueError: as `read_with_bases`.
    """
    resolved: Any = {}
    for _, content in read_with_bases(path):
        resolved = merge(resolved, content)
    return resolved
