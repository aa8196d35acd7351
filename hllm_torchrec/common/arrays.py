"""Type aliases of numpy arrays for annotations."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
AnyFloats = NDArray[np.floating[Any]]
"""Array of either float type; the static type of numpy's means and quotients."""
