"""Versions of a dataset: immutable files; the manifest of a version lists the files that belong to it.

    manifest.json            manifest of the newest version; its replacement is the commit
    versions/00002.json      manifest of each existing version (a new dataset has none)
    items.parquet, ...       base of version 1 (layout: `data.dataset`)
    appends/00002/           files that version 2 added (`data.append`)
    bases/00009/             a base, or files of one, that version 9 wrote: by compacting, `prepare --extend` or
                             `--overwrite`, or forgetting

A writer holds the dataset's lock, writes its files into a hidden draft folder, syncs and renames the folder, and then
replaces `manifest.json`. If a writer is killed, the dataset has either the old or the new version; the next writer
removes all other files that the killed writer left. Readers use the files of the manifest that they opened, so they
never see files of another version.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hllm_torchrec.common.atomic_files import replace_file, sync_folder, sync_tree
from hllm_torchrec.common.locks import hold_lock, lock_wait
from hllm_torchrec.common.machine_errors import path_in_errors
from hllm_torchrec.data.manifest import (
    MANIFEST,
    SCHEMA_VERSION_CHAIN,
    VERSIONS,
    file_facts,
    fingerprint_of,
    listed_files,
    read_manifest,
    version_of,
)

APPENDS, BASES = "appends", "bases"
_DRAFT = ".draft-"
_NUMBERED = re.compile(r"\d{5,}")
_LOCK = ".lock"
_REMOVED, _SUPERSEDED, _PENDING = ".removed-", ".superseded-", ".pending-"


@contextmanager
def write_lock(root: Path) -> Iterator[None]:
    """Context manager that holds the lock of the dataset in `root`; first removes the files that a killed writer left.

    Raises:
        ValueError: `root` is not a dataset, or another process holds the lock for longer than HLLM_LOCK_WAIT seconds.
    """
    if not (root / MANIFEST).is_file():
        raise ValueError(
            f"{root} is not a prepared dataset: no {MANIFEST}. Make one with `hllm prepare --output {root}`"
        )
    with hold_lock(root / _LOCK, f"{root}: another process is writing to this dataset", wait=lock_wait()):
        _sweep(root)
        yield


def _sweep(root: Path) -> None:
    """Remove drafts and files of versions that were not committed; complete interrupted replacements and removals."""
    newest = newest_version(root)
    for parent in (root / APPENDS, root / BASES):
        for folder in parent.iterdir() if parent.is_dir() else ():
            unfinished = _NUMBERED.fullmatch(folder.name) and int(folder.name) > newest
            if unfinished or folder.name.startswith(_DRAFT):
                shutil.rmtree(folder)
    for pattern in (f".{MANIFEST}-*", f".{_LOCK}.holder-*", f"{VERSIONS}/.*.json-*"):
        for file in root.glob(pattern):  # temporary files that `replace_file` has not renamed
            file.unlink()
    for file in (root / VERSIONS).glob("*.json"):
        if _NUMBERED.fullmatch(file.stem) and int(file.stem) > newest:
            file.unlink()
    finish_replacements(root)
    _finish_removal(root)


def newest_version(root: Path) -> int:
    """Number of the newest version; if the manifest is damaged, the largest version number in a file name."""
    try:
        return version_of(read_manifest(root, check_files=False))
    except ValueError:
        names = [path.stem for parent in (APPENDS, BASES, VERSIONS) for path in (root / parent).glob("*")]
        return max([1, *(int(name) for name in names if _NUMBERED.fullmatch(name))])


@contextmanager
def draft_folder(root: Path, parent: str, version: int) -> Iterator[Path]:
    """Context manager: yields an empty folder that becomes `root`/`parent`/`version` at the end of the block.

    A folder `scratch` next to it is for temporary files. If the folder is still empty at the end, or if the block
    raises an exception, nothing is kept.
    """
    (root / parent).mkdir(exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=_DRAFT, dir=root / parent))
    try:
        new = work / "new"
        new.mkdir()
        (work / "scratch").mkdir()
        yield new
        target = root / parent / version_name(version)
        if any(new.iterdir()):
            with path_in_errors(target):
                sync_tree(new)
                new.rename(target)
                sync_folder(target.parent)
                sync_folder(root)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if not any((root / parent).iterdir()):
            (root / parent).rmdir()


def version_name(version: int) -> str:
    """Name of a version's folder and of its manifest."""
    return f"{version:05d}"


