"""Arrays of a run, such as item factors: loading from an .npz file in the run directory, and fingerprints."""

from collections.abc import Callable, Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from hllm_torchrec.data.validation import error_location

T = TypeVar("T")


def load_run_arrays(path: Path, build: Callable[[Mapping[str, Any]], T]) -> T | None:
    """Call `build` with the named arrays in `path` and return its result; None if there is no such file.

    Raises:
        ValueError: the file is damaged, or lacks an array.
    """
    if not path.is_file():
        return None
    with error_location(path, "restore it from a copy of the run"), np.load(path, allow_pickle=False) as saved:
        return build(saved)


def hash_arrays(arrays: Iterable[Any]) -> str:
    """Hash of arrays and numbers in their order, 32 hexadecimal digits."""
    digest = blake2b(digest_size=16)
    for value in arrays:
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()
