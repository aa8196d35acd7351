"""Links, anchors, command lines, the site's list of pages and its references point at what is there."""

import argparse
import importlib
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

from hllm_torchrec.config.checking import dotted_fields
from hllm_torchrec.launch.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + list((ROOT / "docs").rglob("*.md"))
)
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
MEANT_TO_FAIL = re.compile(r"^<!-- fails -->\n```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!`)\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)$", re.MULTILINE)

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def prose(page: Path) -> str:
    """A page without its code blocks and comments."""
    return COMMENT.sub("", FENCED.sub("", page.read_text(encoding="utf-8")))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    words = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", text.strip().lower())) for text in words}


def targets(page: Path) -> Iterator[str]:
    """What a page links to, other sites aside."""
    for found in LINK.finditer(prose(page)):
        target = found[1] or found[2]
        if not re.match(r"[a-z]+:", target):
            yield target


def test_the_table_of_places_names_files_and_what_is_in_them() -> None:
    """In a row of "Where is ...?", a file without a folder is in the folder of the file before it."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| (`.*?) \| (.*?) \|$", page.split("## Where is")[1].split("\n## ")[0], re.MULTILINE)
    assert len(rows) > 60
    for topic, files, names in rows:
        folder, text = ROOT, ""
        for name in re.findall(r"`([\w/]+(?:\.py|/))`", f"{files} {names}"):
            place = next((p for p in (ROOT / "hllm_torchrec" / name, ROOT / name, folder / name) if p.exists()), None)
            assert place is not None, f"{topic}: there is no {name}"
            folder = place if place.is_dir() else place.parent
            text += "".join(
                file.read_text(encoding="utf-8") for file in (place.rglob("*.py") if place.is_dir() else [place])
            )
        for name in re.findall(r"`(?:\w+\.)*(\w+)`", re.sub(r"`[\w/]+\.py`", "", names)):
            assert re.search(rf"(def|class) {name}\b|^ *{name}\b *[:=]", text, re.MULTILINE), f"{topic}: {name}"


@every_page
def test_every_link_and_anchor_is_there(page: Path) -> None:
    for target in targets(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: ({target}): there is no {file}"
        if anchor:
            assert anchor in anchors(file), (
                f"{page.name}: ({target}): no such heading; there are {sorted(anchors(file))}"
            )


def command_lines(page: Path) -> Iterator[list[str]]:
    """Every `hllm ...` of a page: lines of fenced and indented blocks, whole, and code in the text."""
    text = MEANT_TO_FAIL.sub("", page.read_text(encoding="utf-8"))
    joined = COMMENT.sub("", text).replace("\\\n", " ")
    for line in joined.splitlines():
        # of a block, perhaps behind a prompt of the environment; a comment ends it
        if found := re.match(r"\s*(hllm [a-z-]+(?:\s.*)?)$", line):
            yield words(found[1])
        yield from (words(code) for code in re.findall(r"`(hllm [^`]+)`", line))


def words(line: str) -> list[str]:
    """A command line's words without `hllm`; what bash would do with braces and quotes aside."""
    return shlex.split(line.split(" #")[0].replace("'", '"'))[1:]


@every_page
def test_every_command_line_has_a_subcommand_and_options_that_there_are(page: Path) -> None:
    if page.name == "CHANGELOG.md":
        return  # what there was then
    for line in command_lines(page):
        name, given = line[0], line[1:]
        if not re.fullmatch(r"[a-z][a-z-]+", name):
            assert name in ("...", "SUBCOMMAND", "--help", "{"), line
            continue
        assert name in COMMANDS, f"{page.name}: hllm {' '.join(line)}: there is no subcommand {name!r}"
        for option in (word.split("=")[0] for word in given if re.match(r"--[a-z]", word)):
            assert option in options(name), f"{page.name}: hllm {' '.join(line)}: {name} has no option {option}"


@cache
def options(name: str) -> frozenset[str]:
    """Every option of a subcommand, those of configurations that it takes included."""
    module = importlib.import_module(f"hllm_torchrec.launch.{name.replace('-', '_')}")
    found = {"--help", "--config", "--print_config"}
    if hasattr(module, "build_parser"):
        found = {"--help", *parser_options(module.build_parser())}
    for kind in configurations(name):
        found.add("--print_config")
        found |= {f"--{field}" for field in dotted_fields(kind)}
    if name in ("fetch", "report"):  # whose parsers are made where they are used
        found |= set(re.findall(r'"(--[a-z-]+)"', Path(module.__file__ or "").read_text(encoding="utf-8")))
    return frozenset(found)


def parser_options(parser: argparse.ArgumentParser) -> set[str]:
    """Those of its subparsers too."""
    found: set[str] = set()
    for action in parser._actions:
        found |= set(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            found |= {option for sub in action.choices.values() for option in parser_options(sub)}
    return found


def configurations(name: str) -> list[type]:
    """The dataclasses whose fields are options of a subcommand."""
    from hllm_torchrec.baselines.settings import BaselinesConfig
    from hllm_torchrec.config.schema import Config
    from hllm_torchrec.downstream.dlrm_config import DownstreamConfig
    from hllm_torchrec.lifecycle.night_config import NightConfig

    kinds = {"train": Config, "plan": Config, "baselines": BaselinesConfig, "downstream": DownstreamConfig}
    kinds["nightly"] = NightConfig
    return [kinds[name]] if name in kinds else []


def test_the_site_lists_every_page() -> None:
    class Loader(yaml.SafeLoader):
        """Reads mkdocs.yml's own tags as nothing."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    site = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)
    listed = re.findall(r"[\w/]+\.md", str(site["nav"]))
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert set(listed) == there | {"changelog.md", "contributing.md"} and len(listed) == len(set(listed))


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "api").glob("*.md")), ids=lambda page: page.stem)
def test_the_reference_names_what_there_is(page: Path) -> None:
    names = re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert names
    for name in names:
        assert find(name) is not None, name


def find(name: str) -> object:
    """The module, or the part of one, of a dotted name; None if there is none."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, last = name.rpartition(".")
        return getattr(importlib.import_module(module), last, None)


@every_page
def test_what_the_python_blocks_import_is_there(page: Path) -> None:
    if page.name == "CHANGELOG.md":
        return
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for module, names in re.findall(r"^\s*from (hllm_torchrec[\w.]*) import ([\w, ]+)$", block, re.MULTILINE):
            found = importlib.import_module(module)
            for name in names.split(", "):
                assert hasattr(found, name), f"{page.name}: {module} has no {name}"
