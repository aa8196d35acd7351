"""The files of a checkpoint directory: written whole or not at all, checked, listed and deleted.

Everything here is about names and bytes; `checkpoint` says what the files hold.
"""

import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from hllm_torchrec.common.atomic_files import sync_folder, write_synced

K = TypeVar("K")
SCHEMA_VERSION = 2
READABLE_VERSIONS = (1, 2)
"""Version 1 had no hash of the marker itself."""
MARKER = "COMPLETE"


class DiskFull(OSError):
    """A checkpoint was not written for want of room; says where and how much it needs."""

    def __init__(self, final: Path, needed: int) -> None:
        """Look how much room there is; final: the checkpoint; needed: its bytes."""
        free = shutil.disk_usage(final.parent).free
        super().__init__(
            f"{final}: not written, the disk is full: it needs {needed:,} bytes, and {free:,} are free; make room "
            "(evaluation.keep_last says how many checkpoints stay). Older checkpoints are as they were"
        )


def create_temporary(final: Path, needed: int = 0) -> Path:
    """Make the directory in which the checkpoint `final` is written, and remove what a crash left behind.

    Raises:
        DiskFull: fewer than `needed` bytes are free; nothing is made.
    """
    finish_interrupted_renames(final.parent)
    for stale in final.parent.glob("step-*.tmp-*"):
        shutil.rmtree(stale)
    final.parent.mkdir(parents=True, exist_ok=True)
    usage = shutil.disk_usage(final.parent)
    if usage.total and usage.free < needed:  # some file systems do not say
        raise DiskFull(final, needed)
    temporary = final.with_name(f"{final.name}.tmp-{secrets.token_hex(4)}")
    temporary.mkdir(parents=True)
    return temporary


def finish_interrupted_renames(directory: Path) -> None:
    """Give their names to checkpoints that a crash caught whole, but between two names; for the run's owner only."""
    for caught in sorted(directory.glob("step-*.tmp-*")):
        final = caught.with_name(caught.name.split(".")[0])
        if not final.exists() and find_damage(caught, check_hashes=False) is None:
            caught.rename(final)


def commit(temporary: Path, final: Path, marker: Mapping[str, Any], files: list[dict[str, tuple[int, str]]]) -> None:
    """Check that all ranks' files are here, write the marker, and give the directory its final name.

    Args:
        temporary: the directory that `start` made.
        final: its name to be; a checkpoint of that name is replaced.
        marker: what the marker says besides the files: step, metric, better.
        files: for each rank, name -> (bytes, SHA-256) of the files it wrote.

    Raises:
        ValueError: a file is not here as its rank wrote it.
    """
    for rank, written in enumerate(files):
        for name, (size, _) in written.items():
            if not (temporary / name).is_file() or (temporary / name).stat().st_size != size:
                raise ValueError(
                    f"rank 0 does not see {temporary / name} as rank {rank} wrote it; "
                    "the checkpoints must be on a file system that all machines share"
                )
    write_synced(temporary / MARKER, marker_text(marker, files))
    sync_folder(temporary)
    replaced = (
        _rename_for_removal(final) if final.exists() else None
    )  # the same step again, after resuming from an earlier one
    temporary.rename(final)
    sync_folder(final.parent)
    if replaced is not None:
        shutil.rmtree(replaced)


def marker_text(marker: Mapping[str, Any], files: list[dict[str, tuple[int, str]]]) -> str:
    """What a checkpoint's marker holds; the arguments are those of `commit`."""
    everything = {name: entry for written in files for name, entry in written.items()}
    contents = {"schema_version": SCHEMA_VERSION, **marker, "world_size": len(files), "files": everything}
    return json.dumps(with_checksum(contents), indent=1)


