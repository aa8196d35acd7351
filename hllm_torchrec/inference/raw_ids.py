"""Conversion of raw ids of items or users to dense ids and back, without a Python object per id.

Legend: N ids of the dataset (0 is unknown), n requested ids.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.common.yaml_files import abbreviate
from hllm_torchrec.store.keys import hash_keys


class RawIds:
    """Index of raw ids, sorted by hash: 16 bytes per id in addition to the texts.

    Args:
        raw: [N - 1] raw ids; entry i has the dense id i + 1.
    """

    def __init__(self, raw: pa.ChunkedArray) -> None:
        self._raw = pc.fill_null(raw.cast(pa.large_string()), "").combine_chunks()  # null: an erased id
        hashes = hash_keys(self._raw)
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]

    def find(self, raw_ids: Sequence[str]) -> Ints:
        """Dense ids int64 [n]; -1 for ids that are not in the dataset."""
        keys = pa.array(raw_ids, pa.large_string())
        hashes = hash_keys(keys)
        found = np.full(len(keys), -1, np.int64)
        at = np.searchsorted(self._hashes, hashes)
        open_rows = np.arange(len(keys))
        while open_rows.size:
            # Ids with equal hashes are neighbors. Nearly always there is only one, and the loop ends after one round.
            open_rows = open_rows[at[open_rows] < self._hashes.size]
            open_rows = open_rows[self._hashes[at[open_rows]] == hashes[open_rows]]
            rows = self._order[at[open_rows]]
            same = pc.equal(self._raw.take(pa.array(rows)), keys.take(pa.array(open_rows)))
            is_same = same.to_numpy(zero_copy_only=False)
            found[open_rows[is_same]] = rows[is_same] + 1
            open_rows = open_rows[~is_same]
            at[open_rows] += 1
        found[np.array([not text for text in raw_ids], bool)] = -1
        return found

    def raw(self, ids: Ints) -> list[str]:
        """Raw ids of dense ids [n], which are at least 1."""
        texts: list[str] = self._raw.take(pa.array(ids - 1)).to_pylist()
        return texts


def raw_texts(values: Any, what: str) -> list[str] | None:
    """The raw ids in `values` if they are texts; None if `values` is empty or has integers, which are dense ids.

    Texts and integers cannot be mixed, and are not converted: "242" is a raw id, 242 is a dense id.

    Raises:
        ValueError: `values` has values of another type, or of both types.
    """
    if isinstance(values, np.ndarray) and values.dtype.kind in "iu":
        return None
    listed = values.to_pylist() if isinstance(values, pa.Array | pa.ChunkedArray) else list(values)
    if all(isinstance(value, str) for value in listed):
        return [str(value) for value in listed] if listed else None
    wrong = next(
        (row for row, value in enumerate(listed) if isinstance(value, bool) or not isinstance(value, int | np.integer)),
        None,
    )
    if wrong is None:
        return None
    raise ValueError(
        f"{what}, entry {wrong}: {abbreviate(listed[wrong])}: ids are either all raw ids (texts, as in the source) or "
        "all dense ids of the dataset (whole numbers)"
    )
