"""Recipes on the command line: `recipe: ranking` of a configuration becomes the settings for its dataset."""

import os
from pathlib import Path
from typing import Any

import yaml

from hllm_torchrec.common.terminal import say
from hllm_torchrec.config.checking import split_arguments
from hllm_torchrec.config.inheritance import merge, read_resolved
from hllm_torchrec.config.recipes import ENCODER, RECIPES, Choice
from hllm_torchrec.config.schema import DataConfig


def with_recipe(arguments: list[str]) -> list[str]:
    """Arguments of `load_config` with the choices of their recipe, below all that they set; unchanged without one.

    Prints each choice with its reason, and fetches the recipes' encoder if it is the one to use and is not there.

    Raises:
        ValueError: the dataset cannot be read, or does not fit the task.
    """
    given = _given(arguments)
    task = given.get("recipe")
    if task not in RECIPES:  # an unknown one is reported with all other problems
        return arguments
    choices = [choice for choice in choices_for(task, _dataset(given)) if not _has(given, choice.name)]
    saved = _saved_run(given)
    if saved is not None:  # the dataset may have grown since, and then a choice would be another one
        choices = [Choice(one.name, _value(saved, one.name), "the resumed run has it") for one in choices]
    if int(os.environ.get("RANK", "0")) == 0:
        for choice in choices:
            say(f"recipe {task}: {choice}")
    _fetch(given)
    options = [f"--{choice.name}={yaml.safe_dump(choice.value, default_flow_style=True)}" for choice in choices]
    return [*(option.removesuffix("\n").removesuffix("\n...") for option in options), *arguments, "--recipe=null"]


def choices_for(task: str, dataset: str) -> list[Choice]:
    """The choices of a recipe for the dataset at a path or URL.

    Raises:
        ValueError: it cannot be read, or does not fit the task.
    """
    from hllm_torchrec.data.dataset import Dataset
    from hllm_torchrec.data.recipe_facts import dataset_facts

    return list(RECIPES[task](dataset_facts(Dataset.open(dataset))))


def _given(arguments: list[str]) -> dict[str, Any]:
    """All that files and options set, the later over the earlier; what cannot be read is left to the parser."""
    found: dict[str, Any] = {}
    for name, text in split_arguments(arguments):
        try:
            content = read_resolved(Path(text)) if name == "config" else yaml.safe_load(text)
        except (ValueError, OSError, yaml.YAMLError):
            continue
        if name != "config":
            for part in reversed(name.split(".")):
                content = {part: content}
        found = merge(found, content if isinstance(content, dict) else {})
    return found


def _dataset(given: dict[str, Any]) -> str:
    return str(_value(given, "data.dataset") if _has(given, "data.dataset") else DataConfig.dataset)


def _saved_run(given: dict[str, Any]) -> dict[str, Any] | None:
    """Configuration of the run that is resumed; None if there is none."""
    file = Path(str(given.get("output"))) / "config.yaml"
    return read_resolved(file) if given.get("resume") is True and file.is_file() else None


def _fetch(given: dict[str, Any]) -> None:
    """Fetch the recipes' encoder if the configuration names it and it is not there."""
    name = _value(given, "item_llm.pretrained") if _has(given, "item_llm.pretrained") else None
    if name != ENCODER or (Path(name) / "config.json").is_file():
        return
    from hllm_torchrec.common.locks import hold_lock
    from hllm_torchrec.data.quickstart_files import fetch_minilm

    parent = Path(name).parent
    parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(parent / ".fetch.lock", f"{name}: another process fetches it", wait=600):  # ranks start together
        fetch_minilm(parent)


def _has(given: Any, name: str) -> bool:
    for part in name.split("."):
        if not isinstance(given, dict) or part not in given:
            return False
        given = given[part]
    return True


def _value(given: Any, name: str) -> Any:
    for part in name.split("."):
        given = given[part]
    return given
