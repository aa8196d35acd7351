"""Schema of `manifest.json`: required fields and types, and file names that stay within the dataset."""

import re
from collections.abc import Callable
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from hllm_torchrec.data.event_schema import EventSchema, schema_problems
from hllm_torchrec.data.split import RULES

LARGEST = 2**31 - 2
"""Maximum number of users, items or values of a feature, because FBGEMM's kernels have int32 row numbers."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


def is_inside(name: str) -> bool:
    """True if a file name, relative to a directory, stays within it and means the same on every system."""
    path = PurePosixPath(name)
    # "C:x" and a backslash are ordinary parts of a name on Linux, but parts of a path on Windows.
    outside = path.is_absolute() or ".." in path.parts or not path.parts or PureWindowsPath(name).drive
    return not outside and "\\" not in name and "\0" not in name


def _is_count(value: Any, least: int = 0) -> bool:
    # bool is a subclass of int, and JSON's true is not a count.
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= LARGEST


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_counts(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_count(value.get(name)) for name in ("items", "users"))


def _is_split(value: Any) -> bool:
    return isinstance(value, dict) and value.get("rule") in RULES


def _is_actions(value: Any) -> bool:
    if not (isinstance(value, dict) and _is_count(value.get("number"), 1) and isinstance(value.get("names"), dict)):
        return False
    names = value["names"].items()
    return all(k.isascii() and k.isdigit() and int(k) < value["number"] and isinstance(v, str) for k, v in names)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_features(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(f, dict) and _is_count(f.get("size"), 1) for f in value.values())


def _is_parts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(facts, dict) for facts in value.values())


def _is_files(value: Any) -> bool:
    return isinstance(value, dict) and all(
        is_inside(name)
        and isinstance(facts, dict)
        and isinstance(facts.get("bytes"), int)
        and _SHA256.fullmatch(str(facts.get("sha256"))) is not None
        for name, facts in value.items()
    )


def _is_event_files(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and is_inside(name) for name in value)


def _is_event_schema(value: Any) -> bool:
    try:
        return not schema_problems(EventSchema.from_manifest({"event_schema": value}))
    except (ValueError, TypeError, IndexError):
        return False


def _is_folder(value: Any) -> bool:
    return isinstance(value, str) and (value == "" or is_inside(value))


def _is_base(value: Any) -> bool:
    return isinstance(value, dict) and _is_folder(value.get("folder")) and _is_event_files(value.get("event_files"))


def _is_appends(value: Any) -> bool:
    return isinstance(value, list) and all(_is_base(one) and _is_count(one.get("version"), 1) for one in value)


_CHAIN_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "version": (lambda value: _is_count(value, 1), "a number from 1 on"),
    "base": (_is_base, "a folder and its event files, within the dataset"),
    "appends": (_is_appends, "folders and their event files, within the dataset"),
}
"""Fields of a version with a base and appends (`data.versions`); a manifest must have all of them or none."""

_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "schema_version": (_is_count, "a number"),
    "name": (_is_text, "text"),
    "fingerprint": (_is_text, "text"),
    "counts": (_is_counts, f"numbers of items and users, each 0..{LARGEST}"),
    "parts": (_is_parts, "an object that holds an object for each part"),
    "split": (_is_split, f"a rule of {', '.join(RULES)}"),
    "actions": (_is_actions, "their number and names"),
    "text_columns": (_is_texts, "names of columns"),
    "item_features": (_is_features, "the size of each feature"),
    "user_features": (_is_features, "the size of each feature"),
    "files": (_is_files, "bytes and sha256 of files within the dataset"),
}

_OPTIONAL: dict[str, tuple[Callable[[Any], bool], str]] = {
    "event_files": _FIELDS["files"],
    "event_schema": (_is_event_schema, "labels, weight, sampling rate and context of events"),
    "context_features": _FIELDS["item_features"],
}
"""Optional fields of a manifest."""


def find_manifest_problem(manifest: Any) -> str | None:
    """The first problem of a manifest's fields ("counts is ...; it must be ..."), or None."""
    if not isinstance(manifest, dict):
        return f"it holds a {type(manifest).__name__}, not an object"
    chain = _CHAIN_FIELDS if any(name in manifest for name in _CHAIN_FIELDS) else {}
    optional = {name: check for name, check in _OPTIONAL.items() if name in manifest}
    for name, (holds, rule) in {**_FIELDS, **optional, **chain}.items():
        if name not in manifest:
            return f"{name} is missing; it must be {rule}"
        if not holds(manifest[name]):
            return f"{name} is {str(manifest[name])[:100]!r}; it must be {rule}"
    if chain:
        read = {name for one in (manifest["base"], *manifest["appends"]) for name in one["event_files"]}
        if not read <= manifest["files"].keys():
            return f"files lacks {sorted(read - manifest['files'].keys())[0][:100]!r}; it must list every event file"
    return None
