"""A store beside other processes: compaction, building anew, two jobs at one URL, kills; errors of the machine."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from hllm_torchrec.common.urls import create_file, list_files, read_text, remove_files
from hllm_torchrec.inference.item_embedding import open_or_create_store, write_rounds
from hllm_torchrec.store import EmbeddingStore
from hllm_torchrec.store.remote_store import RemoteStore, local_store, writable_store
from hllm_torchrec.store.store import StoreReplaced
from tests.helpers.schedules import killed_before_access, schedules
from tests.store.test_store import WIDTH, commit, contents, create


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two commits."""
    store = create(tmp_path_factory.mktemp("made") / "s")
    commit(store, {"a": 1.0, "b": 2.0})
    commit(store, {"a": 3.0})
    return store.root


def copied(made: Path, path: Path) -> EmbeddingStore:
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(made, path)
    return EmbeddingStore.open(path)


def gathered(store: EmbeddingStore) -> list[float]:
    vectors, known = store.snapshot().gather(["a", "b"])
    assert known.all()
    return vectors[:, 0].tolist()


# --- compaction, commits ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "right"),
    [
        (lambda path: EmbeddingStore.open(path).verify(), ([],)),
        (lambda path: gathered(EmbeddingStore.open(path)), ([3.0, 2.0], [5.0, 2.0])),
    ],
    ids=["verify", "gather"],
)
def test_readers_see_the_state_before_or_after_a_commit_and_a_compaction(
    read: Callable, right: tuple, made: Path, tmp_path: Path
) -> None:
    path = tmp_path / "s"

    def go_on() -> None:
        store = EmbeddingStore.open(path)
        commit(store, {"a": 5.0})
        store.compact()

    results = dict(schedules(lambda: read(path), go_on, path, lambda: copied(made, path)))
    assert len(results) > 15
    assert all(result in right for result in results.values()), results


# --- another store in its place --------------------------------------------------------------------------


