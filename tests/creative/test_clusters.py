"""Clusters of users: fit and later assignment use the same distance, minimum size of a cluster, damaged files."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hllm_torchrec.creative.cluster_fit import ClusterReport, ClusterSettings, cluster_users, settings_with
from hllm_torchrec.creative.clusters import Clusters
from hllm_torchrec.launch import cli
from hllm_torchrec.store.store import EmbeddingStore

FACTS = {"part": "users", "weights": "w"}


def store(path: Path, vectors: np.ndarray, names: str = "u", facts: Any = None) -> Path:
    found = EmbeddingStore.open(path) if path.exists() else None
    found = found or EmbeddingStore.create(path, vectors.shape[1], "fp32", facts=facts or FACTS)
    with found.writer() as writer:
        writer.upsert([f"{names}{n}" for n in range(len(vectors))], torch.from_numpy(vectors.astype(np.float32)))
        writer.commit()
    return path


def blobs(sizes: tuple[int, ...] = (40, 30, 20, 3), seed: int = 0) -> np.ndarray:
    """Users around as many centers, far from the origin and of quite different lengths."""
    random = np.random.default_rng(seed)
    middles = random.normal(size=(len(sizes), 6)) * np.array([[3.0], [4.0], [9.0], [20.0]])[: len(sizes)] + 50
    return np.concatenate([m + 0.3 * random.normal(size=(n, 6)) for m, n in zip(middles, sizes)])


def fit(folder: Path, vectors: np.ndarray, **more: Any) -> ClusterReport:
    settings = ClusterSettings(**{"clusters": 4, "least": 1} | more)
    return cluster_users(store(folder / "users", vectors), folder / "clusters", settings)


@pytest.mark.parametrize("metric", ["euclidean", "standardized", "cosine"])
def test_a_user_belongs_to_the_nearest_center_in_the_space_of_the_fit(tmp_path: Path, metric: Any) -> None:
    vectors = blobs()
    found = fit(tmp_path, vectors, metric=metric).clusters
    centers = found.centers
    x = vectors.astype(np.float32).astype(np.float64) - centers.mean
    if metric == "standardized":
        x /= vectors.std(0)
    if metric == "cosine":
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    distances = np.linalg.norm(x[:, None] - centers.fitted[None], axis=2)  # one by one
    labels = [found.of(f"u{n}") for n in range(len(vectors))]
    assert labels == distances.argmin(1).tolist()
    assert [len(set(labels[a:b])) for a, b in ((0, 40), (40, 70), (70, 90), (90, 93))] == [1, 1, 1, 1]
    for k in range(4):  # what stands for a cluster is the mean of its users' own vectors
        members = vectors[np.array(labels) == k]
        np.testing.assert_allclose(centers.centers[k], members.mean(0), rtol=1e-5)
    # The published assignment, the largest dot product with the centers, gives other clusters.
    assert (np.argmax(vectors @ centers.centers.T, axis=1) != labels).mean() > 0.3
    assert found.of("nobody") == -1


def test_a_fit_can_be_repeated_and_another_seed_is_another_fit(tmp_path: Path) -> None:
    vectors = np.random.default_rng(1).normal(size=(300, 4))
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        fit(tmp_path / name, vectors, seed=seed, clusters=7)
    one, same, other = ((tmp_path / name / "clusters" / "centers.npz").read_bytes() for name in "abc")
    assert one == same != other


def test_a_medoid_is_the_vector_of_a_user_of_its_cluster(tmp_path: Path) -> None:
    vectors = blobs()
    found = fit(tmp_path, vectors, center="medoid").clusters
    for k, name in enumerate(found.facts["medoids"]):
        assert found.of(name) == k
        np.testing.assert_array_equal(found.centers.centers[k], vectors[int(name[1:])].astype(np.float32))


def test_no_cluster_is_smaller_than_it_may_be(tmp_path: Path) -> None:
    report = fit(tmp_path, blobs(), least=10)
    assert len(report.clusters) == 3 and report.clusters.sizes.min() >= 10 and report.clusters.sizes.sum() == 93
    assert "1 clusters of fewer than 10 users dissolved" in report.notes
    alone = fit(tmp_path / "alone", blobs((3,)), clusters=2, least=10)
    assert len(alone.clusters) == 1 and "fewer than --least 10: their cluster tells who they are" in str(alone.notes)


@pytest.mark.parametrize(("users", "distinct"), [(5, 5), (30, 1)])
def test_more_clusters_than_users_who_differ_are_fewer(tmp_path: Path, users: int, distinct: int) -> None:
    vectors = np.random.default_rng(0).normal(size=(users, 3)) if distinct > 1 else np.ones((users, 3))
    report = fit(tmp_path, vectors, clusters=9)
    assert len(report.clusters) == distinct and report.clusters.sizes.tolist() == [users // distinct] * distinct
    assert report.notes == [
        f"9 clusters were requested, but the sample has only {distinct} different vectors: {distinct} are fitted"
    ]


def test_new_and_moved_users_are_assigned_to_the_clusters_that_are_there(tmp_path: Path) -> None:
    vectors = blobs()
    before = fit(tmp_path, vectors, least=2).clusters
    moved = vectors[:2] + (vectors[50] - vectors[0])  # to the second blob
    store(tmp_path / "users", moved)
    store(tmp_path / "users", vectors[70:75], names="new")
    with EmbeddingStore.open(tmp_path / "users").writer() as writer:
        writer.delete(["u92"])
        writer.commit()
    assert before.is_behind
    report = cluster_users(tmp_path / "users", tmp_path / "clusters", None)
    assert not report.clusters.is_behind
    assert (report.new, report.moved, report.gone, report.users) == (5, 2, 1, 97)
    now = Clusters.open(tmp_path / "clusters")
    assert now.fingerprint == before.fingerprint
    assert now.of("u0") == before.of("u50") != before.of("u0") and now.of("new0") == before.of("u70")
    assert now.of("u92") == -1 != before.of("u92")  # an open table stays as it was
    assert before.of("u0") != now.of("u0")
    # Users far from all centers, and clusters that have become small, are reported: the fit is old.
    store(tmp_path / "users", vectors + 40)
    (notes,) = [cluster_users(tmp_path / "users", tmp_path / "clusters", None).notes]
    assert "times as far from their centers as at the fit" in str(notes) and "fewer than 2 users: fit again" in str(
        notes
    )
    again = cluster_users(tmp_path / "users", tmp_path / "clusters", None, refit=True)
    assert again.clusters.fingerprint != before.fingerprint and again.clusters.sizes.min() >= 2
    assert again.notes == ["the centers have changed: write titles for the new clusters (hllm create)"]


def test_clusters_of_other_settings_models_or_things_are_refused(tmp_path: Path) -> None:
    fit(tmp_path, blobs())
    users, clusters = tmp_path / "users", tmp_path / "clusters"
    with pytest.raises(
        ValueError, match=r"were fitted with other settings \(clusters 4, .*\): leave these options out to assign"
    ):
        cluster_users(users, clusters, ClusterSettings(5))
    other = store(tmp_path / "other", blobs(), facts={**FACTS, "weights": "v"})
    with pytest.raises(ValueError, match="fitted to the users of another model than those of .*other"):
        cluster_users(other, clusters, None)
    assert len(cluster_users(users, clusters, ClusterSettings(5, least=1), refit=True).clusters) == 5
    assert len(cluster_users(other, clusters, ClusterSettings(4, least=1), refit=True).clusters) == 4
    with pytest.raises(ValueError, match=r"--clusters: .*new holds no clusters yet: give their number"):
        cluster_users(users, tmp_path / "new", None)
    with pytest.raises(ValueError, match="holds something else than clusters; name a new folder"):
        cluster_users(users, users, ClusterSettings(2))
    items = store(tmp_path / "items", blobs(), facts={"part": "items"})
    with pytest.raises(ValueError, match="a store of 'items', not of users: see hllm embed --users"):
        cluster_users(items, tmp_path / "new", ClusterSettings(2))
    EmbeddingStore.create(tmp_path / "none", 3, facts=FACTS)
    with pytest.raises(ValueError, match="no user has a vector; embed them first"):
        cluster_users(tmp_path / "none", tmp_path / "new", ClusterSettings(2))
    assert not (tmp_path / "new").exists()


def test_settings_that_are_not_given_are_those_of_the_clusters(tmp_path: Path) -> None:
    fit(tmp_path, blobs(), metric="standardized")
    clusters = tmp_path / "clusters"
    assert settings_with(clusters, {}) is None and settings_with(tmp_path / "new", {"least": 3}) is None
    assert settings_with(tmp_path / "new", {"clusters": 2}) == ClusterSettings(2)
    changed = settings_with(clusters, {"least": 2})
    assert changed == ClusterSettings(4, "standardized", least=2)
    with pytest.raises(ValueError, match="were fitted with other settings"):  # never ignored
        cluster_users(tmp_path / "users", clusters, changed)
    found = cluster_users(tmp_path / "users", clusters, changed, refit=True).clusters
    assert found.facts["settings"]["metric"] == "standardized" and found.facts["settings"]["least"] == 2


def test_damaged_clusters_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = fit(tmp_path, blobs()).clusters
    good = {file: file.read_bytes() for file in found.path.iterdir()}
    for file, bytes_ in good.items():
        for bad in (b"", bytes_[:-7], bytes_.replace(bytes_[30:34], b"\xff\x00\xfe\x01"), b"[]"):
            file.write_bytes(bad)
            with pytest.raises(ValueError, match=str(found.path)) as error:
                Clusters.open(found.path)
            assert "\n" not in str(error.value) and "hllm cluster" in str(error.value)
        file.write_bytes(bytes_)
    facts = json.loads((found.path / "clusters.json").read_text())
    (found.path / "clusters.json").write_text(json.dumps(facts | {"format": 2}))
    assert cli.main(["cluster", "--users", str(tmp_path / "users"), "--output", str(found.path)]) == 2
    assert "its format is 2, this version reads 1" in capsys.readouterr().err
    shutil.rmtree(found.path)  # the remedy
    assert (
        cli.main(["cluster", "--users", str(tmp_path / "users"), "--output", str(found.path), "--clusters", "2"]) == 0
    )
