"""Checks of the keys and values of a configuration before it is built: all problems are reported at once."""

import dataclasses
import functools
import types
import typing
from argparse import ArgumentError
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader

from hllm_torchrec.common.errors import did_you_mean
from hllm_torchrec.common.yaml_files import abbreviate, limited, parse_yaml
from hllm_torchrec.config.inheritance import read_with_bases

# jsonargparse parses every text value as YAML with a parser in C, which needs the limits of `yaml_files`.
set_loader("yaml", limited(get_loader("yaml")), (yaml.YAMLError,))


def file_problems(path: str, cls: type) -> list[str]:
    """Return the problems of a YAML file and of its bases: keys and values that do not fit the dataclass `cls`.

    Each has the form 'file: a.b: ...'. If a file cannot be read, this is the only problem.
    """
    if not Path(path).is_file():
        return [f"--config: {path}: no such file" if path else "--config: no file given"]
    try:
        files = read_with_bases(Path(path))
    except ValueError as error:
        return [str(error)]
    return [f"{file}: {problem}" for file, content in files for problem in dataclass_problems(content, cls)]


def option_problems(options: dict[str, str], cls: type, others: tuple[str, ...] = ()) -> list[str]:
    """Return the problems of `--a.b text` options: names and values that do not fit the dataclass `cls`.

    Args:
        options: name without dashes -> text.
        others: names of options that are accepted in addition to the fields.
    """
    fields = dotted_fields(cls)
    problems: list[str] = []
    for name, text in options.items():
        # `a.b.key` is also valid if `a.b` is a mapping: the value then has the mapping's value type.
        kind = fields.get(name) or _mapping_values(fields.get(name.rpartition(".")[0]))
        if kind is not None:
            problems += [f"--{problem}" for problem in _option_value_problems(name, text, kind)]
        elif name not in others:
            hint = did_you_mean(name, (*fields, *others)) or "; --help lists all"
            problems.append(f"--{name}: unknown option{hint}")
    return problems


def _option_value_problems(name: str, text: str, kind: Any) -> list[str]:
    if kind is Any:
        return []
    if not is_dataclass_type(kind) and not is_dataclass_type(element_type(kind)):
        return [] if _fits(kind, text, is_text=True) else [_wrong(name, text, kind)]
    try:
        return _value_problems(parse_yaml(text), kind, name)
    except ValueError:
        return [f"{name}: {abbreviate(text)}: not valid YAML"]


def dataclass_problems(content: Any, cls: type, name: str = "") -> list[str]:
    """Return the problems of a mapping that is to become a `cls`: unknown keys, missing keys, values of a wrong type.

    name: dotted name of the mapping; empty for the complete file.
    """
    if not isinstance(content, dict):
        return [f"{name or 'the file'}: {abbreviate(content)}: must be a mapping of {cls.__name__} fields"]
    fields = {entry.name: entry for entry in dataclasses.fields(cls)}
    prefix = f"{name}." if name else ""
    problems: list[str] = []
    for key, value in content.items():
        if key in fields:
            problems += _value_problems(value, fields[key].type, prefix + key)
        else:
            problems.append(f"{prefix}{str(key)[:100]}: unknown key{did_you_mean(str(key)[:100], fields)}")
    for key, entry in fields.items():
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if required and key not in content:
            problems.append(f"{prefix}{key}: missing: must be {describe(entry.type)}")
    return problems


def _value_problems(value: Any, kind: Any, name: str) -> list[str]:
    element = element_type(kind)
    if is_dataclass_type(kind):
        return dataclass_problems(value, kind, name)
    if is_dataclass_type(element) and isinstance(value, list):
        return [p for i, entry in enumerate(value) for p in dataclass_problems(entry, element, f"{name}[{i}]")]
    if value is None and type(None) not in typing.get_args(kind):
        return [_wrong(name, value, kind)]
    return [] if _is_of(kind, value) or _fits(kind, value) else [_wrong(name, value, kind)]


def _is_of(kind: Any, value: Any) -> bool:
    """Return True for a value of exactly this type: a fast path without jsonargparse for most values."""
    union = typing.get_origin(kind) in (types.UnionType, typing.Union)
    return type(value) in (typing.get_args(kind) if union else (kind,))


def _wrong(name: str, value: Any, kind: Any) -> str:
    return f"{name}: {abbreviate(value)}: must be {describe(kind)}"


def _fits(kind: Any, value: Any, is_text: bool = False) -> bool:
    """Return True if jsonargparse accepts this value (is_text: the text of an option) for a field of this type."""
    # jsonargparse raises many types of errors; each of these means that the value does not fit.
    try:
        if is_text:
            _parser_of(kind).parse_args([f"--value={value}"])
        else:
            _parser_of(kind).parse_object({"value": value})
    except (ArgumentError, TypeError, ValueError, KeyError, RecursionError, OSError, OverflowError):
        return False
    return True


@functools.cache
def _parser_of(kind: Any) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    return parser


def dotted_fields(cls: type, prefix: str = "") -> dict[str, Any]:
    """Return dotted name -> type for every field of a dataclass and of the dataclasses nested in it."""
    found: dict[str, Any] = {}
    for entry in dataclasses.fields(cls):
        found[prefix + entry.name] = entry.type
        if is_dataclass_type(entry.type):
            found |= dotted_fields(cast(type, entry.type), f"{prefix}{entry.name}.")
    return found


def split_arguments(arguments: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (name without dashes, text) for the options `--a.b text`, `--a.b=text` and `--a.b` (empty text)."""
    # "--" is appended as a sentinel: an option at the end has no following text.
    for argument, following in zip(arguments, [*arguments, "--"][1:], strict=True):
        if argument.startswith("--"):
            name, equals, text = argument.removeprefix("--").partition("=")
            yield name.removesuffix("+"), text if equals or following.startswith("--") else following


def is_dataclass_type(kind: Any) -> bool:
    """True for a dataclass type."""
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def element_type(kind: Any) -> Any:
    """T of tuple[T, ...], else None."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else None


def _mapping_values(kind: Any) -> Any:
    """V of dict[str, V] or of dict[str, V] | None; None for any other type."""
    parts = (kind, *typing.get_args(kind))
    return next((typing.get_args(part)[1] for part in parts if typing.get_origin(part) is dict), None)


def describe(kind: Any) -> str:
    """Description of a type for messages."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, parts))
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if part is type(None) else describe(part) for part in parts)
    if origin is tuple:
        return f"a list, each {describe(parts[0])}"
    if origin is dict:
        return "a mapping" if parts[1] is Any else f"a mapping, each value {describe(parts[1])}"
    if is_dataclass_type(kind):
        return f"a mapping of {kind.__name__} fields"
    return {int: "an integer", float: "a number", bool: "true or false", str: "text"}[kind]
