"""`manifest.json`: the description of a prepared dataset, and a cheap check of its files by presence and size."""

import json
from pathlib import Path
from typing import Any

from hllm_torchrec.common.hashing import hash_files, hash_texts
from hllm_torchrec.data.manifest_schema import find_manifest_problem

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
ITEM_COUNTS = "training_item_counts.npy"


def data_files(root: Path) -> list[Path]:
    """The dataset's data files under `root`, sorted by name, without the manifest and the token stores."""
    found = [
        p for p in root.rglob("*") if p.is_file() and p.name != MANIFEST and p.relative_to(root).parts[0] != "tokens"
    ]
    return sorted(found, key=lambda p: p.relative_to(root).as_posix())


def write_manifest(root: Path, manifest: dict[str, Any]) -> None:
    """Write `manifest.json` and add the schema version, the files (size, hash) and the fingerprint of all contents."""
    files = {
        path.relative_to(root).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256}
        for path, sha256 in hash_files(data_files(root), "checksums").items()
    }
    fingerprint = hash_texts(f"{name} {facts['sha256']}" for name, facts in files.items())
    whole = {"schema_version": SCHEMA_VERSION, **manifest, "fingerprint": fingerprint, "files": files}
    (root / MANIFEST).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def read_manifest(root: Path) -> dict[str, Any]:
    """Read the manifest of the dataset in `root`; check its schema version and its files' presence and sizes.

    Hashes are not checked: that would read the complete dataset at each start.

    Raises:
        ValueError: `root` is not a dataset or has another schema version, or a file is missing or has another size.
            The message names the folder or file, and the remedy.
    """
    path = root / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{root} is not a prepared dataset: no {MANIFEST}. Make one with `hllm prepare --output {root}`"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
        raise ValueError(f"{path} is damaged ({error}); prepare the dataset again") from error
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if version is not None and version != SCHEMA_VERSION:
        raise ValueError(f"{path}: schema_version {version}, this program reads {SCHEMA_VERSION}; prepare it again")
    problem = find_manifest_problem(manifest)
    if problem is not None:
        raise ValueError(f"{path} is damaged ({problem}); prepare the dataset again")
    for name, facts in manifest["files"].items():
        # The schema refuses ".." in names; a symbolic link can still lead out.
        if not (root / name).resolve().is_relative_to(root.resolve()):
            raise ValueError(f"{path}: {name!r} leads out of the dataset; copy the file there, or prepare again")
        size = (root / name).stat().st_size if (root / name).is_file() else None
        if size != facts["bytes"]:
            state = "is missing" if size is None else f"has {size} bytes"
            raise ValueError(
                f"{root / name} {state}, the manifest says {facts['bytes']}; prepare again with --overwrite"
            )
    return dict(manifest)
