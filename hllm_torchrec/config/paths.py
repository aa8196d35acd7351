"""Paths in a configuration: a run saves them as absolute paths, and they are located again when the run is read."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from hllm_torchrec.common.urls import url_of
from hllm_torchrec.config.schema import Config

DATASET = "data.dataset"
INPUTS = (
    DATASET,
    "item_llm.pretrained",
    "item_llm.tokenizer",
    "item_llm.store",
    "user.pretrained",
    "creative.pretrained",
    "creative.tokenizer",
    "start_from",
    "data.drawn_negatives.item_store",
    "data.drawn_negatives.user_store",
)
"""Dotted fields that contain the path of an input of a run; all except `data.dataset` may be None."""
TRAINING = INPUTS[-3:]
"""Inputs that only training reads."""
OPTION = {DATASET: "; name the directory with --dataset"}
"""Dotted field -> remedy in the message of a missing path."""


def with_absolute_paths(config: Config) -> Config:
    """Return the configuration with absolute paths, to be saved with its run; URLs are not changed.

    If the run is at a URL, the paths are not changed either: other machines read the run, and resolve its relative
    paths against their current folder.
    """
    if url_of(config.output) is not None:
        return config
    for name in ("output", *INPUTS):
        path = get_value(config, name)
        if path is not None and url_of(path) is None:
            config = set_value(config, name, os.path.abspath(path))
    return config


def with_found_paths(config: Config, run: Path) -> Config:
    """Return the configuration of a run directory with input paths that exist; paths that are not found do not change.

    A relative path, as saved by earlier versions, is resolved against the current folder, else against the nearest
    folder above the run in which it exists. If an absolute path does not exist, the run and its inputs may have been
    moved together: the path then keeps its position relative to the run directory.
    """
    for name in INPUTS:
        path = get_value(config, name)
        if path is None or url_of(path) is not None:
            continue
        candidates = _candidates(path, config.output, run)
        existing = next((candidate for candidate in candidates if os.path.exists(candidate)), path)
        config = set_value(config, name, str(existing))
    return config


def _candidates(path: str, output: str, run: Path) -> list[str]:
    """Return the paths at which an input may be, in order of preference; output: `output` of the saved config."""
    above = Path(os.path.abspath(run)).parents
    if not os.path.isabs(path):
        return [path, *(os.path.join(folder, path) for folder in above)]
    if not os.path.isabs(output):
        return [path]
    return [path, os.path.normpath(os.path.join(os.path.abspath(run), os.path.relpath(path, output)))]


def missing_paths(config: Config, source: Path) -> list[str]:
    """Return a problem for each input path that does not exist, except those that only training reads.

    source: configuration file of the run, for the messages.
    """
    return [
        f"{source}: {name}: {path}: not found from here, nor from the run's folder{OPTION.get(name, '; restore it')}"
        for name in INPUTS
        if name not in TRAINING
        and (path := get_value(config, name)) is not None
        and url_of(path) is None
        and not os.path.exists(path)
    ]


def get_value(config: Any, name: str) -> Any:
    """Return the value of a dotted field."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def set_value(config: Any, name: str, value: Any) -> Any:
    """Return a copy of a configuration with another value of a dotted field."""
    first, _, rest = name.partition(".")
    return replace(config, **{first: set_value(getattr(config, first), rest, value) if rest else value})
