"""Recipes on the command line: replaces `recipe: NAME` of a configuration by the settings chosen for its dataset."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from hllm_torchrec.common.terminal import say
from hllm_torchrec.config.checking import split_arguments
from hllm_torchrec.config.inheritance import merge, read_resolved
from hllm_torchrec.config.recipes import (
    ENCODER,
    RECIPES,
    Choice,
    DatasetFacts,
    choices_of_run,
    has_value,
    recipe_choices,
    value_at,
)
from hllm_torchrec.config.schema import DataConfig


def with_recipe(arguments: list[str]) -> list[str]:
    """Return arguments of `load_config` in which the recipe is replaced by options with its choices.

    The choices come first, so that files and options of `arguments` override them. Without a recipe, `arguments` are
    returned unchanged. Prints each choice with its reason, and downloads the recipes' text encoder if the
    configuration uses it and its folder has no model.

    Raises:
        ValueError: the dataset cannot be read or does not fit the task, or the encoder cannot be downloaded.
    """
    given = _given(arguments)
    task = given.get("recipe")
    if task not in RECIPES:  # `load_config` reports an unknown recipe together with all other problems
        return arguments
    saved = _saved_run(given)
    if saved is not None:
        choices = choices_of_run(task, saved, given)
    else:
        choices = recipe_choices(task, facts_of(_dataset(given)), given)
    if int(os.environ.get("RANK", "0")) == 0:
        for choice in choices:
            say(f"recipe {task}: {choice}")
    fetch_encoder(with_choices(given, choices))
    options = [f"--{choice.name}={yaml.safe_dump(choice.value, default_flow_style=True)}" for choice in choices]
    return [*(option.removesuffix("\n").removesuffix("\n...") for option in options), *arguments, "--recipe=null"]


def facts_of(dataset: str) -> DatasetFacts:
    """Return the facts on which recipes depend, of the dataset at a path or URL.

    Raises:
        ValueError: the dataset cannot be read.
    """
    from hllm_torchrec.data.dataset import Dataset
    from hllm_torchrec.data.recipe_facts import dataset_facts

    return dataset_facts(Dataset.open(dataset))


def _given(arguments: list[str]) -> dict[str, Any]:
    """Merge the settings of files and options; later ones override earlier ones.

    Files and values that cannot be read are skipped: the parser reports them later.
    """
    settings: dict[str, Any] = {}
    for name, text in split_arguments(arguments):
        try:
            content = read_resolved(Path(text)) if name == "config" else yaml.safe_load(text)
        except (ValueError, OSError, yaml.YAMLError):
            continue
        if name != "config":
            for part in reversed(name.split(".")):
                content = {part: content}
        settings = merge(settings, content if isinstance(content, dict) else {})
    return settings


def _dataset(given: dict[str, Any]) -> str:
    return str(value_at(given, "data.dataset") if has_value(given, "data.dataset") else DataConfig.dataset)


def _saved_run(given: dict[str, Any]) -> dict[str, Any] | None:
    """Configuration of the run that is resumed; None if there is none."""
    file = Path(str(given.get("output"))) / "config.yaml"
    return read_resolved(file) if given.get("resume") is True and file.is_file() else None


def with_choices(content: dict[str, Any], choices: Sequence[Choice]) -> dict[str, Any]:
    """Return the content of a configuration with the choices of its recipe."""
    for choice in choices:
        content = merge(content, choice.as_mapping())
    return content


def fetch_encoder(content: dict[str, Any]) -> None:
    """Download the recipes' text encoder if the configuration `content` uses it and its folder has no model.

    Raises:
        ValueError: the encoder cannot be downloaded.
    """
    name = value_at(content, "item_llm.pretrained") if has_value(content, "item_llm.pretrained") else None
    enabled = value_at(content, "item_llm.enabled") if has_value(content, "item_llm.enabled") else True
    if not enabled or name != ENCODER or (Path(name) / "config.json").is_file():
        return
    from hllm_torchrec.common.locks import hold_lock
    from hllm_torchrec.data.quickstart_files import fetch_minilm

    parent = Path(name).parent
    parent.mkdir(parents=True, exist_ok=True)
    # All ranks of a job get here at the same time.
    with hold_lock(parent / ".fetch.lock", f"{name}: another process fetches it", wait=600):
        fetch_minilm(parent)
