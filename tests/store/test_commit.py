"""A commit is whole or was never there: on the disk before it is visible, at whatever line its writer dies."""

import os
import re
from pathlib import Path

import pytest
import torch

from hllm_torchrec.store import EmbeddingStore
from tests.helpers.jobs import Job


def test_everything_is_on_the_disk_before_the_manifest_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = EmbeddingStore.create(tmp_path / "s", 4, "fp32")
    synced: dict[int, int] = {}  # inode: bytes, when it was last synced
    sync, replace = os.fsync, os.replace
    seen = []

    def fsync(handle: int) -> None:
        sync(handle)
        synced[os.fstat(handle).st_ino] = os.fstat(handle).st_size

    def before_replace(source: Path, target: Path) -> None:
        if Path(target).name == "manifest.json":
            named = re.findall(r'"name": "(\w+)"', Path(source).read_text())
            folders = [tmp_path / "s" / "runs" / name for name in named]
            files = [file for folder in folders for file in folder.iterdir()]
            for path in (Path(source), *files):
                assert synced.get(path.stat().st_ino) == path.stat().st_size, path
            assert all(path.stat().st_ino in synced for path in (*folders, tmp_path / "s" / "runs"))
            seen.append(len(files))
            synced.pop((tmp_path / "s").stat().st_ino, None)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", before_replace)
    for number in (1, 2):
        with store.writer() as writer:
            writer.upsert(["a", f"b{number}"], torch.ones(2, 4))
            writer.delete(["c"])
            writer.commit()
        assert (tmp_path / "s").stat().st_ino in synced  # so the new name is on the disk when `commit` returns
    store.compact()
    assert seen == [5, 10, 5]


@pytest.mark.slow
def test_a_writer_killed_at_any_moment_loses_nothing_and_shows_nothing_half_done(tmp_path: Path, root: Path) -> None:
    job = Job("tests.store.kill_writers", [str(tmp_path / "s"), "--kills", "25"], root, os.environ)
    out, errors = job.communicate(timeout=300)
    assert job.returncode == 0, out + errors
    assert "killed 25 writers" in out


@pytest.mark.slow
def test_a_writer_killed_at_lines_all_over_a_commit_loses_nothing_either(tmp_path: Path, root: Path) -> None:
    job = Job("tests.store.kill_commits", [str(tmp_path / "s"), "--kills", "40"], root, os.environ)
    out, errors = job.communicate(timeout=300)
    assert job.returncode == 0, out + errors
    assert "killed 40 writers" in out
