"""Pins: files in a dataset that record the version of each run; `prune` keeps this version while the run exists."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from hllm_torchrec.common.atomic_files import replace_file
from hllm_torchrec.common.hashing import hash_texts
from hllm_torchrec.common.urls import url_of

_PINS = "pins"


def pin_version(root: Path, version: int, run: Path | str) -> bool:
    """Record that `run` uses a version of the dataset in `root`; returns False if the dataset cannot be written to."""
    location, path = _pin_of(root, run)
    text = json.dumps({"run": location, "version": version}) + "\n"
    try:
        path.parent.mkdir(exist_ok=True)
        for left in path.parent.glob(f".{path.name}-*"):  # temporary file of this run, which was killed while it pinned
            left.unlink()
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            replace_file(path, text)
    except OSError:  # a read-only dataset cannot be pruned from here either
        return False
    return True


def remove_pin(root: Path, run: Path | str) -> None:
    """Remove the pin of `run`, if there is one."""
    with suppress(OSError):  # a read-only dataset has no pin either
        _pin_of(root, run)[1].unlink(missing_ok=True)


def _pin_of(root: Path, run: Path | str) -> tuple[str, Path]:
    """(URL or absolute path of a run as written in its pin, path of the pin's file)."""
    location = url_of(run) or str(Path(run).absolute())
    return location, root / _PINS / f"{hash_texts([location])[:16]}.json"


def pinned_versions(root: Path) -> dict[int, list[str]]:
    """Version -> existing runs that pin it.

    A run that cannot be checked counts as existing: a run at a URL, or in a folder whose parent is missing (another
    machine, a disk that is not mounted). If such a run was deleted, remove its pin.
    """
    found: dict[int, list[str]] = {}
    for _, run, version in _pins(root):
        if _exists(run):
            found.setdefault(version, []).append(run)
    return found


def remove_stale_pins(root: Path) -> None:
    """Remove the pins of runs that no longer exist."""
    for path, run, _ in _pins(root):
        if not _exists(run):
            path.unlink(missing_ok=True)


def _pins(root: Path) -> Iterator[tuple[Path, str, int]]:
    """File, run and version of each pin.

    Raises:
        ValueError: a pin is damaged, so no version may be removed.
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
    except OSError:  # a disk that does not answer is not a reason to remove the version
        return True
