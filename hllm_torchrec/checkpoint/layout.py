"""Files of a checkpoint directory: atomic publication, integrity checks, listing and deletion.

This module handles only names and bytes of files; `checkpoint/load.py` describes their contents.
"""

import json
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from hllm_torchrec.common.atomic_files import exchange_folders, sync_folder, write_synced
from hllm_torchrec.common.hashing import hash_file, hash_json
from hllm_torchrec.common.machine_errors import is_machine_error, path_in_errors

K = TypeVar("K")
SCHEMA_VERSION = 2
READABLE_VERSIONS = (1, 2)
"""Schema versions that can be read; version 1 has no hash of the marker itself."""
MARKER = "COMPLETE"
_LONGEST_DAMAGE = 400
"""Maximum number of characters of a description of damage."""


class DiskFull(OSError):
    """A checkpoint was not written because the disk is full; the message names the path and the bytes needed."""

    def __init__(self, final: Path, needed: int) -> None:
        """Build the message with the free space; final: the checkpoint's path; needed: its size in bytes."""
        free = shutil.disk_usage(final.parent).free
        super().__init__(
            f"{final}: not written, the disk is full: it needs {needed:,} bytes, and {free:,} are free; make room "
            "(evaluation.keep_last says how many checkpoints stay). Older checkpoints are unchanged"
        )


def create_temporary(final: Path, needed: int = 0) -> Path:
    """Create the temporary directory in which the checkpoint `final` is written, and remove leftovers of a crash.

    needed: size of the checkpoint in bytes.

    Raises:
        DiskFull: fewer than `needed` bytes are free; the directory is not created.
    """
    # This must precede the deletion of the leftovers, which may include a complete checkpoint.
    finish_interrupted_renames(final.parent)
    for stale in final.parent.glob("step-*.tmp-*"):
        shutil.rmtree(stale)
    final.parent.mkdir(parents=True, exist_ok=True)
    usage = shutil.disk_usage(final.parent)
    if usage.total and usage.free < needed:  # some file systems report a total of 0
        raise DiskFull(final, needed)
    temporary = final.with_name(f"{final.name}.tmp-{secrets.token_hex(4)}")
    temporary.mkdir(parents=True)
    return temporary


def finish_interrupted_renames(directory: Path) -> None:
    """Rename complete checkpoints that a crash left under a temporary name. Only the job that owns the run may call it.

    In another job's view, a directory that looks abandoned may be about to be renamed or deleted by its owner.
    """
    for leftover in sorted(directory.glob("step-*.tmp-*")):
        final = leftover.with_name(leftover.name.split(".")[0])
        if not final.exists() and find_damage(leftover, check_hashes=False) is None:
            leftover.rename(final)


def commit(temporary: Path, final: Path, marker: Mapping[str, Any], files: list[dict[str, tuple[int, str]]]) -> None:
    """Check that all ranks' files are present, write the marker, and rename the directory to its final name.

    Args:
        temporary: the directory from `create_temporary`.
        final: final path of the directory; an existing checkpoint with this path is replaced.
        marker: contents of the marker in addition to the files: step, metric, better.
        files: for each rank, name -> (bytes, SHA-256) of the files that it wrote.

    Raises:
        ValueError: a file is missing or does not have the size that its rank wrote.
    """
    for rank, written in enumerate(files):
        for name, (size, _) in written.items():
            if not (temporary / name).is_file() or (temporary / name).stat().st_size != size:
                raise ValueError(
                    f"rank 0 does not see {temporary / name} as rank {rank} wrote it; "
                    "the checkpoints must be on a file system that all machines share"
                )
    # The rename is the commit point. The other files are synced already; the marker and the directory's entries must be
    # on the disk before the new name is.
    write_synced(temporary / MARKER, marker_text(marker, files))
    sync_folder(temporary)
    # `final` already exists if the run was resumed from an earlier step and has reached this step again, or if
    # `erased_rows` changes it. If the file system cannot exchange two directories, the existing checkpoint is renamed
    # first. After a crash between the two renames, both checkpoints are complete and have temporary names, and
    # `finish_interrupted_renames` restores one of them.
    replaced = None
    if final.exists():
        replaced = temporary if exchange_folders(temporary, final) else _rename_for_removal(final)
    if replaced is not temporary:
        temporary.rename(final)
    sync_folder(final.parent)
    if replaced is not None:
        shutil.rmtree(replaced)


def marker_text(marker: Mapping[str, Any], files: list[dict[str, tuple[int, str]]]) -> str:
    """Return the text of a checkpoint's marker; arguments as in `commit`."""
    everything = {name: entry for written in files for name, entry in written.items()}
    contents = {"schema_version": SCHEMA_VERSION, **marker, "world_size": len(files), "files": everything}
    return json.dumps(with_checksum(contents), indent=1)


