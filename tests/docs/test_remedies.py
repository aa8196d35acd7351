"""What messages tell people to do can be done: commands, options, settings with their values, and extras exist."""

import re
import typing
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from hllm_torchrec.baselines.settings import RetrievalBaselinesConfig
from hllm_torchrec.config.checking import dotted_fields
from hllm_torchrec.config.schema import Config, StageConfig
from hllm_torchrec.downstream.dlrm_config import DownstreamConfig
from hllm_torchrec.launch.cli import COMMANDS
from tests.docs.messages import ROOT, messages
from tests.docs.test_pages import options

COMMAND = re.compile(r"\bhllm ([a-z][\w-]+)((?: +(?:--?[a-z][\w.-]*|\[?[^\s`,;:()]+))*)")
OPTION = re.compile(r"(?<![\w-])(--[a-z][a-z0-9_.-]*[a-z0-9])")
OTHER_PROGRAMS = re.compile(r"torchrun|torchx|install\.sh|vllm serve")
SETTING = re.compile(r"\b([a-z_]+(?:\.[a-z_]+)+)(?:: ([a-z_]+)\b)?")


@cache
def settings() -> dict[str, Any]:
    """Dotted names of all settings of all jobs, and their types."""
    found: dict[str, Any] = {}
    for cls in (Config, DownstreamConfig, RetrievalBaselinesConfig):
        found |= dotted_fields(cls)
    return found | {f"stages.{name}": kind for name, kind in dotted_fields(StageConfig).items()}


@cache
def all_options() -> frozenset[str]:
    return frozenset().union(*(options(name) for name in COMMANDS), (f"--{name}" for name in settings()))


def takes_any_name(kind: Any) -> bool:
    """True for a mapping, or a mapping or None."""
    return any(typing.get_origin(part) is dict for part in (kind, *typing.get_args(kind)))


def problems(text: str) -> Iterator[str]:
    """Remedies in a sentence that do not exist."""
    if " " not in text:
        return
    for name, rest in COMMAND.findall(text):
        if name not in COMMANDS:
            yield f"hllm {name}: no such command"
            continue
        yield from (f"hllm {name} has no {option}" for option in OPTION.findall(rest) if option not in options(name))
    if not OTHER_PROGRAMS.search(text):
        yield from (f"no command has {option}" for option in OPTION.findall(text) if option not in all_options())
    sections = {name.partition(".")[0] for name in settings() if "." in name}
    for name, value in SETTING.findall(text):
        if name.partition(".")[0] not in sections:
            continue
        above = name.rpartition(".")[0]
        kind = settings().get(name)
        if kind is None and not takes_any_name(settings().get(above)):
            yield f"no setting {name}"
        choices = [part for part in typing.get_args(kind) if isinstance(part, str)]
        if value and choices and value not in choices:
            yield f"{name} is never {value}"
    for extra in re.findall(r"hllm_torchrec\[([a-z0-9]+)\]", text):
        if f'"{extra}":' not in (ROOT / "setup.py").read_text():
            yield f"no extra {extra}"


@pytest.mark.parametrize(
    "text",
    [
        "make one with `hllm prepair`",
        "use hllm store export --parqet DIR",
        "leave --no-such-option out",
        "set optim.clip_nrom above 0",
        "start again (reliability.no_checkpoint_left: start)",
        "pip install 'hllm_torchrec[s4]'",
    ],
)
def test_the_search_finds_what_it_is_for(text: str) -> None:
    assert list(problems(text))


@pytest.mark.slow
def test_every_remedy_exists() -> None:
    found = list(messages())
    assert len(found) > 3000
    assert [f"{place}: {problem}" for place, text in found for problem in problems(text)] == []
