"""A 64-bit hash of rows of integers, the same in every process."""

import numpy as np


def hash_columns(*columns: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each row of int64 columns [n], uint64 [n] (splitmix64)."""
    state = np.zeros(len(columns[0]), dtype=np.uint64)
    for column in columns:
        state = (state ^ column.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return state
