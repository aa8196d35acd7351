"""How tests run what is under scripts/, which is no package."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def bench_module(name: str) -> ModuleType:
    """A script's module; it finds others beside itself, as when it is run."""
    folder = str(next(SCRIPTS.rglob(f"{name}.py")).parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)


def tiny_result(name: str, out: Path, stdout: str) -> dict[str, Any]:
    """The object on the last line of what a bench printed with `--tiny`; checks what all benches share."""
    result: dict[str, Any] = json.loads(stdout.splitlines()[-1])
    assert json.loads(out.read_text()) == result
    assert result["bench"] == name and result["mode"] == "tiny"
    assert {"ratios", "shapes", "versions", "commit", "machine", "threads"} <= set(result)
    assert result["matmul_peak"] > 0
    return result
