"""Tombstones: number and digest of the raw id of each id that a dataset has forgotten.

With the digest, the hash chain of the id's map (`data.vocabulary`) can still be computed, so existing runs still fit
the dataset; and the raw id is recognized in a later source. The map `vectors/<name>` has the digests of the rows that
were erased from the files of item vectors.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.data.validation import error_location, read_table
from hllm_torchrec.data.vocabulary import id_digest

FORGOTTEN = "forgotten"
"""Field of a manifest: name of the file with the tombstones."""
FILE = "forgotten-{:05d}.parquet"
"""Name of the file with the tombstones of a version."""
USERS, ITEMS = "users", "items"
_SCHEMA = pa.schema([("map", pa.string()), ("number", pa.int64()), ("digest", pa.binary(16))])

Row = tuple[str, int, bytes]
"""(map, number, digest); the number is 0 if the version's tables do not have the id."""


@dataclass(frozen=True)
class Tombstones:
    """All tombstones of a version, without repetitions."""

    rows: tuple[Row, ...] = ()

    @classmethod
    def read(cls, root: Path, manifest: dict[str, Any]) -> "Tombstones":
        """Read the tombstones of a version; empty if its manifest names no file.

        Raises:
            ValueError: the file is missing or damaged.
        """
        name = manifest.get(FORGOTTEN)
        if name is None:
            return cls()
        with error_location(root / name):
            table = read_table(root / name).cast(_SCHEMA)
            return cls(tuple(zip(*(table[column].to_pylist() for column in _SCHEMA.names), strict=True)))

    def write(self, path: Path) -> None:
        """Write the tombstones to a Parquet file."""
        rows = [dict(zip(_SCHEMA.names, row, strict=True)) for row in self.rows]
        pq.write_table(pa.Table.from_pylist(rows, _SCHEMA), path)

    def __bool__(self) -> bool:
        return bool(self.rows)

    def with_rows(self, rows: Iterable[Row]) -> "Tombstones":
        """A copy with more rows."""
        return Tombstones(tuple(dict.fromkeys((*self.rows, *rows))))

    def without_numbers(self) -> "Tombstones":
        """The tombstones of users and items with number 0, for a dataset that assigns new numbers."""
        return Tombstones(tuple((name, 0, digest) for name, _, digest in self.rows if name in (USERS, ITEMS)))

    def numbers(self, name: str) -> Ints:
        """Ascending numbers, without 0, of the forgotten ids of a map."""
        return np.array(sorted(self._by_number.get(name, {})), np.int64)

    def digests(self, name: str) -> dict[int, bytes]:
        """Number -> digest of the forgotten ids of a map."""
        return self._by_number.get(name, {})

    def find(self, name: str, raw_id: str) -> int | None:
        """Number of a forgotten raw id (0: the version's tables do not have it); None if it is not forgotten."""
        return self._by_digest.get(name, {}).get(id_digest(raw_id))

    def mask(self, name: str, raw_ids: pa.ChunkedArray) -> np.ndarray:
        """Mask (bool [n]) of the raw ids that are forgotten."""
        known = self._by_digest.get(name)
        if not known or not len(raw_ids):
            return np.zeros(len(raw_ids), bool)
        encoded = raw_ids.combine_chunks().dictionary_encode()
        found = [value is not None and id_digest(value) in known for value in encoded.dictionary.to_pylist()]
        at = encoded.indices
        return np.array([*found, False])[at.fill_null(len(found)).to_numpy()]

    @cached_property
    def _by_number(self) -> dict[str, dict[int, bytes]]:
        found: dict[str, dict[int, bytes]] = {}
        for name, number, digest in self.rows:
            if number:
                found.setdefault(name, {})[number] = digest
        return found

    @cached_property
    def _by_digest(self) -> dict[str, dict[bytes, int]]:
        found: dict[str, dict[bytes, int]] = {}
        for name, number, digest in self.rows:
            if name in (USERS, ITEMS):
                found.setdefault(name, {})[digest] = number
        return found
