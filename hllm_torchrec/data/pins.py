"""Pins: which versions of a dataset runs were trained on, so that `prune` keeps them while the runs exist."""

import json
from collections.abc import Iterator
from pathlib import Path

from hllm_torchrec.common.atomic_files import replace_file
from hllm_torchrec.common.hashing import hash_texts
from hllm_torchrec.common.urls import url_of

_PINS = "pins"


def pin_version(root: Path, version: int, run: Path | str) -> bool:
    """Note that `run` reads a version of the dataset in `root`; returns False if the dataset cannot be written to."""
    place, path = _pin_of(root, run)
    text = json.dumps({"run": place, "version": version}) + "\n"
    try:
        path.parent.mkdir(exist_ok=True)
        for left in path.parent.glob(f".{path.name}-*"):  # of this run, killed while it pinned: only it has this file
            left.unlink()
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            replace_file(path, text)
    except OSError:  # a read-only dataset: nobody prunes it from here either
        return False
    return True


def remove_pin(root: Path, run: Path | str) -> None:
    """Remove the pin of `run`, if there is one."""
    try:
        _pin_of(root, run)[1].unlink(missing_ok=True)
    except OSError:  # read-only: it was not pinned either
        pass


def _pin_of(root: Path, run: Path | str) -> tuple[str, Path]:
    """Place of a run as its pin names it, and the pin's file."""
    place = url_of(run) or str(Path(run).absolute())
    return place, root / _PINS / f"{hash_texts([place])[:16]}.json"


def pinned_versions(root: Path) -> dict[int, list[str]]:
    """Runs that exist by the version that they pin.

    A run that cannot be looked for exists: one at a URL, or in a folder that is not here (another machine, a disk that
    is not mounted). If it is gone, remove its pin.
    """
    found: dict[int, list[str]] = {}
    for _, run, version in _pins(root):
        if _exists(run):
            found.setdefault(version, []).append(run)
    return found


def remove_stale_pins(root: Path) -> None:
    """Remove the pins of runs that are gone."""
    for path, run, _ in _pins(root):
        if not _exists(run):
            path.unlink(missing_ok=True)


def _pins(root: Path) -> Iterator[tuple[Path, str, int]]:
    """File, run and version of each pin.

    Raises:
        ValueError: a pin is damaged: no version may be removed then.
    """
    for path in sorted((root / _PINS).glob("*.json")) if (root / _PINS).is_dir() else ():
        try:
            pin = json.loads(path.read_text(encoding="utf-8"))
            yield path, str(pin["run"]), int(pin["version"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); remove it if its run is gone") from error


def _exists(run: str) -> bool:
    if url_of(run) is not None:
        return True
    try:
        path = Path(run)
        found = (path / "config.yaml").exists() or (path.is_dir() and any(path.iterdir()))
        return found or not path.parent.is_dir()
    except OSError:  # a disk that does not answer: not a reason to remove its version
        return True
