"""Datasets, runs and stores at `memory://` URLs: what is fetched, published, checked and refused."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from hllm_torchrec.checkpoint import layout as files
from hllm_torchrec.checkpoint.load import best_checkpoint, latest_checkpoint, load_checkpoint, save_checkpoint
from hllm_torchrec.checkpoint.remote_runs import RunStorage, local_checkpoint, local_run, open_run_storage
from hllm_torchrec.common.urls import CACHE, fetch_files, list_files, open_filesystem, read_text, upload_files, url_of
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.remote_datasets import publish_dataset
from hllm_torchrec.inference.item_embedding import open_or_create_store, write_rounds
from hllm_torchrec.launch.evaluate import main as evaluate
from hllm_torchrec.launch.prepare import main as prepare
from hllm_torchrec.store import EmbeddingStore
from hllm_torchrec.store.remote_store import RemoteStore, writable_store
from tests.helpers import fixtures


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A URL with nothing behind it, and a cache that is empty."""
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    yield "memory://bucket"
    memory.rm("/bucket", recursive=True) if memory.exists("/bucket") else None


def write(url: str, text: str) -> None:
    with fsspec.open(url, "w") as file:
        file.write(text)


@pytest.mark.parametrize(
    ("place", "url"),
    [
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        (Path("s3://bucket/a"), "s3://bucket/a"),
        (Path("memory://x"), "memory://x"),
        ("file:///data/x", "file:///data/x"),
        (Path("file:///data/x"), "file:///data/x"),
        ("/data/x", None),
        ("shop:/x", None),
        ("a:/b", None),
        ("runs/s3", None),
    ],
)
def test_urls_are_known_also_as_paths(place: str | Path, url: str | None) -> None:
    assert url_of(place) == url


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as if it were not installed
    for name in ("s3", "s3a"):  # what another test has opened is remembered
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, name, raising=False)
    with pytest.raises(ValueError, match=r"s3://b/x: a package .* not installed: pip install 'hllm_torchrec\[s3\]'"):
        read_text("s3://b/x")


def test_what_a_server_refuses_is_one_line_with_the_url() -> None:
    for raised, said in (
        (
            PermissionError("no\nrights"),
            r"memory://b: access is denied \(no rights\): check the credentials' permissions",
        ),
        (FileNotFoundError("x"), r"memory://b: not found \(x\): check that the bucket exists"),
    ):
        with pytest.raises(type(raised), match=said), open_filesystem("memory://b"):
            raise raised


# ---------------------------------------------------------------------- datasets


def test_a_dataset_is_fetched_once_and_read_as_the_one_published(bucket: str, tmp_path: Path) -> None:
    own = fixtures.dataset()
    publish_dataset(own.root, f"{bucket}/shop")
    first = Dataset.open(Path(f"{bucket}/shop"))
    assert first.fingerprint == own.fingerprint and first.root.is_relative_to(tmp_path / "cache")
    assert first.items.equals(own.items) and first.root.name == "shop"
    assert not (first.root / "tokens").exists()
    stamp = (first.root / "items.parquet").stat().st_mtime_ns
    assert Dataset.open(f"{bucket}/shop").root == first.root
    assert (first.root / "items.parquet").stat().st_mtime_ns == stamp


def test_half_a_dataset_is_none_and_a_damaged_one_leaves_no_copy(bucket: str, tmp_path: Path) -> None:
    publish_dataset(fixtures.dataset().root, f"{bucket}/shop")
    fsspec.filesystem("memory").rm_file("/bucket/shop/manifest.json")
    with pytest.raises(ValueError, match=r"memory://bucket/shop is not a prepared dataset: no manifest\.json"):
        Dataset.open(f"{bucket}/shop")
    publish_dataset(fixtures.dataset().root, f"{bucket}/shop")
    write(f"{bucket}/shop/items.parquet", "other")
    with pytest.raises(ValueError, match=r"shop/items\.parquet: its contents are not those of the manifest: the data"):
        Dataset.open(f"{bucket}/shop")
    assert not list((tmp_path / "cache").rglob("manifest.json"))
    write(f"{bucket}/shop/manifest.json", json.dumps({"files": {"../x": {"bytes": 1, "sha256": ""}}}))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged: '\.\./x' leads out of the dataset"):
        Dataset.open(f"{bucket}/shop")


