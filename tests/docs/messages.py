"""The texts of the library's messages, found in its syntax trees."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

FOLDERS = ("hllm_torchrec", "launch", "modules")
ROOT = Path(__file__).parents[2]
GAP = "\N{WHITE SQUARE}"
"""Stands for a value that a message contains."""
HELP = ("help", "prog", "description", "epilog", "usage", "example")
"""Arguments that hold help, not messages."""


def messages(*, with_help: bool = True) -> list[tuple[str, str]]:
    """(file:line, text) of every text in the source that is no documentation, with GAP for values."""
    return [(place, text) for place, text, is_help in _texts() if with_help or not is_help]


@cache
def _texts() -> list[tuple[str, str, bool]]:
    """(file:line, text, whether it is help)."""
    return list(_found())


def _found() -> Iterator[tuple[str, str, bool]]:
    for folder in FOLDERS:
        for file in sorted({*(ROOT / folder).rglob("*.py")} - {ROOT / "hllm_torchrec" / "_moved.py"}):
            tree = ast.parse(file.read_text())
            nodes, of_help, documentation = list(ast.walk(tree)), _help(tree), _documentation(tree)
            inside = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
            for node in nodes:
                place = f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
                if isinstance(node, ast.JoinedStr):
                    parts = (str(p.value) if isinstance(p, ast.Constant) else GAP for p in node.values)
                    yield place, "".join(parts), id(node) in of_help
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    if id(node) not in inside and id(node) not in documentation:
                        yield place, node.value, id(node) in of_help


def _documentation(tree: ast.Module) -> frozenset[int]:
    """Texts that are statements: docstrings of modules, classes, functions and fields."""
    return frozenset(id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr))


def _help(tree: ast.Module) -> set[int]:
    """All nodes within arguments of `HELP`."""
    given = [node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg in HELP]
    return {id(part) for value in given for part in ast.walk(value)}