def test_a_store_that_is_built_again_under_an_open_one_is_noticed(made: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"

    def again() -> None:
        shutil.rmtree(path)
        commit(create(path), {"a": 7.0, "b": 8.0})  # of the same facts, type and width

    store = copied(made, path)
    again()
    for read in (store.snapshot, store.verify, store.compact):
        with pytest.raises(StoreReplaced, match="s: this store was removed or built again since it was opened: open"):
            read()
    shutil.rmtree(path)
    with pytest.raises(StoreReplaced):
        store.snapshot()
    stores: list[EmbeddingStore] = []
    fresh = lambda: stores.append(copied(made, path))  # noqa: E731
    results = dict(schedules(lambda: gathered(stores[-1]), again, path, fresh))
    assert len(results) > 10
    assert all(isinstance(result, StoreReplaced) or result == [3.0, 2.0] for result in results.values()), results


# --- kills while it is made ------------------------------------------------------------------------------


def test_a_store_whose_creation_was_killed_can_be_made(tmp_path: Path) -> None:
    for k in count(1, 2):
        path = tmp_path / str(k)
        if not killed_before_access(k, path, create, path):
            break
        store = EmbeddingStore.open(path) if (path / "store.json").exists() else create(path)
        commit(store, {"a": 1.0})
        assert contents(store) == {"a": 1.0}
        assert not [p.name for p in path.iterdir() if p.name.startswith(".")]
    assert k > 10


def test_folders_with_anything_else_are_refused(tmp_path: Path) -> None:
    for name in ("runs/x", "notes.txt"):
        folder = tmp_path / name.replace("/", "-")
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("")
        with pytest.raises(ValueError, match="already exists: open it, or choose another folder"):
            create(folder)
        assert not (folder / "lock").exists()


# --- errors of the machine -------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.EACCES, errno.ENOMEM])
def test_an_error_of_the_machine_is_not_damage(number: int, made: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    copied(made, path)

    def fail() -> None:
        raise OSError(number, os.strerror(number), "a file")

    def read() -> list[float]:
        store = EmbeddingStore.open(path)
        assert store.verify() == []
        return gathered(store)

    results = dict(schedules(read, fail, path))
    assert len(results) > 15
    failed = {k: result for k, result in results.items() if result != [3.0, 2.0]}  # numpy asks some things twice
    assert len(failed) > 15
    assert not {k: error for k, error in failed.items() if getattr(error, "errno", None) != number}


# --- two jobs at one URL ---------------------------------------------------------------------------------


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of a store with the key `a`."""
    monkeypatch.setenv("HLLM_CACHE", str(tmp_path / "cache"))
    _commit(place := f"file://{tmp_path}/bucket/items", "a")
    return place


def _begin(url: str, key: str, folder: Path) -> tuple[EmbeddingStore, RemoteStore]:
    """A job on another host, with its copy in `folder`: it has committed to the copy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HLLM_CACHE", str(folder))
        store = EmbeddingStore.open(writable_store(url))
        published = RemoteStore(url, store.root)
        with store.writer() as writer:
            writer.upsert([key], torch.ones(1, WIDTH), np.ones(1, np.uint64))
            writer.commit()
    return store, published


def _commit(url: str, key: str) -> None:
    store = open_or_create_store(Path(url), WIDTH, "fp32", {"part": "test"})
    rows = [key], torch.ones(1, WIDTH), np.ones(1, np.uint64)
    write_rounds(store, [[None]], lambda _: rows, "test", 1)


def _keys(url: str) -> set[str]:
    local = EmbeddingStore.open(local_store(url))
    assert local.verify() == []
    return {key for keys, _, _ in local.snapshot().rows() for key in keys.to_pylist()}


@pytest.mark.slow
def test_of_two_jobs_that_commit_to_a_url_one_is_refused_and_no_commit_is_lost(url: str, tmp_path: Path) -> None:
    bucket = tmp_path / "bucket"
    shutil.copytree(bucket, tmp_path / "before")
    said: list[str] = []

    def fresh() -> None:
        said.clear()
        for folder in (bucket, tmp_path / "one", tmp_path / "two"):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "before", bucket)
        jobs["one"], jobs["two"] = (_begin(url, name, tmp_path / name)[1] for name in ("one", "two"))

    def publish(name: str) -> None:
        try:
            jobs[name].publish()
            said.append(name)
        except ValueError as error:
            assert "items: another job has written to this store meanwhile: run this one again" in str(error)

    jobs: dict[str, RemoteStore] = {}
    number = 0
    for number, result in schedules(lambda: publish("one"), lambda: publish("two"), bucket, fresh):
        assert result is None, (number, result)
        assert len(said) == 1, (number, said)
        assert _keys(url) == {"a", *said}, number
        _commit(url, "later")  # and the next job goes on from there
        assert _keys(url) == {"a", "later", *said}, number
    assert number > 30


def test_a_commit_whose_job_died_before_the_manifest_stands(url: str, tmp_path: Path) -> None:
    bucket, left = tmp_path / "bucket" / "items", []
    before = (bucket / "manifest.json").read_text()
    _commit(url, "b")
    (bucket / "manifest.json").write_text(before)  # as if the job had died after its commit
    assert _keys(url) == {"a", "b"}
    _commit(url, "c")
    assert _keys(url) == {"a", "b", "c"}
    left = [name for name in list_files(url) if name.startswith("commits/")]
    assert left == [f"commits/{number:08d}.json" for number in range(1, len(left) + 1)]
    # The first commit of all: there is neither manifest.json nor store.json.
    remove_files(url, ["manifest.json", "store.json"])
    assert _keys(url) == {"a", "b", "c"}
    _commit(url, "d")
    assert _keys(url) == {"a", "b", "c", "d"} and read_text(f"{url}/store.json")


def test_what_an_earlier_version_committed_is_read_and_built_upon(url: str, tmp_path: Path) -> None:
    """It writes manifest.json alone, and knows no commits/."""
    _, published = _begin(url, "b", tmp_path / "old")
    manifest = json.loads((published.root / "manifest.json").read_text())
    for run in manifest["runs"]:
        shutil.copytree(
            published.root / "runs" / run["name"], tmp_path / "bucket/items/runs" / run["name"], dirs_exist_ok=True
        )
    (tmp_path / "bucket/items/manifest.json").write_text(json.dumps(manifest))
    assert _keys(url) == {"a", "b"}
    _commit(url, "c")
    assert _keys(url) == {"a", "b", "c"}


def test_old_files_of_commits_go(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hllm_torchrec.store.remote_store.KEPT_COMMITS", 2)
    for number in range(4):
        _commit(url, str(number))
    assert len([name for name in list_files(url) if name.startswith("commits/")]) == 2
    assert len(_keys(url)) == 5


def test_a_store_that_is_built_again_at_its_url_is_noticed_by_readers_of_the_copy(url: str, tmp_path: Path) -> None:
    reader = EmbeddingStore.open(url)
    fsspec.filesystem("file").rm(str(tmp_path / "bucket"), recursive=True)
    _commit(url, "b")
    assert _keys(url) == {"b"}
    with pytest.raises(StoreReplaced):
        reader.snapshot()


@pytest.mark.parametrize("root", ["memory://bucket", "file://{tmp_path}"])
def test_a_file_is_created_by_one_job_only(root: str, tmp_path: Path) -> None:
    file = f"{root.format(tmp_path=tmp_path)}/commits/1.json"
    assert create_file(file, "one") and not create_file(file, "two")
    assert read_text(file) == "one"
    remove_files(file.rpartition("/")[0], ["1.json"])