def with_checksum(contents: Mapping[str, Any]) -> dict[str, Any]:
    """Return a marker's contents with their SHA-256 as `sha256`."""
    rest = {name: value for name, value in contents.items() if name != "sha256"}
    return {**rest, "sha256": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def describe_files(path: Path, names: Iterable[str]) -> dict[str, tuple[int, str]]:
    """Return name -> (bytes, SHA-256) of these files in a directory."""
    return {name: ((path / name).stat().st_size, _sha256(path / name)) for name in names}


def find_damage(path: Path, *, check_hashes: bool = True, share: tuple[int, int] = (0, 1)) -> str | None:
    """Say what is wrong with a checkpoint's files ("is truncated: ..."), or return None.

    Sizes are always compared, contents (SHA-256, about 1 GB/s) if `check_hashes`: of the files of `share`, (which,
    of how many), so that ranks can divide them.
    """
    try:
        marker = read_marker(path)
        if marker["schema_version"] not in READABLE_VERSIONS:
            return f"has schema version {marker['schema_version']}; this program reads {READABLE_VERSIONS}"
        if marker["schema_version"] > 1 and with_checksum(marker) != marker:
            return f"is damaged: the contents of {MARKER} are not what was written"
        part, parts = share
        for number, (name, (size, digest)) in enumerate(marker["files"].items()):
            file = path / name
            if Path(name).name != name or file.is_symlink():
                return f"is damaged: {repr(name)[:100]} leads out of it"
            if not file.is_file():
                return f"is incomplete: {name} is missing"
            if file.stat().st_size != size:
                return f"is truncated: {name} has {file.stat().st_size} bytes instead of {size}"
            if check_hashes and number % parts == part and _sha256(file) != digest:
                return f"is damaged: the contents of {name} are not what was written"
        if not {"extra.json", ".metadata"} <= marker["files"].keys() or not isinstance(marker["world_size"], int):
            return f"is damaged: {MARKER} does not say what it should"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"has no readable {MARKER} file ({type(error).__name__}: {error})"
    return None


def read_marker(path: Path) -> dict[str, Any]:
    """Return a checkpoint's marker: schema_version, step, metric, better, world_size, files; raises as `read_json`."""
    return read_checkpoint_json(path / MARKER)


def read_checkpoint_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a checkpoint.

    Raises:
        ValueError: the file is missing or holds something else; names it.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}: it is damaged; load the checkpoint before it") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds a {type(found).__name__}, no object: load the checkpoint before it")
    return found


def checkpoints_by_step(directory: Path) -> list[Path]:
    """Return the checkpoints of a directory, whole or not, in the order of their steps."""
    found = directory.iterdir() if directory.is_dir() else iter(())
    return sorted((path for path in found if re.fullmatch(r"step-\d+", path.name)), key=lambda p: int(p.name[5:]))


def checkpoints_by_metric(directory: Path) -> list[Path]:
    """Return the checkpoints with a metric, best first; of equals the earliest first.

    What is better is as the newest checkpoint says; if it says nothing, the list is empty.
    """
    paths = [path for path in checkpoints_by_step(directory) if not find_damage(path, check_hashes=False)]
    return sort_by_metric({path: read_marker(path) for path in paths})


def sort_by_metric(markers: Mapping[K, Mapping[str, Any]]) -> list[K]:
    """The keys of markers, given in the order of their steps, as `checkpoints_by_metric` orders them."""
    better = list(markers.values())[-1]["better"] if markers else None
    if better is None:
        return []
    sign = -1 if better == "max" else 1
    compared = [key for key, marker in markers.items() if marker["metric"] is not None]
    return sorted(compared, key=lambda key: sign * markers[key]["metric"])


def prune_checkpoints(newest: Path, keep_last: int) -> None:
    """Delete all but the last few checkpoints, the best, and `newest`; damaged ones stay, to be looked at."""
    whole = [path for path in checkpoints_by_step(newest.parent) if not find_damage(path, check_hashes=False)]
    keep = {newest, *whole[-keep_last:], *checkpoints_by_metric(newest.parent)[:1]}
    for path in whole:
        if path not in keep:
            remove_checkpoint(path)


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint; under another name first, so that half of one is never found under its own."""
    shutil.rmtree(_rename_for_removal(path))


def _rename_for_removal(path: Path) -> Path:
    """Give a checkpoint a name under which nobody looks for one, and which the next `start` removes."""
    doomed = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    path.rename(doomed)
    return doomed


def _sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