def with_checksum(contents: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents of a marker together with their own SHA-256 as `sha256`."""
    rest = {name: value for name, value in contents.items() if name != "sha256"}
    return {**rest, "sha256": hash_json(rest)}


def describe_files(path: Path, names: Iterable[str]) -> dict[str, tuple[int, str]]:
    """Return name -> (bytes, SHA-256) of these files in a directory."""
    return {name: ((path / name).stat().st_size, hash_file(path / name)) for name in names}


def find_damage(path: Path, *, check_hashes: bool = True, share: tuple[int, int] = (0, 1)) -> str | None:
    """Describe the damage of a checkpoint's files ("is truncated: ..."), or return None.

    Sizes are always compared. Contents (SHA-256, about 1 GB/s) are compared only if `check_hashes`, and only for this
    rank's share of the files: share = (index, number of shares).

    Raises:
        OSError: the machine could not read a file (permissions, too many open files, ...), which does not mean that it
            is damaged; the message contains the path.
    """
    return examine(path, check_hashes=check_hashes, share=share)[1]


def examine(path: Path, *, check_hashes: bool, share: tuple[int, int] = (0, 1)) -> tuple[dict[str, Any], str | None]:
    """Return (marker of a checkpoint, its damage as `find_damage`); an unreadable marker is returned as {}."""
    marker: dict[str, Any] = {}
    try:
        marker = read_marker(path)
        damage = _damage_of(path, marker, check_hashes, share)
    # A damaged marker may have any content, so that its use may raise any of these errors.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if is_machine_error(error):
            raise
        damage = f"has no readable {MARKER} file ({type(error).__name__}: {error})"
    # The description may quote values of a damaged marker, which may be of any length.
    return marker, damage if damage is None or len(damage) <= _LONGEST_DAMAGE else f"{damage[:_LONGEST_DAMAGE]}..."


def _damage_of(path: Path, marker: dict[str, Any], check_hashes: bool, share: tuple[int, int]) -> str | None:
    """Compare the files of a checkpoint with its marker, as `find_damage`; a malformed marker may raise any error."""
    if marker["schema_version"] not in READABLE_VERSIONS:
        return f"has schema version {marker['schema_version']}; this program reads {READABLE_VERSIONS}"
    if marker["schema_version"] > 1 and with_checksum(marker) != marker:
        return f"is damaged: the contents of {MARKER} are not what was written"
    part, parts = share
    for number, (name, (size, digest)) in enumerate(marker["files"].items()):
        file = path / name
        if not isinstance(size, int):
            return f"is damaged: {MARKER} gives no size of {name}"
        # The marker may come from an untrusted source: names must not point outside of the directory.
        if Path(name).name != name or file.is_symlink():
            return f"is damaged: {repr(name)[:100]} leads out of it"
        with path_in_errors(file):
            if not file.is_file():
                return f"is incomplete: {name} is missing"
            if (found := file.stat().st_size) != size:
                return f"is truncated: {name} has {found} bytes instead of {size}"
            if check_hashes and number % parts == part and hash_file(file) != digest:
                return f"is damaged: the contents of {name} are not what was written"
    if not {"extra.json", ".metadata"} <= marker["files"].keys() or not isinstance(marker["world_size"], int):
        return f"is damaged: {MARKER} is malformed"
    return None


def read_marker(path: Path) -> dict[str, Any]:
    """Return the marker of a checkpoint: schema_version, step, metric, better, world_size, files, sha256.

    Raises as `read_checkpoint_json`.
    """
    return read_checkpoint_json(path / MARKER)


def read_checkpoint_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a checkpoint.

    Raises:
        ValueError: the file is missing or does not contain a JSON object; the message contains the path.
        OSError: as `find_damage`.
    """
    try:
        with path_in_errors(path):
            found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if is_machine_error(error):
            raise
        raise ValueError(f"{path}: {error}: it is damaged; load the checkpoint before it") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds a {type(found).__name__}, not a JSON object: load the checkpoint before it")
    return found


def checkpoints_by_step(directory: Path) -> list[Path]:
    """Return the checkpoints of a directory, complete or damaged, in the order of their steps."""
    found = directory.iterdir() if directory.is_dir() else iter(())
    return sorted((path for path in found if re.fullmatch(r"step-\d+", path.name)), key=lambda p: int(p.name[5:]))


def checkpoints_by_metric(directory: Path) -> list[Path]:
    """Return the complete checkpoints that have a metric, best first; ties in the order of their steps.

    The marker of the newest checkpoint states whether larger or smaller is better; if it does not, the list is empty.
    """
    return sort_by_metric(_complete_markers(directory))


def _complete_markers(directory: Path) -> dict[Path, dict[str, Any]]:
    """Return checkpoint -> marker for checkpoints whose files have the right sizes, in the order of their steps."""
    while True:
        paths = checkpoints_by_step(directory)
        examined = {path: examine(path, check_hashes=False) for path in paths}
        # The run may have pruned a checkpoint, or replaced it between the reading of its marker and of its files, which
        # looks like damage. Real damage gives the same result again, so repeat until two results are equal and all
        # listed checkpoints still exist.
        damaged = {path: found for path, found in examined.items() if found[1] is not None}
        again = {path: examine(path, check_hashes=False) for path in damaged}
        if again == damaged and all(path.exists() for path in paths):
            return {path: marker for path, (marker, damage) in examined.items() if damage is None}


def sort_by_metric(markers: Mapping[K, Mapping[str, Any]]) -> list[K]:
    """Sort the keys of `markers`, which are in the order of their steps, as `checkpoints_by_metric` does."""
    better = list(markers.values())[-1]["better"] if markers else None
    if better is None:
        return []
    sign = -1 if better == "max" else 1
    compared = [key for key, marker in markers.items() if marker["metric"] is not None]
    return sorted(compared, key=lambda key: sign * markers[key]["metric"])


def prune_checkpoints(newest: Path, keep_last: int) -> None:
    """Delete all complete checkpoints except the `keep_last` newest, the best, and `newest`; keep damaged ones."""
    markers = _complete_markers(newest.parent)
    complete = list(markers)
    keep = {newest, *complete[-keep_last:], *sort_by_metric(markers)[:1]}
    for path in complete:
        if path not in keep:
            remove_checkpoint(path)


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that no reader finds a partly deleted checkpoint."""
    shutil.rmtree(_rename_for_removal(path))


def _rename_for_removal(path: Path) -> Path:
    """Rename a checkpoint to a temporary name, which readers ignore, and return the new path.

    If a crash prevents the deletion, the next `create_temporary` restores the checkpoint if it is still complete and
    its final name is free; otherwise it removes the directory.
    """
    doomed = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    path.rename(doomed)
    return doomed
