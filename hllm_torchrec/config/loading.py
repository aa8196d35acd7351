"""Conversion of YAML files and dotted options to a configuration dataclass, and back.

jsonargparse turns the dataclasses into dotted options such as `--user.layers 2` and reads the YAML; it was chosen
because it works on plain dataclasses, without a second schema. `checking` first reports all unknown keys, with the
closest valid name, and all values of a wrong type together. `inheritance` merges a file with its bases.
"""

import dataclasses
import functools
import re
from argparse import ArgumentError
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from hllm_torchrec.common.atomic_files import replace_file
from hllm_torchrec.common.errors import ConfigError, without_credentials
from hllm_torchrec.config.checking import (
    element_type,
    file_problems,
    is_dataclass_type,
    option_problems,
    split_arguments,
)
from hllm_torchrec.config.extensions import check_permission, code_needs_permission, is_extension
from hllm_torchrec.config.inheritance import read_resolved
from hllm_torchrec.config.schema import Config

set_parsing_settings(docstring_parse_attribute_docstrings=True)

T = TypeVar("T")

RESOLVED = {"resume", "start_from", "max_steps", "data", "evaluation", "parallel", "reliability", "logs"}
"""Top-level keys that every resolved configuration has had since version 0.1; other files rarely have all of them."""


def load_dataclass(cls: type[T], arguments: list[str], *, prog: str, description: str) -> T:
    """Parse `--config FILE` and dotted overrides into `cls`; `prog` and `description` are shown in `--help`.

    `--print_config` prints the resolved configuration and exits.

    Raises:
        ConfigError: all unknown keys (each with the closest valid name) and values of a wrong type; or, if there are
            none, all violated rules.
    """
    given = list(split_arguments(arguments))
    problems = [problem for name, text in given if name == "config" for problem in file_problems(text, cls)]
    problems += option_problems(dict(given), cls, others=("config", "print_config", "help"))
    if problems:
        raise ConfigError(problems)
    kind: type = cls
    try:
        parsed = _parser(kind, prog, description).parse_args(_for_jsonargparse(arguments))
    except (ArgumentError, ValueError, TypeError, RecursionError) as error:
        # A ConfigError lists violated rules and is complete; the parser's errors need the name of the file.
        if isinstance(error, ConfigError):
            raise
        files = ", ".join(text for name, text in given if name == "config")
        raise ConfigError(f"{files or prog}: {' '.join(str(error).split())}: see {cls.__name__}'s fields") from None
    if "--print_config" in arguments:
        print(to_yaml(parsed), end="")
        raise SystemExit(0)
    built: T = _build(kind, parsed)
    return built


def _for_jsonargparse(arguments: list[str]) -> list[str]:
    """Return the arguments without --print_config, and with each configuration file replaced by its resolved content.

    jsonargparse does not support `base`, and its own --print_config cannot print dataclasses in a list.
    """
    converted: list[str] = []
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if converted and converted[-1] == "--config":  # the option and its file are two arguments: replace both by one
            converted[-1] = _resolved_option(argument)
        elif name == "--config" and equals:
            converted.append(_resolved_option(text))
        elif argument != "--print_config":
            converted.append(argument)
    return converted


def _resolved_option(path: str) -> str:
    content = _as_saved(read_resolved(Path(path)))
    return "--config=" + str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def _as_saved(content: Any) -> Any:
    """Return the content of a file; if a run of an earlier version saved it, add fields that keep the old behavior.

    Such a run lacks fields that were added later, and the default of `evaluation.history` would change its results.
    A file with all keys of RESOLVED was written by `save_config` or `--print_config`, with every field of its version.
    """
    if not isinstance(content, dict) or not RESOLVED <= content.keys() or not isinstance(content["evaluation"], dict):
        return content
    return content | {"evaluation": {"history": "split"} | content["evaluation"]}


@functools.cache
def _parser(cls: type, prog: str, description: str) -> ArgumentParser:
    parser = ArgumentParser(prog=prog, exit_on_error=False, description=description)
    parser.add_argument("--config", action="config", help="YAML file; later options override it")
    parser.add_class_arguments(cls, nested_key=None, fail_untyped=True)
    return parser


def _build(cls: type, value: Any) -> Any:
    """Convert a Namespace or dict to a dataclass, recursively."""
    if dataclasses.is_dataclass(value):
        return value
    data = _entries(value) if isinstance(value, Namespace) else dict(value)
    kinds = {f.name: f for f in dataclasses.fields(cls)}
    built = {}
    for name, entry in data.items():
        if name not in kinds:
            continue
        kind = kinds[name].type
        if isinstance(kind, type) and is_dataclass_type(kind):
            entry = _build(kind, entry)
        elif is_dataclass_type(element_type(kind)):
            entry = tuple(_build(element_type(kind), part) for part in entry)
        elif isinstance(entry, list):
            entry = tuple(entry)
        elif isinstance(entry, Namespace):
            entry = _entries(entry)
        built[name] = entry
    return cls(**built)


def _entries(namespace: Namespace) -> dict[str, Any]:
    """Return field name -> value.

    jsonargparse prefixes names that are methods of Namespace, such as `items`, with a zero-width character.
    """
    return {name.removeprefix("\u200b"): entry for name, entry in vars(namespace).items()}


def to_dict(config: Any) -> Any:
    """Convert a configuration, a dataclass or jsonargparse's Namespace, to dicts and lists for JSON and YAML."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Namespace):
        return {name: to_dict(value) for name, value in _entries(config).items() if name != "config"}
    return [to_dict(entry) for entry in config] if isinstance(config, tuple | list) else config


def to_yaml(config: Any) -> str:
    """Convert a configuration to YAML."""
    return str(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))


def load_config(arguments: list[str]) -> Config:
    """Parse `--config FILE` and dotted overrides: ["--config", "configs/quickstart.yaml", "--seed", "1"].

    `--print_config` prints the resolved configuration and exits. The configuration file of a run may come from someone
    else, so it may import only code that is allowed (`config.extensions`).

    Raises:
        ConfigError: all unknown keys (each with the closest valid name) and values of a wrong type; or, if there are
            none, all violated rules; or, if there are none, all URLs that contain credentials.
    """
    files = [Path(text) for name, text in split_arguments(arguments) if name == "config"]
    with code_needs_permission(any((file.parent / "checkpoints").exists() for file in files)):
        config = _load(arguments)
    problems = list(_secrets(to_dict(config), ""))
    if problems:
        raise ConfigError(problems)
    return config


def _secrets(value: Any, name: str) -> Iterator[str]:
    """Yield a problem for each URL with credentials: the configuration is saved, logged and reported."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from _secrets(part, f"{name}.{key}".lstrip("."))
    if isinstance(value, str) and re.fullmatch(r"[\w+.-]+:/+\S+", value) and value != without_credentials(value):
        yield (
            f"{name}: {without_credentials(value)}: a URL here must have no credentials, because the run saves it: set "
            "them in the environment (such as AWS_PROFILE), or in ~/.config/fsspec/conf.json"
        )


def _load(arguments: list[str]) -> Config:
    config = load_dataclass(Config, arguments, prog="hllm train", description="Train a hybrid HLLM.")
    # Numeric features are imported later, outside of `code_needs_permission`, so they are checked here.
    for name in filter(is_extension, config.data.numeric_features):
        check_permission(name, "data.numeric_features")
    return config


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, to_yaml(config))


def config_from_file(path: Path) -> Config:
    """Read the resolved configuration of a run (written by `save_config`); raises as `load_dataclass`."""
    with code_needs_permission():
        return _load(["--config", str(path)])
