"""Rows of unequal length, one after the other in numpy arrays; `modules.jagged` has the same for tensors.

Legend: n rows, T entries of all rows.
"""

import numpy as np
from numpy.typing import ArrayLike

from hllm_torchrec.common.arrays import Ints


def offsets_from_lengths(lengths: ArrayLike) -> Ints:
    """Where each row starts and the last one ends, [n + 1], from 0."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def concat_ranges(starts: Ints, lengths: Ints) -> Ints:
    """[T] starts[0], starts[0] + 1, ... for so long as lengths[0] says, then the same of the next."""
    offsets = offsets_from_lengths(lengths)
    return np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
