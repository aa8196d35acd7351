"""Cache of the results of `backbone_check` on this host, because comparing small models takes seconds.

A result is valid for the same config, the same versions of transformers and torch, and the same code of this library's
modules and checks.
"""

import functools
import json
from pathlib import Path
from typing import Any

import torch

import hllm_torchrec.models
import hllm_torchrec.modules
from hllm_torchrec.common.atomic_files import replace_file
from hllm_torchrec.common.hashing import hash_json, hash_texts
from hllm_torchrec.common.urls import cache_folder

FILES = ("backbone_check.py", "small_models.py", "check_cache.py")


def kept_result(check: str, *facts: Any) -> Any:
    """Cached JSON value of a check that passed earlier for these facts (config, direction), or None."""
    try:
        return json.loads(_path(check, facts).read_text())
    except (OSError, ValueError):  # missing, unreadable or incomplete: the check is repeated
        return None


def keep_result(value: Any, check: str, *facts: Any) -> None:
    """Store the value (not None) of a check that passed; has no effect if the cache cannot be written."""
    path = _path(check, facts)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(value))
    except OSError:
        return


def _path(check: str, facts: tuple[Any, ...]) -> Path:
    return cache_folder("checks of models") / f"{hash_json([check, *facts, _code()])[:32]}.json"


@functools.cache
def _code() -> str:
    """Hash of the versions of transformers and torch and of the source code that a check depends on."""
    import transformers

    own = [Path(hllm_torchrec.models.__file__).parent / name for name in FILES]
    own += sorted(Path(hllm_torchrec.modules.__file__).parent.rglob("*.py"))
    return hash_texts([transformers.__version__, torch.__version__, *(file.read_text() for file in own)])
