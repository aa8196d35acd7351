"""Marks of a dataset's id maps: short hashes that show whether a model's ids mean the same on another dataset.

A map is a list of ids in the order of their numbers: `items` and `users` (raw ids), `actions` (names),
`feature/<name>` (values) and `vectors/<name>` (rows of `<dataset>/vectors/<name>.npy`). A run's tables and weights are
indexed by these numbers, so a run fits a dataset exactly if each map of the run is a prefix of the dataset's. The hash
is a chain over digests of single ids,

    chain_0 = "",   chain_k = blake2b(chain_(k-1) + digest(id_k)),   digest(id) = blake2b(id),   16 bytes each,

so it can be continued when ids are appended, can be compared at any position, and can be computed for erased ids, of
which only the digest remains. A run stores marks, never raw ids.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from hllm_torchrec.data.dataset import Dataset

MOST_MARKS = 1024
"""Maximum number of positions of a map for which the chain's value is stored."""
_AT_ONCE = 1 << 16
_DIGEST = 16

Id = str | bytes
"""A raw id or a value (str), or the digest of an erased one (bytes, see `id_digest`)."""


@dataclass(frozen=True)
class IdMark:
    """Mark of an id map: length, value of the chain at the end, and values at up to MOST_MARKS positions.

    value: hexadecimal; values[j] is the value after (j + 1) * step ids; step is a power of two.
    """

    count: int = 0
    value: str = ""
    step: int = 1
    values: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """JSON value, for manifests and checkpoints."""
        return {"count": self.count, "value": self.value, "step": self.step, "values": list(self.values)}

    @classmethod
    def from_json(cls, mark: Mapping[str, Any]) -> "IdMark":
        """Inverse of `to_json`.

        Raises:
            ValueError: `mark` is not the value of a mark.
        """
        try:
            read = cls(mark["count"], mark["value"], mark["step"], tuple(mark["values"]))
            valid = all(len(bytes.fromhex(value)) == _DIGEST for value in (*read.values, read.value or "00" * _DIGEST))
            if not valid or read.count < 0 or read.step < 1 or len(read.values) != read.count // read.step:
                raise ValueError("its numbers contradict each other")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"damaged mark of a vocabulary ({type(error).__name__}: {error})") from None
        return read

    def positions(self) -> Iterator[tuple[int, str]]:
        """Yield (number of ids, value of the chain after them) of all stored values, in order; the end comes last."""
        for index, value in enumerate(self.values, start=1):
            if index * self.step < self.count:
                yield index * self.step, value
        yield self.count, self.value


@dataclass(frozen=True)
class IdDifference:
    """The first difference between two maps, which is among the ids at positions first..last - 1 (from 0)."""

    first: int
    last: int
    is_shorter: bool = False
    """True if the dataset's map is shorter than the run's, and no difference was found before its end."""


def id_digest(value: Id) -> bytes:
    """Digest of an id, 16 bytes; an id that is bytes is already a digest and is returned unchanged."""
    return value if isinstance(value, bytes) else blake2b(value.encode(), digest_size=_DIGEST).digest()


def mark_ids(ids: Iterable[Id], before: IdMark | None = None) -> IdMark:
    """Mark of the map `ids`; with `before`, mark of the map with the mark `before` followed by `ids`."""
    before = before or IdMark()
    count, chain, step, values = before.count, bytes.fromhex(before.value), before.step, list(before.values)
    for value in ids:
        chain = _link(chain, value)
        count += 1
        if count % step == 0:
            values.append(chain.hex())
            if len(values) > MOST_MARKS:
                # Keep every second value, which are the values at the multiples of the doubled step.
                step, values = 2 * step, values[1::2]
    return IdMark(count, chain.hex(), step, tuple(values))


def _link(chain: bytes, value: Id) -> bytes:
    return blake2b(chain + id_digest(value), digest_size=_DIGEST).digest()


def find_difference(run: IdMark, data: IdMark, ids: Callable[[int, int], Iterable[Id]]) -> IdDifference | None:
    """None if the run's map is a prefix of the dataset's, else the first difference, as precisely as the marks show it.

    Args:
        run: mark of the run's map.
        data: mark of the dataset's map.
        ids: function that returns the dataset's ids at positions start..stop - 1. If the run's map is a prefix, at most
            `data.step` ids are read.
    """
    if run.count <= data.count:
        start, value = max([(0, ""), *((p, v) for p, v in data.positions() if p <= run.count)])
        if mark_ids(ids(start, run.count), IdMark(start, value, step=MOST_MARKS * data.step)).value == run.value:
            return None
    agreed, chain = 0, b""
    for position, value in run.positions():
        if position > data.count:
            break
        for one in ids(agreed, position):
            chain = _link(chain, one)
        if chain.hex() != value:
            return IdDifference(agreed, position)
        agreed = position
    return IdDifference(data.count, run.count, is_shorter=True)


