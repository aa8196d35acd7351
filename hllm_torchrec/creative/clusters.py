"""`Clusters`: clusters of users, the cluster of every user, and one vector per cluster that represents its users.

    <output>/clusters.json   model of the vectors, settings of the fit, cluster sizes, SHA-256 of the other files
    <output>/centers.npz     mean, scale [D] and fitted [K, D] for the assignment; centers [K, D] for prompts
    <output>/users.arrow     raw_user_id, cluster and distance of each user, sorted by the hash of the id
    <output>/hashes.npy      the sorted hashes

A user with the vector u is assigned to the cluster with the nearest fitted center, in the space in which k-means was
fitted:

    x = (u - mean) / scale  (metric cosine: then divided by |x|)        cluster = argmin_k |x - fitted_k|^2

scale is the standard deviation of each dimension for the metric standardized, and 1 for the other metrics.
The same function assigns users who came after the fit. The prompt of a cluster's titles reads `centers`, which are in
the space of u: the mean of the users' vectors, or the vector of the user nearest to the fitted center (the medoid).

Legend: n users, D width of their vectors, K clusters.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa

from hllm_torchrec.common.arrays import Doubles, Floats, Ints
from hllm_torchrec.common.atomic_files import atomic_folder
from hllm_torchrec.common.hashing import hash_file
from hllm_torchrec.creative.mapped_table import RawIndex, check_files, read_hashes, read_mapped, write_mapped
from hllm_torchrec.data.validation import error_location
from hllm_torchrec.store.files import read_manifest

FILE, _CENTERS, _USERS, _HASHES = "clusters.json", "centers.npz", "users.arrow", "hashes.npy"
_ARRAYS = ("mean", "scale", "fitted", "centers")
_FORMAT = 1
_REMEDY = "remove the folder and make the clusters again (hllm cluster)"
SCHEMA = pa.schema(
    [
        pa.field("raw_user_id", pa.large_string()),
        pa.field("cluster", pa.int32()),
        pa.field("distance", pa.float32()),
    ]
)
NO_CLUSTER = -1
"""Cluster number of a user who is not in a cluster, and of the null title."""
Metric = Literal["euclidean", "standardized", "cosine"]


@dataclass(frozen=True)
class Centers:
    """Result of a fit: its metric, and the float32 arrays that the module docstring describes."""

    metric: Metric
    mean: Floats
    scale: Floats
    fitted: Floats
    centers: Floats

    def space(self, vectors: Floats) -> Doubles:
        """Map user vectors [n, D] to the space of the fit: x [n, D] of the module docstring."""
        x = (vectors.astype(np.float64) - self.mean) / self.scale
        if self.metric == "cosine":
            x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        return x

    def assign(self, vectors: Floats) -> tuple[Ints, Doubles]:
        """Return the cluster [n] and the distance to its fitted center [n] of user vectors [n, D]."""
        return nearest(self.space(vectors), self.fitted)


def nearest(x: Doubles, fitted: Floats) -> tuple[Ints, Doubles]:
    """Return the index of the nearest row of `fitted` [K, D] for each row of x [n, D], and the distance to it.

    Of several rows at the same distance the first is returned.
    """
    centers = fitted.astype(np.float64)
    squares = (centers**2).sum(1) - 2 * x @ centers.T
    found = squares.argmin(1)
    # Computed from the difference: `squares` would lose the digits of small distances by cancellation.
    distance: Doubles = np.linalg.norm(x - centers[found], axis=1)
    return found, distance


class Clusters:
    """Clusters of users that `hllm cluster` wrote to a folder; opened by `open`.

    path: the folder; facts: contents of clusters.json; centers: see `Centers`; users: columns of users.arrow; hashes:
    uint64 [n] sorted hashes of the users' ids.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], centers: Centers, users: dict[str, pa.Array]) -> None:
        self.path, self.facts, self.centers, self.users = path, facts, centers, users
        self._cluster = users["cluster"].to_numpy()
        self.hashes = read_hashes(path / _HASHES, len(self._cluster), _REMEDY)
        self._index = RawIndex(self.hashes, users["raw_user_id"])

    def __len__(self) -> int:
        return len(self.centers.centers)

    @classmethod
    def open(cls, path: Path) -> "Clusters":
        """Open the clusters in a folder.

        Raises:
            ValueError: the folder holds no clusters, or a file is damaged.
        """
        file = path / FILE
        if not file.is_file():
            raise ValueError(
                f"{path}: no clusters of users (no {FILE}): choose their folder, or make them with `hllm cluster`"
            )
        with error_location(file, _REMEDY):
            facts = _checked(json.loads(file.read_text(encoding="utf-8")))
        check_files(path, facts["files"], _REMEDY)
        with error_location(path / _CENTERS, _REMEDY), np.load(path / _CENTERS) as arrays:
            centers = Centers(facts["settings"]["metric"], *(arrays[name] for name in _ARRAYS))
            clusters, width = centers.centers.shape
            shapes = [(width,), (width,), (clusters, width), (clusters, width)]
            found_arrays = [getattr(centers, name) for name in _ARRAYS]
            if [one.shape for one in found_arrays] != shapes or not clusters:
                raise ValueError("the arrays are of different shapes")
            if not all(np.isfinite(one).all() for one in found_arrays) or (centers.scale <= 0).any():
                raise ValueError("a number is not finite, or a scale is not positive")
        found = cls(path, facts, centers, read_mapped(path / _USERS, SCHEMA, _REMEDY))
        with error_location(path / _USERS, _REMEDY):
            own = found.users["cluster"].to_numpy()
            if own.size and not (0 <= own.min() and own.max() < clusters):
                raise ValueError("a user is in a cluster that does not exist")
        return found

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the centers. A new fit changes it; an assignment of users does not."""
        return str(self.facts["files"][_CENTERS])

    @property
    def sizes(self) -> Ints:
        """Number of users of each cluster, [K]."""
        return np.bincount(self._cluster, minlength=len(self))

    @property
    def is_behind(self) -> bool:
        """True if the store of user vectors has a newer version than the one whose users were assigned.

        False if the store no longer exists at the recorded path.
        """
        path = Path(self.facts["users"]["path"])
        return (path / "store.json").is_file() and read_manifest(path).version > self.facts["users"]["version"]

    def of(self, raw_user_id: str) -> int:
        """Return the cluster of a user, or NO_CLUSTER for an unknown user."""
        row = self._index.find(raw_user_id)
        return NO_CLUSTER if row < 0 else int(self._cluster[row])


def _checked(facts: Any) -> dict[str, Any]:
    """Check the entries of clusters.json that are used, and return its contents. Any exception means damage."""
    if facts["format"] != _FORMAT:
        raise ValueError(f"its format is {facts['format']}, this version reads {_FORMAT}")
    settings, users = dict(facts["settings"]), dict(facts["users"])
    if settings["metric"] not in get_args(Metric):
        raise ValueError(f"no metric {settings['metric']!r}")
    numbers = (users["version"], settings["least"], facts["mean_distance"], facts["fitted"]["mean_distance"])
    if not all(isinstance(one, int | float) for one in numbers) or not isinstance(users["path"], str):
        raise ValueError("an entry has the wrong type")
    if not all(isinstance(one, str) for one in facts.get("medoids", [])):
        raise ValueError("the id of a medoid is not a text")
    files = {name: facts["files"][name] for name in (_CENTERS, _USERS, _HASHES)}
    return {**facts, "source": dict(facts["source"]), "settings": settings, "users": users, "files": files}


def write_clusters(
    path: Path, facts: Mapping[str, Any], centers: Centers, users: pa.Table, hashes: np.ndarray
) -> Clusters:
    """Write clusters to a folder in one atomic step, and open them. Earlier clusters in the folder are replaced.

    Args:
        facts: further entries of clusters.json.
        users: table with the columns `SCHEMA`, sorted by the hashes of the ids.
        hashes: uint64 [n], the sorted hashes.
    """
    with atomic_folder(path, replace=True, marker=FILE) as folder:
        arrays: dict[str, Any] = {name: getattr(centers, name) for name in _ARRAYS}
        np.savez(folder / _CENTERS, **arrays)
        write_mapped(folder / _USERS, users)
        np.save(folder / _HASHES, hashes)
        files = {name: hash_file(folder / name) for name in (_CENTERS, _USERS, _HASHES)}
        sizes = np.bincount(users["cluster"].to_numpy(), minlength=len(centers.centers)).tolist()
        text = json.dumps({**facts, "format": _FORMAT, "sizes": sizes, "files": files}, indent=1)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")
    return Clusters.open(path)
