import pytest

from hllm_torchrec.common.atomic_files import atomic_folder


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
