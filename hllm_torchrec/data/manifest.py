"""`manifest.json`: the description of a prepared dataset, and a cheap check of its files by presence and size."""

import json
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hllm_torchrec.common.hashing import hash_files, hash_texts
from hllm_torchrec.common.yaml_files import abbreviate
from hllm_torchrec.data.manifest_schema import find_manifest_problem

SCHEMA_VERSION = 1
"""Schema version of a dataset without appended versions."""
SCHEMA_VERSION_CHAIN = 2
"""Schema version of a dataset version with a base and appends (`data.versions`)."""
VERSIONS = "versions"
"""Folder of the manifests of all versions."""
MANIFEST = "manifest.json"
EVENTS = "events"
"""Folder of the event files, in the folder of a base or of an append."""
ITEM_COUNTS = "training_item_counts.npy"


def data_files(root: Path) -> list[Path]:
    """All files under `root`, sorted by name, except the manifest and the token stores."""
    found = [
        p for p in root.rglob("*") if p.is_file() and p.name != MANIFEST and p.relative_to(root).parts[0] != "tokens"
    ]
    return sorted(found, key=lambda p: p.relative_to(root).as_posix())


def file_facts(root: Path, paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file, by its path relative to `root`."""
    hashes = hash_files(paths, "checksums").items()
    return {
        path.relative_to(root).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256} for path, sha256 in hashes
    }


def fingerprint_of(files: Mapping[str, Mapping[str, Any]]) -> str:
    """Hash of the names and contents of files."""
    return hash_texts(f"{name} {facts['sha256']}" for name, facts in files.items())


def write_manifest(root: Path, manifest: dict[str, Any]) -> None:
    """Write `manifest.json`; adds the schema version, the files (size, hash) and the fingerprint of their contents.

    Event files (`data.event_files`) contain the same events as the sequences in another format. They are listed
    separately, and the fingerprint does not depend on them.
    """
    facts = file_facts(root, data_files(root))
    files = {name: one for name, one in facts.items() if not name.startswith(f"{EVENTS}/")}
    complete = {"schema_version": SCHEMA_VERSION, **manifest, "fingerprint": fingerprint_of(files), "files": files}
    complete["event_files"] = {name: one for name, one in facts.items() if name not in files}
    (root / MANIFEST).write_text(json.dumps(complete, indent=1) + "\n", encoding="utf-8")


def listed_files(manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """File name -> size and hash, for every file of a version."""
    return {**manifest["files"], **manifest.get("event_files", {})}


def files_of_chain(manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The `listed_files` that a version with appends uses: all except the Parquet sequences and the item counts."""
    return {
        name: facts
        for name, facts in listed_files(manifest).items()
        if not name.startswith("sequences/") and name != ITEM_COUNTS
    }


def version_of(manifest: Mapping[str, Any]) -> int:
    """Number of the version that a manifest describes."""
    return int(manifest.get("version", 1))


def chain_base(manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """The base of a version: `folder` ("": the dataset itself), `event_files`, `cuts` and `seconds`.

    cuts: seconds and source rows at which a split by time divided the base. The result is None for a dataset of an
    earlier release without event files.
    """
    if "base" in manifest:
        return dict(manifest["base"])
    if not manifest.get("event_files"):
        return None
    split = manifest["split"]
    return {
        "folder": "",
        "event_files": sorted(manifest["event_files"]),
        "cuts": [split.get("cut_timestamps", []), split.get("cut_orders", [])],
        "seconds": manifest["seconds"],
    }


def manifest_path(root: Path, version: int | None = None) -> Path:
    """Path of the manifest of a version (None: the newest).

    Raises:
        ValueError: there is no such version; the message lists the existing ones.
    """
    path = root / MANIFEST
    if version is None or not path.is_file():
        return path
    kept = root / VERSIONS / f"{version:05d}.json"
    if kept.is_file():
        return kept
    if not (root / VERSIONS).is_dir() and version == 1:  # a dataset without appends
        return path
    known = sorted(int(file.stem) for file in (root / VERSIONS).glob("*.json") if file.stem.isdigit())
    raise ValueError(f"{root}: no version {version}; it has {', '.join(map(str, known)) or '1'}. Choose one of them")


def read_manifest(root: Path, version: int | None = None, *, check_files: bool = True) -> dict[str, Any]:
    """Read the manifest of a version (None: the newest) of the dataset in `root`; check its files' presence and sizes.

    Hashes are not checked: that would read the complete dataset at each start.

    Raises:
        ValueError: `root` is not a dataset or has an unsupported schema version; or a file is missing, is a link, is
            not a regular file, or has a wrong size. The message names the folder or file, and the remedy.
    """
    path = manifest_path(root, version)
    if not path.is_file():
        raise ValueError(
            f"{root} is not a prepared dataset: no {MANIFEST}. Make one with `hllm prepare --output {root}`"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
        raise ValueError(f"{path} is damaged ({error}); prepare the dataset again") from error
    known = (SCHEMA_VERSION, SCHEMA_VERSION_CHAIN)
    found = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if found is not None and found not in known:
        raise ValueError(
            f"{path}: schema_version {abbreviate(found)}, this program reads {' and '.join(map(str, known))}; prepare "
            "it again"
        )
    problem = find_manifest_problem(manifest)
    if problem is not None:
        raise ValueError(f"{path} is damaged ({problem}); prepare the dataset again")
    if check_files:
        _check_files(root, path, listed_files(manifest))
    return dict(manifest)


def _check_files(root: Path, path: Path, files: Mapping[str, Any]) -> None:
    """Raise ValueError if a listed file is not a regular file of the listed size within the dataset."""
    folders: dict[Path, bool] = {root: True}

    def is_folder(folder: Path) -> bool:
        if folder not in folders:
            folders[folder] = is_folder(folder.parent) and not folder.is_symlink()
        return folders[folder]

    for name, facts in files.items():
        try:
            found = (root / name).lstat()
        except (FileNotFoundError, NotADirectoryError):
            found = None
        # The schema refuses ".." in names, but a link could lead out of the dataset, and reading a pipe would block.
        if not is_folder((root / name).parent) or (found is not None and stat.S_ISLNK(found.st_mode)):
            raise ValueError(f"{path}: {name!r} leads out of the dataset; copy the file there, or prepare again")
        if found is not None and not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{root / name} is no regular file; copy the file there, or prepare again")
        size = None if found is None else found.st_size
        if size != facts["bytes"]:
            state = "is missing" if size is None else f"has {size} bytes"
            raise ValueError(
                f"{root / name} {state}, the manifest says {facts['bytes']}; prepare again with --overwrite"
            )
