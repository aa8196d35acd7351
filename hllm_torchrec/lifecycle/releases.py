"""Releases and their aliases `current` and `previous`, which move together in one step.

    FOLDER/releases/2023-11-22/   release.json, and links to the published folders: run, items, users
    FOLDER/moves/00003/           links `current` and `previous` to releases, and move.json: cause of the move
    FOLDER/aliases                link to the newest folder of moves; its replacement moves both aliases
    FOLDER/current, previous      links to aliases/current and aliases/previous

So `hllm recommend --run FOLDER/current/run` and `Scorer.of_run(FOLDER / "current" / "run")` use the published run. If a
process is killed, either both aliases have moved or neither has. A program that opens several parts of a release must
resolve the alias once (`Path.resolve`), because the alias may move in between.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from hllm_torchrec.common.atomic_files import atomic_folder, sync_folder, write_synced
from hllm_torchrec.common.locks import hold_lock, lock_wait

RELEASES, MOVES, ALIASES = "releases", "moves", "aliases"
FACTS = "release.json"
PARTS = ("run", "items", "users")
"""Links in a release's folder; the link of a store that does not exist is missing."""


@dataclass(frozen=True)
class Release:
    """Run and stores that a night publishes.

    run, items, users: folders of the run and of the stores (None: no such store); checkpoint: "best", or a folder;
    dataset, version: dataset and version that the run was trained on; trained_until: the first second (UTC) after the
    events that it was trained on; auc: AUC on the night's held-out exposures, None if it was not measured.
    """

    name: str
    run: str
    dataset: str
    version: int
    trained_until: int
    checkpoint: str = "best"
    items: str | None = None
    users: str | None = None
    auc: float | None = None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a release's folder; the links are resolved.

        Raises:
            ValueError: the folder is not a release, or is damaged.
        """
        path = folder / FACTS
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            linked = {part: str((folder / part).resolve()) for part in PARTS if (folder / part).is_symlink()}
            return cls(**dict.fromkeys(PARTS) | facts | linked)
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{path} is not a release ({error}); publish it again with `hllm nightly`") from error


def read_alias(folder: Path, alias: str) -> Release | None:
    """The release of the alias `current` or `previous`; None before the first release is published.

    Raises:
        ValueError: the release of the alias is missing or damaged.
    """
    link = folder / ALIASES / alias
    return Release.read(link.resolve()) if link.is_symlink() else None


def publish(folder: Path, release: Release) -> bool:
    """Make a release `current` and the current one `previous`; returns False if `release` is already current.

    The first release becomes both.

    Raises:
        ValueError: another process is moving the aliases, or the current release is damaged.
    """
    with _write_lock(folder):
        current = read_alias(folder, "current")
        if current is not None and current.name == release.name:
            return False
        _write_release(folder / RELEASES / release.name, release)
        _move(folder, release.name, release.name if current is None else current.name, "publish")
        return True


def rollback(folder: Path, to: str | None = None) -> tuple[str, str]:
    """Make the previous release, or the one with the name `to`, current again; returns the names before and after.

    Without `to`, nothing is done if the last move was a rollback, so that an interrupted rollback can be repeated. To
    go back further, give `to`.

    Raises:
        ValueError: nothing is published, there is no such release, or there is no other release.
    """
    nothing = f"{folder}: nothing is published yet; `hllm nightly` publishes a release"
    if not folder.is_dir():  # taking the lock would create the folder
        raise ValueError(nothing)
    with _write_lock(folder):
        current, previous = read_alias(folder, "current"), read_alias(folder, "previous")
        if current is None or previous is None:
            raise ValueError(nothing)
        last = json.loads((folder / ALIASES / "move.json").read_text(encoding="utf-8"))
        if (last["what"] == "rollback" and to is None) or to == current.name:
            return (previous.name, current.name)
        wanted = previous.name if to is None else to
        if wanted == current.name:
            raise ValueError(f"{folder}: {current.name} is the only release; there is none to go back to")
        known = sorted(path.parent.name for path in (folder / RELEASES).glob(f"*/{FACTS}"))
        if wanted not in known:
            raise ValueError(f"{folder}: no release {wanted!r}; there are {', '.join(known)}")
        Release.read(folder / RELEASES / wanted)
        _move(folder, wanted, current.name, "rollback")
        return (current.name, wanted)


def named_releases(folder: Path) -> list[str]:
    """Names of the releases of both aliases."""
    found = (read_alias(folder, alias) for alias in ("current", "previous"))
    return [release.name for release in found if release is not None]


def nights_folder(run: Path) -> Path | None:
    """Folder of the nights to which a run belongs, given by an alias (FOLDER/current/run) or as FOLDER/runs/NIGHT.

    None if the run belongs to no nights, or no release of them was published.
    """
    above = (run.absolute().parent.parent, run.resolve().parent.parent)
    return next((folder for folder in above if (folder / ALIASES).is_symlink()), None)


@contextmanager
def _write_lock(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with hold_lock(folder / ".lock", f"{folder}: another process is moving its aliases", wait=lock_wait()):
        yield


def _write_release(target: Path, release: Release) -> None:
    """Write a release's folder: facts, and relative links, so that the folder of all nights can be moved."""
    # A release of this name may exist: its publishing was killed before the move, or it was published and rolled back.
    # Nothing reads the former, and the latter is replaced completely.
    with atomic_folder(target, replace=True) as new:
        parts = {part: path for part in PARTS if (path := getattr(release, part)) is not None}
        for part, path in parts.items():
            (new / part).symlink_to(os.path.relpath(Path(path).resolve(), target.resolve()))
        facts = {name: value for name, value in asdict(release).items() if name not in PARTS}
        write_synced(new / FACTS, json.dumps(facts, indent=1) + "\n")


def _move(folder: Path, current: str, previous: str, what: str) -> None:
    """Point both aliases to releases, by replacing one link."""
    taken = [int(path.name) for path in (folder / MOVES).glob("[0-9]*") if path.name.isdecimal()]
    number = f"{max(taken, default=0) + 1:05d}"
    with atomic_folder(folder / MOVES / number) as new:
        for alias, name in (("current", current), ("previous", previous)):
            (new / alias).symlink_to(Path("..", "..", RELEASES, name))
        facts = {"what": what, "at": datetime.now(UTC).isoformat(timespec="seconds")}
        write_synced(new / "move.json", json.dumps(facts | {"current": current, "previous": previous}) + "\n")
    _replace_link(folder / ALIASES, Path(MOVES, number))
    for alias in ("current", "previous"):
        if not (folder / alias).is_symlink():
            _replace_link(folder / alias, Path(ALIASES, alias))
    sync_folder(folder)


def _replace_link(link: Path, target: Path) -> None:
    temporary = link.with_name(f".{link.name}-new")
    temporary.unlink(missing_ok=True)  # left by a process that was killed, because this one holds the lock
    temporary.symlink_to(target)
    temporary.replace(link)
