"""`Clusters`: which kind of user a user is, and the vector that stands for each kind.

    <output>/clusters.json   origin, settings, sizes, drift, hashes of the files
    <output>/centers.npz     mean [D], fitted [K, D] in the space of the fit, centers [K, D] in that of the vectors
    <output>/users.arrow     raw_user_id, cluster, distance of each user, in the order of the ids' hashes
    <output>/hashes.npy      these hashes

A user belongs to the nearest fitted center, by the function that the fit minimizes:

    x = u - mean  (cosine: divided by its length)        cluster = argmin_k |x - fitted_k|^2

So `assign` also places users who came after the fit. Only `centers` enter prompts: each is the mean of its users'
vectors, or the vector of the user who is nearest to the fitted center (a medoid, which the model has seen).

Legend: n users, D width of their vectors, K clusters.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from hllm_torchrec.common.arrays import Doubles, Floats, Ints
from hllm_torchrec.common.atomic_files import atomic_folder
from hllm_torchrec.common.hashing import hash_file
from hllm_torchrec.creative.mapped_table import RawIndex, check_files, read_hashes, read_mapped, write_mapped
from hllm_torchrec.data.validation import error_location
from hllm_torchrec.store.files import read_manifest

FILE, _CENTERS, _USERS, _HASHES = "clusters.json", "centers.npz", "users.arrow", "hashes.npy"
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
"""Cluster of an unknown user."""
Metric = Literal["euclidean", "cosine"]


@dataclass(frozen=True)
class Centers:
    """What decides: arrays as in the module docstring, float32, and the metric."""

    metric: Metric
    mean: Floats
    fitted: Floats
    centers: Floats

    def space(self, vectors: Floats) -> Doubles:
        """x of vectors [n, D]."""
        x = vectors.astype(np.float64) - self.mean
        if self.metric == "cosine":
            x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        return x

    def assign(self, vectors: Floats) -> tuple[Ints, Doubles]:
        """Cluster [n] and distance [n] of vectors [n, D]; of equally near centers the first."""
        return nearest(self.space(vectors), self.fitted)


def nearest(x: Doubles, fitted: Floats) -> tuple[Ints, Doubles]:
    """Index [n] of the nearest of `fitted` [K, D] to each of x [n, D], and the distance."""
    centers = fitted.astype(np.float64)
    squares = (centers**2).sum(1) - 2 * x @ centers.T
    found = squares.argmin(1)
    distance: Doubles = np.linalg.norm(x - centers[found], axis=1)  # not by `squares`, which cancel
    return found, distance


class Clusters:
    """Clusters in a folder; see `open`."""

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
            ValueError: there are none, or they are damaged.
        """
        file = path / FILE
        if not file.is_file():
            raise ValueError(f"{path}: no clusters of users (no {FILE}); make them with `hllm cluster`")
        with error_location(file, _REMEDY):
            facts = _checked(json.loads(file.read_text(encoding="utf-8")))
        check_files(path, facts["files"], _REMEDY)
        with error_location(path / _CENTERS, _REMEDY), np.load(path / _CENTERS) as arrays:
            centers = Centers(facts["settings"]["metric"], *(arrays[name] for name in ("mean", "fitted", "centers")))
            clusters, width = centers.centers.shape
            if centers.fitted.shape != (clusters, width) or centers.mean.shape != (width,) or not clusters:
                raise ValueError("the arrays are of different shapes")
            if not all(np.isfinite(one).all() for one in (centers.mean, centers.fitted, centers.centers)):
                raise ValueError("a center is no number")
        found = cls(path, facts, centers, read_mapped(path / _USERS, SCHEMA, _REMEDY))
        with error_location(path / _USERS, _REMEDY):
            own = found.users["cluster"].to_numpy()
            if own.size and not (0 <= own.min() and own.max() < clusters):
                raise ValueError("a user is in a cluster that there is not")
        return found

    @property
    def fingerprint(self) -> str:
        """Hash of the centers: another fit has another one, an assignment of further users has not."""
        return str(self.facts["files"][_CENTERS])

    @property
    def sizes(self) -> Ints:
        """[K] users of each cluster."""
        return np.bincount(self._cluster, minlength=len(self))

    @property
    def is_behind(self) -> bool:
        """True if the store of the users has changed since; False if it is not where it was."""
        path = Path(self.facts["users"]["path"])
        return (path / "store.json").is_file() and read_manifest(path).version > self.facts["users"]["version"]

    def of(self, raw_user_id: str) -> int:
        """Cluster of a user; NO_CLUSTER for one who is not known."""
        row = self._index.find(raw_user_id)
        return NO_CLUSTER if row < 0 else int(self._cluster[row])


def _checked(facts: Any) -> dict[str, Any]:
    """The facts, if everything that is read of them is there; any error says that it is not."""
    if facts["format"] != _FORMAT:
        raise ValueError(f"its format is {facts['format']}, this version reads {_FORMAT}")
    settings, users = dict(facts["settings"]), dict(facts["users"])
    if settings["metric"] not in ("euclidean", "cosine"):
        raise ValueError(f"no metric {settings['metric']!r}")
    numbers = (users["version"], settings["least"], facts["mean_distance"], facts["fitted"]["mean_distance"])
    if not all(isinstance(one, int | float) for one in numbers) or not isinstance(users["path"], str):
        raise ValueError("a number or a path is none")
    if not all(isinstance(one, str) for one in facts.get("medoids", [])):
        raise ValueError("a medoid is no id")
    files = {name: facts["files"][name] for name in (_CENTERS, _USERS, _HASHES)}
    return {**facts, "source": dict(facts["source"]), "settings": settings, "users": users, "files": files}


def write_clusters(
    path: Path, facts: Mapping[str, Any], centers: Centers, users: pa.Table, hashes: np.ndarray
) -> Clusters:
    """Write the clusters of users [n], given in the order of their `hashes`, in one step; replaces earlier ones."""
    with atomic_folder(path, replace=True, marker=FILE) as folder:
        np.savez(folder / _CENTERS, mean=centers.mean, fitted=centers.fitted, centers=centers.centers)
        write_mapped(folder / _USERS, users)
        np.save(folder / _HASHES, hashes)
        files = {name: hash_file(folder / name) for name in (_CENTERS, _USERS, _HASHES)}
        sizes = np.bincount(users["cluster"].to_numpy(), minlength=len(centers.centers)).tolist()
        text = json.dumps({**facts, "format": _FORMAT, "sizes": sizes, "files": files}, indent=1)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")
    return Clusters.open(path)