# ---------------------------------------------------------------------- of a dataset


def dataset_marks(dataset: "Dataset") -> dict[str, IdMark]:
    """Mark of each map that `prepare` writes; computed from the ids if the manifest has none.

    `vectors/<name>` is not included, because these files are written by the user; see `vector_mark`.
    """
    if "vocabulary" in dataset.manifest:
        return {name: IdMark.from_json(mark) for name, mark in dataset.manifest["vocabulary"].items()}
    return compute_marks(dataset)


def compute_marks(dataset: "Dataset") -> dict[str, IdMark]:
    """Mark of each map that `prepare` writes, computed from all ids (about 2 seconds for a million ids)."""
    features = dataset.all_features
    names = ["items", "users", "actions", *(f"feature/{name}" for name in features)]
    return {name: mark_ids(map_ids(dataset, name)) for name in names}


def vector_mark(vectors: np.ndarray, erased: Mapping[int, bytes] | None = None) -> IdMark:
    """Mark of dense item features, float32 [N, V]; the ids of the map are the rows. erased: see `row_digests`."""
    return mark_ids(row_digests(vectors, erased=erased))


def row_digests(
    vectors: np.ndarray, start: int = 0, stop: int | None = None, *, erased: Mapping[int, bytes] | None = None
) -> Iterator[bytes]:
    """Digests of rows start..stop - 1 (None: to the end) of dense item features, float32 [N, V].

    erased: row -> original digest, for rows that were erased.
    """
    for number, row in enumerate(np.ascontiguousarray(vectors[start:stop], np.float32), start):
        kept = (erased or {}).get(number)
        yield blake2b(row.tobytes(), digest_size=_DIGEST).digest() if kept is None else kept


def map_ids(dataset: "Dataset", name: str, start: int = 0, stop: int | None = None) -> Iterator[Id]:
    """Yield the ids at positions start..stop - 1 (None: to the end) of a dataset's map; forgotten ids as digests.

    Raises:
        ValueError: the dataset has no such map.
    """
    if name == "actions":
        names = dataset.manifest["actions"]["names"]
        numbers = range(1, dataset.num_actions)  # action 0 is the unknown action
        yield from itertools.islice((names.get(str(number), "") for number in numbers), start, stop)
        return
    if name in ("items", "users"):
        column = (dataset.items if name == "items" else dataset.users)[f"raw_{name[:-1]}_id"]
    else:
        column = dataset.feature_values(name.removeprefix("feature/"))
    column = column.slice(start, len(column) if stop is None else stop - start)
    erased = dataset.tombstones.digests(name) if column.null_count else {}
    for first in range(0, len(column), _AT_ONCE):
        for number, value in enumerate(column.slice(first, _AT_ONCE).to_pylist(), start + first + 1):
            yield erased[number] if value is None else value


def map_problems(run: Mapping[str, IdMark], dataset: "Dataset", names: Iterable[str]) -> list[str]:
    """One message for each map of a run ("there") that is not a prefix of the dataset's map ("here").

    names: maps to compare, except `vectors/<name>`; maps of which the run has no mark are skipped.
    """
    marks, problems = dataset_marks(dataset), []
    for name in names:
        if name not in run:
            continue
        data = marks.get(name, IdMark())
        difference = find_difference(run[name], data, partial(map_ids, dataset, name))
        if difference is not None:
            problems.append(_describe(dataset, name, run[name], data, difference))
    return problems


def _describe(dataset: "Dataset", name: str, run: IdMark, data: IdMark, found: IdDifference) -> str:
    """Describe a difference; numbers count from 1, as in the tables."""
    if found.is_shorter:
        return f"{name}: {data.count} here, {run.count} there"
    if found.last - found.first > 1:
        return f"{name}: the first other one is between numbers {found.first + 1} and {found.last}"
    here = next(iter(map_ids(dataset, name, found.first, found.last)))
    return f"{name}: number {found.last} is {here!r} here and another one there"
