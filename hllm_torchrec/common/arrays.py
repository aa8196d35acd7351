"""Type aliases of numpy arrays for annotations, and files of named arrays."""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
AnyFloats = NDArray[np.floating[Any]]
"""Array of either float type; the static type of numpy's means and quotients."""


def save_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write named arrays and numbers atomically to the .npz file `path`; its folder is created if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(4)}-{path.name}")  # renamed only when complete
    np.savez(temporary, **arrays)
    temporary.replace(path)
