"""Types of numpy arrays, as annotations name them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
AnyFloats = NDArray[np.floating[Any]]
"""Of either: what numpy's means and quotients are to the type check."""
