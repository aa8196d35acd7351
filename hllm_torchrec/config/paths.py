"""Paths of a configuration: saved as absolute ones with a run, and found again where the run is read."""

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
"""Dotted fields with the path of something that a run reads; any of them but `data.dataset` may be None."""
TRAINING = INPUTS[-3:]
"""Those that training alone reads."""
OPTION = {DATASET: "; name the directory with --dataset"}


def with_absolute_paths(config: Config) -> Config:
    """The configuration with absolute paths, to be saved with its run; URLs stay as they are.

    A run at a URL is read on other machines, so its paths stay relative to the current folder of whoever reads it.
    """
    if url_of(config.output) is not None:
        return config
    for name in ("output", *INPUTS):
        path = get_value(config, name)
        if path is not None and url_of(path) is None:
            config = set_value(config, name, os.path.abspath(path))
    return config


def with_found_paths(config: Config, run: Path) -> Config:
    """The configuration of a run directory with the paths of what exists; others stay as they are.

    A relative path, as earlier versions saved it, is taken from the current folder, or else from the nearest folder
    above the run. An absolute one that does not exist is taken from the same place relative to the run as when the run
    was made: a project may be moved as a whole.
    """
    for name in INPUTS:
        path = get_value(config, name)
        if path is None or url_of(path) is not None:
            continue
        found = next((place for place in _places(path, config.output, run) if os.path.exists(place)), path)
        config = set_value(config, name, str(found))
    return config


def _places(path: str, output: str, run: Path) -> list[str]:
    above = Path(os.path.abspath(run)).parents
    if not os.path.isabs(path):
        return [path, *(os.path.join(folder, path) for folder in above)]
    if not os.path.isabs(output):
        return [path]
    return [path, os.path.normpath(os.path.join(os.path.abspath(run), os.path.relpath(path, output)))]


def missing_paths(config: Config, source: Path) -> list[str]:
    """One message for each path of a run's configuration file `source` that does not exist and that every job reads."""
    return [
        f"{source}: {name}: {path}: not found from here, nor from the run's folder{OPTION.get(name, '; restore it')}"
        for name in INPUTS
        if name not in TRAINING
        and (path := get_value(config, name)) is not None
        and url_of(path) is None
        and not os.path.exists(path)
    ]


def get_value(config: Any, name: str) -> Any:
    """Value of a dotted field."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def set_value(config: Any, name: str, value: Any) -> Any:
    """A copy of a configuration with another value of a dotted field."""
    first, _, rest = name.partition(".")
    return replace(config, **{first: set_value(getattr(config, first), rest, value) if rest else value})
