"""Index arithmetic for jagged numpy arrays (rows of unequal length, concatenated); `modules.jagged` is for tensors.

Legend: n rows, T entries of all rows.
"""

import numpy as np
from numpy.typing import ArrayLike

from hllm_torchrec.common.arrays import Ints


def offsets_from_lengths(lengths: ArrayLike) -> Ints:
    """Offsets [n + 1] int64 from lengths [n]: the start of each row (the first is 0), then the end of the last row."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def concat_ranges(starts: Ints, lengths: Ints) -> Ints:
    """[T] the concatenation of the ranges starts[i], ..., starts[i] + lengths[i] - 1 of all rows i."""
    offsets = offsets_from_lengths(lengths)
    # arange is the index in the output: add to each row the difference between its start and its offset in the output.
    return np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
