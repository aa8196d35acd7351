"""k-means on the user vectors of a store, and the assignment of users to the fitted clusters.

A fit reads at most SAMPLE users: mini-batch k-means first, then a few iterations of Lloyd's algorithm on the whole
sample, in which centers without users are moved to the farthest users. Then all users of the store are assigned. While
the smallest cluster has fewer than `least` users, its center is removed and its users are assigned to the nearest
remaining center. Every user is therefore in the cluster of the nearest center.

Legend: n users, D width of their vectors, K clusters.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from hllm_torchrec.common.arrays import Doubles, Floats, Ints
from hllm_torchrec.common.hashing import hash_json
from hllm_torchrec.creative.clusters import (
    FILE,
    NO_CLUSTER,
    SCHEMA,
    Centers,
    Clusters,
    Metric,
    nearest,
    write_clusters,
)
from hllm_torchrec.creative.mapped_table import hash_order
from hllm_torchrec.store.store import EmbeddingStore

SAMPLE = 131_072
"""Maximum number of users that a fit reads."""
_AT_ONCE = 65_536
_MINI_BATCH, _PASSES, _TRIALS = 4096, 20, 3


@dataclass(frozen=True)
class ClusterSettings:
    """Settings of a fit.

    clusters: K; metric: distance, see the docstring of `creative.clusters`; center: vector that represents a cluster in
    prompts, the mean of its users or the medoid; least: minimum number of users of a cluster; seed: random seed of the
    sample and of k-means.
    """

    clusters: int
    metric: Metric = "euclidean"
    center: Literal["mean", "medoid"] = "mean"
    least: int = 10
    seed: int = 0


@dataclass
class ClusterReport:
    """Result of `cluster_users`.

    users: number of users in the store; new, moved, gone: number of users who were added, changed their cluster, or are
    no longer in the store since the previous assignment (0 after a fit); notes: messages for the operator.
    """

    clusters: Clusters
    users: int
    new: int = 0
    moved: int = 0
    gone: int = 0
    notes: list[str] = field(default_factory=list)


class StoredUsers:
    """The users of an embedding store, sorted by the hash of their ids.

    Raises:
        ValueError: the store is empty, or contains other vectors than those of users.
    """

    def __init__(self, path: Path) -> None:
        store = EmbeddingStore.open(path)
        if store.facts.get("part") != "users":
            raise ValueError(f"{path}: a store of {store.facts.get('part')!r}, not of users: see hllm embed --users")
        self._snapshot = store.snapshot()
        if not len(self._snapshot):
            raise ValueError(f"{path}: no user has a vector; embed them first (hllm embed --users)")
        self.path, self.facts, self.width = path, store.facts, store.width
        self.version = self._snapshot.version
        keys = pa.concat_arrays([keys for keys, _, _ in self._snapshot.rows()])
        raw_ids = keys.cast(pa.large_string())
        self.hashes, order = hash_order(raw_ids.to_pylist())
        self.raw_ids, self._keys = raw_ids.take(pa.array(order)), keys.take(pa.array(order))

    def __len__(self) -> int:
        return len(self.raw_ids)

    def vectors(self, rows: Ints) -> Floats:
        """Return the vectors [n, D] of the users in the given rows [n]."""
        found: Floats = self._snapshot.gather(self._keys.take(pa.array(rows)))[0].numpy()
        if not np.isfinite(found).all():
            raise ValueError(f"{self.path}: a vector contains NaN or infinity; embed the users into a new store")
        return found

    def blocks(self) -> Iterator[tuple[Ints, Floats]]:
        """Yield the rows and vectors of all users, in blocks of at most _AT_ONCE users."""
        for first in range(0, len(self), _AT_ONCE):
            rows = np.arange(first, min(first + _AT_ONCE, len(self)))
            yield rows, self.vectors(rows)


def cluster_users(users: Path, output: Path, settings: ClusterSettings | None, refit: bool = False) -> ClusterReport:
    """Fit clusters to the users of a store, or assign the users to the clusters that `output` already holds.

    Args:
        users: folder of the store.
        output: folder of the clusters.
        settings: settings of the fit; None: those of the clusters in `output`.
        refit: fit new clusters even if `output` holds some. Titles of the previous clusters become invalid.

    Raises:
        ValueError: the store has no users; `output` holds other files; `output` holds no clusters and `settings` is
            None; or, without `refit`, the clusters in `output` have other settings, or were fitted to vectors of
            another model.
    """
    stored = StoredUsers(users)
    if output.exists() and not (output / FILE).is_file() and any(output.iterdir()):
        raise ValueError(f"--output {output}: holds something else than clusters; name a new folder")
    old = Clusters.open(output) if (output / FILE).is_file() else None
    if old is None or refit:
        if settings is None and old is None:
            raise ValueError(f"--clusters: {output} holds no clusters yet: give their number")
        return _fit(stored, output, settings or ClusterSettings(**old.facts["settings"]), old)  # type: ignore[union-attr]
    if settings is not None and asdict(settings) != old.facts["settings"]:
        shown = ", ".join(f"{name} {value}" for name, value in old.facts["settings"].items())
        raise ValueError(
            f"{output}: its clusters were fitted with other settings ({shown}): leave these options out to assign "
            "users to the clusters, or fit again (--refit), which makes the titles invalid"
        )
    if hash_json(old.facts["source"]) != hash_json(stored.facts):
        raise ValueError(
            f"{output}: was fitted to the users of another model than those of {users}: embed the users with the "
            "checkpoint of the clusters, or fit again (--refit), which makes the titles invalid"
        )
    return _assign(stored, output, old.centers, dict(old.facts), old)


def settings_with(output: Path, given: dict[str, Any]) -> ClusterSettings | None:
    """Return the settings of the clusters in `output`, changed as `given`.

    None if `given` is empty, or if `output` holds no clusters and `given` does not contain their number.
    """
    before = Clusters.open(output).facts["settings"] if given and (output / FILE).is_file() else {}
    settings = {**before, **given}
    return ClusterSettings(**settings) if "clusters" in settings else None


def _fit(stored: StoredUsers, output: Path, settings: ClusterSettings, old: Clusters | None) -> ClusterReport:
    random, number = np.random.default_rng(settings.seed), len(stored)
    chosen = np.arange(number)
    if number > SAMPLE:
        chosen = np.sort(random.choice(number, SAMPLE, replace=False))
    sample = np.concatenate([stored.vectors(rows) for rows in np.array_split(chosen, -(-chosen.size // _AT_ONCE))])
    empty = Centers(settings.metric, *_mean_and_scale(sample, settings.metric), sample[:0], sample[:0])
    x = empty.space(sample)
    distinct = len(np.unique(x.astype(np.float32), axis=0))
    wanted, notes = min(settings.clusters, distinct), []
    if wanted < settings.clusters:
        notes.append(
            f"{settings.clusters} clusters were requested, but the sample has only {distinct} different vectors: "
            f"{wanted} are fitted"
        )
    fitted = _k_means(x, wanted, settings.seed)
    fitted, dissolved = _dissolved(stored, replace(empty, fitted=fitted), settings.least)
    if dissolved:
        notes.append(f"{dissolved} clusters of fewer than {settings.least} users dissolved")
    if number < settings.least:
        notes.append(f"caution: {number} users, fewer than --least {settings.least}: their cluster tells who they are")
    centers, medoids = _centers(stored, replace(empty, fitted=fitted), settings.center)
    facts = {"source": dict(stored.facts), "settings": asdict(settings), "sampled": chosen.size, "medoids": medoids}
    report = _assign(stored, output, centers, facts, None)
    report.notes += notes
    if old is not None and old.fingerprint != report.clusters.fingerprint:
        report.notes.append("the centers have changed: write titles for the new clusters (hllm create)")
    return report


def _mean_and_scale(sample: Floats, metric: Metric) -> tuple[Floats, Floats]:
    """Return the mean [D] and the scale [D] of vectors [n, D].

    The scale is the standard deviation for the metric standardized (1 where it is 0), and 1 for other metrics.
    """
    mean, deviation = sample.mean(0, dtype=np.float64), sample.std(0, dtype=np.float64)
    is_scaled = (deviation > 0) & (metric == "standardized")
    return mean.astype(np.float32), np.where(is_scaled, deviation, 1).astype(np.float32)


def _k_means(x: Doubles, clusters: int, seed: int) -> Floats:
    """Fit k-means to x [n, D]; returns the centers [K, D].

    The fit runs on one thread, because sums over several threads have no fixed order, and repeated fits would differ.
    """
    try:
        from sklearn.cluster import KMeans, MiniBatchKMeans
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise ValueError(f'{error.name} is not installed: pip install "hllm_torchrec[cluster]"') from None
    with threadpool_limits(1):
        first = MiniBatchKMeans(clusters, n_init=_TRIALS, batch_size=_MINI_BATCH, random_state=seed).fit(x)
        last = KMeans(clusters, init=first.cluster_centers_, n_init=1, max_iter=_PASSES, random_state=seed).fit(x)
    found: Floats = last.cluster_centers_.astype(np.float32)
    return found


def _dissolved(stored: StoredUsers, centers: Centers, least: int) -> tuple[Floats, int]:
    """Remove the centers of clusters with fewer than `least` users, except the last center.

    Returns the remaining centers [K, D] and the number of removed ones.
    """
    labels = np.concatenate([centers.assign(vectors)[0] for _, vectors in stored.blocks()])
    kept = np.ones(len(centers.fitted), bool)
    while kept.sum() > 1:
        sizes = np.where(kept, np.bincount(labels, minlength=kept.size), len(stored) + 1)
        smallest = int(sizes.argmin())
        if sizes[smallest] >= max(least, 1):
            break
        kept[smallest] = False
        rows = np.flatnonzero(labels == smallest)
        labels[rows] = np.flatnonzero(kept)[nearest(centers.space(stored.vectors(rows)), centers.fitted[kept])[0]]
    return centers.fitted[kept], int((~kept).sum())


def _centers(stored: StoredUsers, centers: Centers, kind: str) -> tuple[Centers, list[str]]:
    """Return `centers` with the vectors for prompts: the mean or the medoid (`kind`) of each cluster.

    The second result is the list of the medoids' raw user ids, empty for means.
    """
    clusters = len(centers.fitted)
    sums, counts = np.zeros((clusters, stored.width)), np.zeros(clusters)
    best, medoids = np.full(clusters, np.inf), np.zeros(clusters, np.int64)
    for rows, vectors in stored.blocks():
        labels, distances = centers.assign(vectors)
        order = np.lexsort((distances, labels))  # sorted by cluster, then by distance
        own, starts = np.unique(labels[order], return_index=True)
        sums[own] += np.add.reduceat(vectors[order].astype(np.float64), starts)
        counts += np.bincount(labels, minlength=clusters)
        first = order[starts]
        better = distances[first] < best[own]
        best[own[better]], medoids[own[better]] = distances[first[better]], rows[first[better]]
    if kind == "medoid":
        return replace(centers, centers=stored.vectors(medoids)), stored.raw_ids.take(pa.array(medoids)).to_pylist()
    return replace(centers, centers=(sums / counts[:, None]).astype(np.float32)), []


def _assign(
    stored: StoredUsers, output: Path, centers: Centers, facts: dict[str, Any], old: Clusters | None
) -> ClusterReport:
    """Assign all users of a store to `centers` and write the clusters; the report compares them with `old`."""
    found = [centers.assign(vectors) for _, vectors in stored.blocks()]
    labels = np.concatenate([one[0] for one in found]).astype(np.int32)
    distances = np.concatenate([one[1] for one in found]).astype(np.float32)
    facts |= {
        "users": {"path": str(stored.path), "version": stored.version, "number": len(stored)},
        "mean_distance": float(distances.mean(dtype=np.float64)),
    }
    facts.setdefault("fitted", {"users": len(stored), "mean_distance": facts["mean_distance"]})
    table = pa.table([stored.raw_ids, pa.array(labels), pa.array(distances)], schema=SCHEMA)
    report = ClusterReport(write_clusters(output, facts, centers, table, stored.hashes), len(stored))
    if old is not None:
        _compare(report, old, stored, labels)
    return report


def _compare(report: ClusterReport, old: Clusters, stored: StoredUsers, labels: np.ndarray) -> None:
    """Add to a report how its assignment differs from a previous one to the same centers."""
    before = np.array([old.of(raw) for raw in stored.raw_ids.to_pylist()])
    known = before != NO_CLUSTER
    report.new, report.moved = int((~known).sum()), int((before[known] != labels[known]).sum())
    report.gone = len(old.users["raw_user_id"]) - int(known.sum())
    facts, least = report.clusters.facts, report.clusters.facts["settings"]["least"]
    small = int((report.clusters.sizes < least).sum())
    if small:
        report.notes.append(f"caution: {small} clusters have fewer than {least} users: fit again (--refit)")
    if facts["mean_distance"] > 1.2 * facts["fitted"]["mean_distance"]:
        report.notes.append(
            f"caution: users are {facts['mean_distance'] / facts['fitted']['mean_distance']:.2f} times as far from "
            "their centers as at the fit: consider a new fit (--refit)"
        )
