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


@cache
def messages(*, with_help: bool = True) -> list[tuple[str, str]]:
    """(file:line, text) of every text in the source that is no documentation, with GAP for values."""
    return list(_messages(with_help))


def _messages(with_help: bool) -> Iterator[tuple[str, str]]:
    for folder in FOLDERS:
        for file in sorted({*(ROOT / folder).rglob("*.py")} - {ROOT / "hllm_torchrec" / "_moved.py"}):
            tree = ast.parse(file.read_text())
            inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
            left_out = inside if with_help else inside | _help(tree)
            for node in ast.walk(tree):
                if id(node) in left_out:
                    continue
                place = f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
                if isinstance(node, ast.JoinedStr):
                    yield place, "".join(str(p.value) if isinstance(p, ast.Constant) else GAP for p in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    if id(node) not in _documentation(tree):
                        yield place, node.value


@cache
def _documentation(tree: ast.Module) -> frozenset[int]:
    """Texts that are statements: docstrings of modules, classes, functions and fields."""
    return frozenset(id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr))


def _help(tree: ast.Module) -> set[int]:
    """All nodes within arguments of `HELP`."""
    given = [node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg in HELP]
    return {id(part) for value in given for part in ast.walk(value)}