def folder_facts(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file below `folder`, by its name in the dataset, in which the folder is `name`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {f"{name}/{path}": facts for path, facts in file_facts(folder, paths).items()}


def commit_version(root: Path, version: int, manifest: dict[str, Any]) -> None:
    """Make `manifest` the newest version, with the number `version`, in one step.

    `manifest` must have all `files`; its version, parent, fingerprint and schema version are set here.
    """
    (root / VERSIONS).mkdir(exist_ok=True)
    parent = None
    try:
        before = read_manifest(root, check_files=False)
    except ValueError:
        pass  # a damaged dataset that is overwritten
    else:
        parent = {"version": version_of(before), "fingerprint": before["fingerprint"]}
        kept = root / VERSIONS / f"{version_name(version_of(before))}.json"
        if not kept.is_file():  # version 1 was written by `prepare`, which does not write to versions/
            replace_file(kept, (root / MANIFEST).read_text(encoding="utf-8"))
    text = _manifest_text({**manifest, "version": version, "parent": parent})
    replace_file(root / VERSIONS / f"{version_name(version)}.json", text)
    sync_folder(root)
    replace_file(root / MANIFEST, text)


def _manifest_text(manifest: dict[str, Any]) -> str:
    """Text of a version's manifest; sets the schema version and the fingerprint."""
    fingerprint = fingerprint_of(dict(sorted(manifest["files"].items())))
    complete = {**manifest, "schema_version": SCHEMA_VERSION_CHAIN, "fingerprint": fingerprint}
    return json.dumps(complete, indent=1) + "\n"


def replace_version(root: Path, version: int, manifest: dict[str, Any]) -> None:
    """Replace the manifest of a version that is not the newest, in one step; `remove_superseded` removes its old files.

    Only for contents that must no longer be read (`data.forgetting`).
    """
    kept = root / VERSIONS / f"{version_name(version)}.json"
    old = kept.read_text(encoding="utf-8")
    if old == _manifest_text(manifest):
        return
    fingerprint = json.loads(old)["fingerprint"][:16]
    replace_file(kept.with_name(f"{_SUPERSEDED}{version_name(version)}-{fingerprint}.json"), old)
    replace_file(kept, _manifest_text(manifest))


def plan_replacements(root: Path, version: int, manifests: Mapping[int, dict[str, Any]]) -> None:
    """Save manifests with which `finish_replacements` replaces those of versions when `version` is committed."""
    (root / VERSIONS).mkdir(exist_ok=True)
    for number, manifest in manifests.items():
        name = f"{_PENDING}{version_name(version)}-{version_name(number)}.json"
        replace_file(root / VERSIONS / name, _manifest_text(manifest))


def finish_replacements(root: Path) -> None:
    """Carry out the planned replacements of committed versions, and remove the plans of versions not committed."""
    newest = newest_version(root)
    for path in sorted((root / VERSIONS).glob(f"{_PENDING}*.json")):
        version, number = map(int, path.stem.removeprefix(_PENDING).split("-"))
        if version <= newest:
            replace_version(root, number, json.loads(path.read_text(encoding="utf-8")))
        path.unlink()


def superseded_fingerprints(root: Path) -> list[str]:
    """Fingerprints that replaced versions had before, until `remove_superseded` removes their old files."""
    manifests = sorted((root / VERSIONS).glob(f"{_SUPERSEDED}*.json"))
    return [str(json.loads(path.read_text(encoding="utf-8"))["fingerprint"]) for path in manifests]


def remove_superseded(root: Path) -> int:
    """Remove the old files of replaced versions that no version uses; returns the freed bytes. Hold the lock."""
    for path in (root / VERSIONS).glob(f"{_SUPERSEDED}*.json"):
        path.rename(path.with_name(path.name.replace(_SUPERSEDED, _REMOVED, 1)))
    return _finish_removal(root)


def kept_versions(root: Path) -> dict[int, dict[str, Any]]:
    """Version number -> manifest, for each version whose manifest can be read."""
    numbers = {
        newest_version(root),
        *(int(f.stem) for f in (root / VERSIONS).glob("*.json") if _NUMBERED.fullmatch(f.stem)),
    }
    found = {}
    for version in sorted(numbers):
        try:
            found[version] = read_manifest(root, version, check_files=False)
        except ValueError:
            continue  # damaged: it cannot be opened
    return found


def remove_versions(root: Path, pinned: Collection[int] = ()) -> tuple[list[int], int]:
    """Remove all versions except the newest and the pinned ones, and the files that only they use. Hold the lock.

    Only files in the manifest of a removed version are removed. Returns the versions' numbers and the freed bytes.
    """
    versions, newest = kept_versions(root), newest_version(root)
    removed = [version for version in versions if version != newest and version not in pinned]
    for version in removed:
        # Rename the manifest before files are removed, so that a listed version is always complete. The next writer
        # completes a removal that was killed.
        name = f"{version_name(version)}.json"
        (root / VERSIONS / name).rename(root / VERSIONS / f"{_REMOVED}{name}")
    return removed, _finish_removal(root)


def _finish_removal(root: Path) -> int:
    """Remove the files of removed versions that no existing version uses; returns the freed bytes."""
    manifests = sorted((root / VERSIONS).glob(f"{_REMOVED}*.json"))
    if not manifests:
        return 0
    needed = {name for manifest in kept_versions(root).values() for name in listed_files(manifest)}
    freed = 0
    for path in manifests:
        for name, facts in listed_files(json.loads(path.read_text(encoding="utf-8"))).items():
            if name not in needed and (root / name).is_file() and not (root / name).is_symlink():
                (root / name).unlink()
                freed += facts["bytes"]
                _remove_empty(root, (root / name).parent)
        path.unlink()
    return freed


def _remove_empty(root: Path, folder: Path) -> None:
    """Remove an empty folder, and the folders above it that become empty."""
    while folder != root and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent
