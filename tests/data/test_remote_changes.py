"""Forgetting and pruning at URLs: there is then what the same command leaves in a folder, also if it is cut short."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from hllm_torchrec.common.urls import CACHE, list_files, read_text, upload_files
from hllm_torchrec.data import remote_changes
from hllm_torchrec.data.append import append_events
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.forgetting import Names
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.remote_changes import mirrored_dataset
from hllm_torchrec.launch.dataset import main
from hllm_torchrec.launch.forget import main as forget_main
from hllm_torchrec.lifecycle.forgetting_job import forget_everywhere
from tests.helpers.source_files import ITEMS, PARTS, memory_source, random_events, sequences

NAMES = Names(users=["u3", "stranger"], items=["i4"])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of three versions, and vectors of its items."""
    folder = tmp_path_factory.mktemp("remote")
    events = list({(e[0], e[1], e[3]): e for e in random_events(130, users=8)}.values())
    out = prepare(memory_source(folder / "0", events[:60], ITEMS), folder / "data")
    for number in (1, 2):
        append_events(memory_source(folder / f"{number}", events[40 + 20 * number : 60 + 20 * number], ITEMS), out)
    return out


@pytest.fixture(params=["memory", "file"])
def url(root: Path, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The dataset at a URL, and a cache with copies of its versions."""
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    place = "memory://bucket/shop" if request.param == "memory" else f"file://{tmp_path}/bucket/shop"
    upload_files(root, [str(path.relative_to(root)) for path in root.rglob("[!.]*") if path.is_file()], place)
    for version in (1, 2, 3):
        Dataset.open(place, version)
    yield place
    memory = fsspec.filesystem("memory")
    memory.rm("/bucket", recursive=True) if memory.exists("/bucket") else None


def contents(place: str | Path) -> dict[int, Any]:
    """The parts, counts and items of every version."""
    found = {}
    for version in range(1, Dataset.open(place).version + 1):
        try:
            dataset = Dataset.open(place, version)
        except ValueError:
            continue
        parts = {part: sequences(dataset, part) for part in PARTS}
        found[version] = (parts, dataset.manifest["counts"], dataset.items["raw_item_id"].to_pylist())
    return found


@pytest.mark.parametrize("erase", [False, True])
def test_a_dataset_at_a_url_forgets_as_one_in_a_folder(root: Path, url: str, tmp_path: Path, erase: bool) -> None:
    local = shutil.copytree(root, tmp_path / "local")
    expected = forget_everywhere(local, NAMES, erase=erase)
    before = contents(url)
    dry = forget_everywhere(Path(url), NAMES, erase=erase, dry_run=True)
    assert contents(url) == before and dry.dataset.found == expected.dataset.found
    report = forget_everywhere(Path(url), NAMES, erase=erase)
    assert (report.dataset.found, report.dataset.version) == (expected.dataset.found, expected.dataset.version)
    assert contents(url) == contents(local) != before and sorted(contents(url)) == [1, 2, 3, 4]
    here = {path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file()} - {".lock"}
    assert list_files(url).keys() == here
    if erase:
        assert not any(b"u3" in path.read_bytes() for path in tmp_path.rglob("mirror-*/**/*.parquet"))
    assert forget_everywhere(Path(url), NAMES, erase=erase).dataset.version is None


@pytest.mark.parametrize("url", ["memory"], indirect=True)
@pytest.mark.parametrize("uploads", range(4))
def test_forgetting_that_is_cut_short_is_finished_by_the_same_command(
    root: Path, url: str, tmp_path: Path, uploads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, done = shutil.copytree(root, tmp_path / "local"), []
    before = contents(local)
    forget_everywhere(local, NAMES, erase=True)
    after, upload = contents(local), upload_files

    def failing(folder: Path, names: Any, place: str) -> None:
        if len(done) == uploads:
            raise ConnectionError("the network is gone")
        done.append(upload(folder, names, place))

    with monkeypatch.context() as patch:
        patch.setattr(remote_changes, "upload_files", failing)
        with pytest.raises(ConnectionError):
            forget_everywhere(Path(url), NAMES, erase=True)
    for version, found in contents(url).items():
        assert found in (before.get(version), after[version])
    forget_everywhere(Path(url), NAMES, erase=True)
    left = contents(url)
    assert {version: left[version] for version in (1, 2, 3)} == {version: after[version] for version in (1, 2, 3)}
    assert left[max(left)] == after[4]
    assert not any("superseded" in name for name in list_files(url))


def test_what_another_process_has_published_meanwhile_stays(url: str, root: Path) -> None:
    with pytest.raises(ValueError, match="another process has published a version in the meantime"):
        with mirrored_dataset(url) as folder:
            (folder / "items.parquet").unlink()
            fsspec.open(f"{url}/manifest.json", "w").open().close()
    assert "items.parquet" in list_files(url)


def test_pruning_at_a_url_keeps_what_is_named(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(url)
    assert main(["prune", url]) == 2
    assert "at a URL no run pins its version: name the versions that runs use or, if there are none, the newest" in (
        said := capsys.readouterr().err
    ) and said.strip().endswith(f"hllm dataset prune {url} --keep 3")
    assert main(["prune", url, "--keep", "9"]) == 2
    assert "no version 9; it has 1, 2, 3" in capsys.readouterr().err
    assert contents(url) == before
    assert main(["prune", url, "--keep", "2"]) == 0
    assert "removed 1 versions" in (said := capsys.readouterr().out) and "pinned: 2 (--keep)" in said
    assert contents(url) == {version: before[version] for version in (2, 3)}
    assert not any(name.startswith("sequences/") for name in list_files(url)), "only version 1 read them"
    assert read_text(f"{url}/versions/00001.json") is None
    assert main(["prune", url, "--keep", "3"]) == 0 and sorted(contents(url)) == [3]


@pytest.mark.parametrize("url", ["memory"], indirect=True)
def test_a_dataset_at_a_url_is_shown_and_compacted(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    newest = contents(url)[3]
    assert main(["info", url]) == 0 and "of version 3:" in capsys.readouterr().out
    assert main(["compact", url]) == 0 and "version 4 has a single base" in capsys.readouterr().out
    assert contents(url)[4] == contents(url)[3] == newest and Dataset.open(url).manifest["appends"] == []


def test_only_datasets_forget_at_urls(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--dataset", str(root), "--user", "u3", "--stores", "memory://bucket/users"]
    assert forget_main(words) == 2
    assert "memory://bucket/users: only a dataset can forget ids at a URL: copy what lies" in capsys.readouterr().err
    assert forget_main(["--dataset", "memory://bucket/none", "--user", "u3"]) == 2
    assert "memory://bucket/none is not a prepared dataset: no manifest.json" in capsys.readouterr().err
