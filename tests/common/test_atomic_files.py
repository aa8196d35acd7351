import errno
import os
from itertools import count

import pytest

from hllm_torchrec.common import atomic_files
from hllm_torchrec.common.atomic_files import atomic_folder, recover_folder
from tests.helpers.schedules import killed_before_access, schedules


def test_a_folder_appears_when_the_block_ends_and_not_before(tmp_path):
    target = tmp_path / "deep" / "target"
    with atomic_folder(target) as folder:
        (folder / "file").write_text("x")
        (folder.parent / "scratch").mkdir()
        assert not target.exists()
    assert (target / "file").read_text() == "x"
    assert list(target.parent.iterdir()) == [target]
    assert target.stat().st_mode & 0o777 == (tmp_path / "deep").stat().st_mode & 0o777


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("replace", [True, False])
def test_an_exception_leaves_what_was_there(tmp_path, error, replace):
    target = tmp_path / "target"
    target.mkdir()
    (target / "file").write_text("old")
    with pytest.raises(error), atomic_folder(target, replace=replace) as folder:
        (folder / "file").write_text("new")
        raise error
    assert (target / "file").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_replacing_takes_the_whole_place(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").touch()
    with atomic_folder(target, replace=True) as folder:
        (folder / "new").touch()
    assert [p.name for p in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


def test_the_first_of_two_processes_wins_without_replace(tmp_path):
    target = tmp_path / "target"
    with atomic_folder(target) as folder:
        (folder / "second").touch()
        target.mkdir()
        (target / "first").touch()
    assert [p.name for p in target.iterdir()] == ["first"]


def test_a_file_in_the_way_is_an_error(tmp_path):
    (tmp_path / "target").write_text("precious")
    with pytest.raises(OSError, match="target"), atomic_folder(tmp_path / "target") as folder:
        (folder / "x").touch()
    assert (tmp_path / "target").read_text() == "precious"


# --- kills ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("replace", "exchanges", "stride"), [(True, True, 1), (True, False, 1), (False, True, 3)])
def test_after_a_kill_at_any_file_access_the_old_or_the_new_is_there(tmp_path, monkeypatch, replace, exchanges, stride):
    if not exchanges:  # a file system that cannot exchange two folders
        monkeypatch.setattr(atomic_files, "exchange_folders", lambda one, other: False)
    for k in count(1, stride):
        place = tmp_path / str(k)
        target = place / "data"
        target.mkdir(parents=True)
        if replace:
            (target / "file").write_text("old")
        killed = killed_before_access(k, place, _write, target, replace, exchanges)
        recover_folder(target)
        content = (target / "file").read_text() if (target / "file").exists() else "nothing"
        assert content in ("new", "old" if replace else "nothing"), k
        _write(target, replace=True)
        assert (target / "file").read_text() == "new"
        left = [path.name for path in place.iterdir() if path != target]
        assert not [name for name in left if "-new-" not in name], (k, left)  # those go by their age
        if not killed:
            break
    assert k > 10


def _write(target, replace, exchanges=True):
    if not exchanges:  # in a process of its own, which has not the caller's patch
        atomic_files.exchange_folders = lambda one, other: False
    with atomic_folder(target, replace=replace) as folder:
        (folder / "file").write_text("new")


def test_scratch_of_a_process_that_lives_stays_and_old_scratch_goes(tmp_path):
    target = tmp_path / "data"
    old, foreign = tmp_path / ".data-new-0123abcd", tmp_path / ".data-x-0123abcd"
    for folder in (old, foreign):
        folder.mkdir()
        os.utime(folder, (0, 0))
    with atomic_folder(target) as folder:
        recover_folder(target)
        (folder / "file").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".data-x-0123abcd", "data"]


def test_a_target_without_its_marker_is_unfinished_and_replaced(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "half").touch()
    with atomic_folder(target, marker="done") as folder:
        (folder / "done").touch()
    assert [path.name for path in target.iterdir()] == ["done"]
    with atomic_folder(target, marker="done") as folder:
        (folder / "done").write_text("second")
    assert (target / "done").read_text() == ""


def test_at_no_moment_of_a_replacement_is_there_nothing_to_read(tmp_path):
    target, seen = tmp_path / "target", []
    _write(target, replace=False)
    done = [
        result for _, result in schedules(lambda: _write(target, True), lambda: seen.append(_read(target)), tmp_path)
    ]
    assert set(done) == {None} and len(seen) == len(done) > 10
    assert set(seen) == {"new"}


def _read(target):
    return (target / "file").read_text()


def test_an_error_of_the_disk_names_the_folder(tmp_path):
    target = tmp_path / "target"
    for error, text in (
        (OSError(errno.ENOSPC, ""), "No space left on device"),
        (MemoryError(), "Cannot allocate memory"),
    ):
        with pytest.raises(OSError, match=f"{text}: '{target}'"), atomic_folder(target):
            raise error
    assert not list(tmp_path.iterdir())