def test_prepare_writes_to_a_url_and_says_when_another_dataset_is_there(
    bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "\n".join(f"u{u},i{(u * 7 + t) % 9},{1_400_000_000 + u + 5 * t}" for u in range(6) for t in range(8))
    (tmp_path / "events.csv").write_text(f"user,item,time\n{rows}\n")
    (tmp_path / "items.csv").write_text("item,title\n" + "\n".join(f"i{i},title {i}" for i in range(9)) + "\n")
    (tmp_path / "shop.yaml").write_text(
        "name: shop\nevents: {path: events.csv, user: user, item: item, time: time, time_unit: seconds}\n"
        "items: {path: items.csv, item: item, text: [title]}\n"
    )
    given = ["--source", "table", "--path", str(tmp_path / "shop.yaml"), "--output", f"{bucket}/new"]
    assert prepare(given) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.startswith("memory://bucket/new: 48 events, 6 users, 9 items")
    fingerprint = Dataset.open(f"{bucket}/new").fingerprint
    assert prepare([*given, "--split", "leave_one_out"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert Dataset.open(f"{bucket}/new").fingerprint == fingerprint
    assert prepare([*given, "--split", "leave_one_out", "--overwrite"]) == 0
    assert Dataset.open(f"{bucket}/new").fingerprint != fingerprint


def test_a_day_is_appended_to_a_dataset_at_a_url_by_uploading_it_alone(
    bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "\n".join(f"u{u},i{(u * 7 + t) % 9},{1_400_000_000 + u + 5 * t}" for u in range(6) for t in range(8))
    (tmp_path / "events.csv").write_text(f"user,item,time\n{rows}\n")
    (tmp_path / "day.csv").write_text("user,item,time\nu0,i1,1500000000\nu9,i1,1500000001\n")
    (tmp_path / "items.csv").write_text("item,title\n" + "\n".join(f"i{i},title {i}" for i in range(9)) + "\n")
    (tmp_path / "shop.yaml").write_text(
        "name: shop\nevents: {path: events.csv, user: user, item: item, time: time, time_unit: seconds}\n"
        "items: {path: items.csv, item: item, text: [title]}\n"
    )
    url = f"{bucket}/new"
    given = ["--source", "table", "--path", str(tmp_path / "shop.yaml"), "--output", url]
    assert prepare(given) == 0, capsys.readouterr().err
    first, before = Dataset.open(url), list_files(url)
    write(f"{url}/vectors/mine.npy", "mine")
    assert prepare([*given, "--append", str(tmp_path / "day.csv")]) == 0, capsys.readouterr().err
    dataset, after = Dataset.open(url), list_files(url)
    assert (dataset.version, dataset.manifest["counts"]["events"], dataset.num_users) == (2, 50, 8)
    added = after.keys() - before.keys() - {"vectors/mine.npy"}
    assert {name.partition("/")[0] for name in added} == {"appends", "versions"}
    assert all(after[name] == before[name] for name in before.keys() - {"manifest.json"})
    assert Dataset.open(url, 1).fingerprint == first.fingerprint
    # Files of the copy of version 1 were linked, not fetched again.
    assert (dataset.root / "items.parquet").samefile(first.root / "items.parquet")
    with pytest.raises(ValueError, match=r"bucket/new: no version 3; the newest is 2"):
        Dataset.open(url, 3)


# ---------------------------------------------------------------------- runs and checkpoints


def save(run: str, step: int, metric: float | None = None, keep_last: int = 3) -> None:
    """A checkpoint of one tensor, as a run at a URL writes it."""
    place = open_run_storage(run)
    assert place.url == run
    (place.folder / "config.yaml").write_text("seed: 1\n")
    (place.folder / "log.jsonl").write_text(f'{{"step": {step}}}\n')
    place.publish()
    state = {"model": {"w": torch.full((4,), float(step))}}
    given = {"keep_last": keep_last, "keep_best": "max", "metric": metric}
    save_checkpoint(place.folder / "checkpoints", step, state, {"step": step}, **given, url=place.checkpoints)
    assert not list((place.folder / "checkpoints").glob(f"step-{step:08d}*"))  # drafts leave nothing


def test_checkpoints_at_a_url_load_on_a_fresh_host(
    bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = f"{bucket}/runs/one"
    for step, metric in ((1, 0.9), (2, 0.5), (3, 0.6)):
        save(run, step, metric, keep_last=1)
    names = {name.split("/")[1] for name in list_files(run) if name.startswith("checkpoints/")}
    assert names == {"step-00000001", "step-00000003"}  # the best and the last
    monkeypatch.setenv(CACHE, str(tmp_path / "another host"))
    folder = local_run(Path(run), "best")
    assert folder.name == "one" and (folder / "log.jsonl").read_text() == '{"step": 3}\n'
    best = best_checkpoint(folder / "checkpoints")
    assert best is not None and best.name == "step-00000001"
    w = torch.zeros(4)
    assert load_checkpoint(best, {"model": {"w": w}})["step"] == 1 and w.tolist() == [1.0] * 4
    latest = latest_checkpoint(open_run_storage(run).folder / "checkpoints")
    assert latest is not None and latest.name == "step-00000003"
    assert local_checkpoint(f"{run}/checkpoints/step-00000003").is_dir()
    with pytest.raises(ValueError, match=r"memory://bucket/runs/one/x: not the URL of a checkpoint: one ends in"):
        local_checkpoint(f"{run}/x")
    with pytest.raises(ValueError, match=r"memory://bucket/none is not a run directory: it has no config\.yaml"):
        local_run(f"{bucket}/none")


def test_an_upload_that_was_cut_short_or_damaged_is_passed_over(bucket: str, caplog: pytest.LogCaptureFixture) -> None:
    run = f"{bucket}/one"
    save(run, 1)
    save(run, 2)
    memory = fsspec.filesystem("memory")
    (tensors,) = (n for n in list_files(f"{run}/checkpoints/step-00000002") if n.endswith(".distcp"))
    size = list_files(f"{run}/checkpoints/step-00000002")[tensors].size
    memory.pipe_file(f"/bucket/one/checkpoints/step-00000002/{tensors}", bytes(size))
    found = latest_checkpoint(open_run_storage(run).folder / "checkpoints")
    assert found is not None and found.name == "step-00000001"
    assert "step-00000002 is damaged: the contents of" in caplog.text
    save(run, 3)
    memory.rm_file("/bucket/one/checkpoints/step-00000003/COMPLETE")
    found = latest_checkpoint(open_run_storage(run).folder / "checkpoints")
    assert found is not None and found.name == "step-00000001"
    save(run, 3)  # the same step once more, over what the first left
    found = latest_checkpoint(open_run_storage(run).folder / "checkpoints")
    assert found is not None and found.name == "step-00000003"
    assert files.find_damage(found) is None


def test_a_run_that_was_removed_at_its_url_is_none_here(bucket: str) -> None:
    save(f"{bucket}/one", 5)
    place = open_run_storage(f"{bucket}/one")
    assert latest_checkpoint(place.folder / "checkpoints") is not None
    fsspec.filesystem("memory").rm("/bucket/one", recursive=True)
    place = open_run_storage(f"{bucket}/one")
    assert latest_checkpoint(place.folder / "checkpoints") is None and not (place.folder / "log.jsonl").exists()


def test_only_what_has_changed_is_published(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "tensorboard").mkdir()
    place = RunStorage(tmp_path, f"{bucket}/one")
    (tmp_path / "tensorboard" / "events").write_text("1")
    (tmp_path / "log.jsonl").write_text("1")
    place.publish()
    assert set(list_files(f"{bucket}/one")) == {"tensorboard/events", "log.jsonl"}
    write(f"{bucket}/one/log.jsonl", "untouched")
    (tmp_path / "tensorboard" / "events").write_text("22")
    with pytest.raises(FloatingPointError), place.published_on_exit():
        raise FloatingPointError  # a run that fails publishes nothing more
    assert read_text(f"{bucket}/one/tensorboard/events") == "1"
    with place.published_on_exit():
        pass
    assert read_text(f"{bucket}/one/tensorboard/events") == "22" and read_text(f"{bucket}/one/log.jsonl") == "untouched"


# ---------------------------------------------------------------------- stores


def commit(url: str, keys: list[str], value: float) -> EmbeddingStore:
    """One commit of an embedding job."""
    store = open_or_create_store(Path(url), 2, "fp32", {"part": "test"})
    rows = (np.array(keys, dtype=object), torch.full((len(keys), 2), value), np.ones(len(keys), np.uint64))
    write_rounds(store, [[None]], lambda _: (list(rows[0]), rows[1], rows[2]), "test", 1)
    return store


def test_commits_to_a_store_at_a_url_are_seen_by_who_opens_it(bucket: str, tmp_path: Path) -> None:
    url = f"{bucket}/stores/items"
    with pytest.raises(ValueError, match=r"memory://bucket/stores/items: no embedding store \(no store\.json\)"):
        EmbeddingStore.open(url)
    commit(url, ["a", "b"], 1.0)
    before = EmbeddingStore.open(Path(url)).snapshot()
    for number in range(12):  # enough for runs to be merged
        commit(url, ["b", f"c{number}"], 2.0 + number)
    store = EmbeddingStore.open(url)
    assert store.verify() == [] and len(store.snapshot()) == 14
    vectors, known = store.snapshot().gather(["a", "b", "x"])
    assert vectors[:2, 0].tolist() == [1.0, 13.0] and known.tolist() == [True, True, False]
    assert before.gather(["b"])[0][0, 0] == 1.0  # what was open stays as it was
    named = {run["name"] for run in json.loads(read_text(f"{url}/manifest.json") or "")["runs"]}
    assert {name.split("/")[0] for name in list_files(f"{url}/runs")} == named
    assert {path.name for path in (store.root / "runs").iterdir()} == named
    with pytest.raises(ValueError, match=r"items: only hllm embed and hllm exposures write to a store at a URL"):
        store.compact()


def test_two_jobs_cannot_both_commit(bucket: str) -> None:
    url = f"{bucket}/items"
    commit(url, ["a"], 1.0)
    late = RemoteStore(url, writable_store(url))
    commit(url, ["b"], 2.0)
    with pytest.raises(ValueError, match=r"memory://bucket/items: another job has written to this store meanwhile"):
        late.publish()
    with pytest.raises(ValueError, match="its vectors were made by another model"):
        open_or_create_store(Path(url), 2, "fp32", {"part": "other"})


def test_a_damaged_run_is_not_taken(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{bucket}/items"
    commit(url, ["a"], 1.0)
    name = next(name for name in list_files(f"{url}/runs"))
    fetch_files(f"{url}/runs", [name], tmp_path / "kept")
    (tmp_path / "kept" / name).write_bytes(bytes(list_files(f"{url}/runs")[name].size))
    upload_files(tmp_path / "kept", [name], f"{url}/runs")
    monkeypatch.setenv(CACHE, str(tmp_path / "another host"))
    with pytest.raises(ValueError, match=r"memory://bucket/items/runs/\S+: damaged: .*the contents are not what was"):
        EmbeddingStore.open(url)


def test_commands_that_write_folders_refuse_urls(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate(["--run-dir", "runs/one", "--output", "s3://bucket/x"])
    assert "--output s3://bucket/x: must be a folder of this machine" in capsys.readouterr().err
