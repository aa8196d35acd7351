"""Aliases: they move together, survive a move of their folder and a kill at any file access, and can be taken back."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from hllm_torchrec.lifecycle.releases import Release, publish, read_alias, rollback
from tests.helpers.schedules import killed_before_access


def release(folder: Path, name: str) -> Release:
    for part in ("runs", "items"):
        (folder / part / name).mkdir(parents=True, exist_ok=True)
        (folder / part / name / "file").write_text(name)
    return Release(
        name, str(folder / "runs" / name), "/data/shop", 3, 1_700_000_000, items=str(folder / "items" / name)
    )


def names(folder: Path) -> tuple[str, ...]:
    """Current and previous; checks that the links of `current` lead to its own parts."""
    found = [read_alias(folder, alias) for alias in ("current", "previous")]
    if found[0] is not None:
        assert (folder / "current" / "run" / "file").read_text() == found[0].name
        assert found[0].run == str((folder / "runs" / found[0].name).resolve())
        assert not (folder / "current" / "users").exists() and found[0].users is None
    return tuple(one.name for one in found if one is not None)


def test_the_newest_is_current_and_the_one_before_previous(tmp_path: Path) -> None:
    assert names(tmp_path) == ()
    assert publish(tmp_path, release(tmp_path, "a"))
    assert names(tmp_path) == ("a", "a")
    assert publish(tmp_path, release(tmp_path, "b")) and names(tmp_path) == ("b", "a")
    assert not publish(tmp_path, release(tmp_path, "b")) and names(tmp_path) == ("b", "a")
    assert (tmp_path / "previous" / "items" / "file").read_text() == "a"
    moved = shutil.move(tmp_path, tmp_path.with_name("elsewhere"))
    assert names(Path(moved)) == ("b", "a")


def test_a_rollback_can_be_repeated_and_named(tmp_path: Path) -> None:
    for name in "abc":
        publish(tmp_path, release(tmp_path, name))
    for _ in range(2):
        assert rollback(tmp_path) == ("c", "b") and names(tmp_path) == ("b", "c")
    assert rollback(tmp_path, "a") == ("b", "a") and names(tmp_path) == ("a", "b")
    with pytest.raises(ValueError, match="no release 'd'; there are a, b, c"):
        rollback(tmp_path, "d")
    publish(tmp_path, release(tmp_path, "e"))  # the night after a rollback
    assert names(tmp_path) == ("e", "a") and rollback(tmp_path) == ("e", "a")


def test_without_another_release_there_is_nothing_to_go_back_to(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing is published yet; `hllm nightly` publishes a release"):
        rollback(tmp_path)
    publish(tmp_path, release(tmp_path, "a"))
    with pytest.raises(ValueError, match="a is the only release; there is none to go back to"):
        rollback(tmp_path)


def test_a_damaged_release_is_named(tmp_path: Path) -> None:
    publish(tmp_path, release(tmp_path, "a"))
    (tmp_path / "releases" / "a" / "release.json").write_text("{}")
    with pytest.raises(ValueError, match=r"releases/a/release\.json is not a release .*publish it again"):
        read_alias(tmp_path, "current")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["publish", "rollback"])
def test_a_move_that_is_killed_anywhere_happened_or_did_not_and_can_be_repeated(tmp_path: Path, what: str) -> None:
    begun, outcomes, k = tmp_path / "begun", set(), 0
    for name in "ab":
        publish(begun, release(begun, name))
    release(begun, "c")
    while True:
        k += 3  # every third access: a process for each is what this test costs
        folder = shutil.copytree(begun, tmp_path / str(k), symlinks=True)
        new = release(folder, "c")
        before, after = (("b", "a"), ("c", "b")) if what == "publish" else (("b", "a"), ("a", "b"))
        move: tuple[Any, ...] = (publish, folder, new) if what == "publish" else (rollback, folder)
        killed = killed_before_access(k, folder, *move)
        outcomes.add(names(folder))
        assert names(folder) in (before, after)
        move[0](*move[1:])
        assert names(folder) == after
        if not killed:
            break
    assert k > 30 and outcomes == {before, after}
