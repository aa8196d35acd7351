"""Paths of files computed from a dataset, such as tokens and item factors: in its folder or in this host's cache."""

import os
from pathlib import Path

from hllm_torchrec.common.urls import CACHE, cache_folder
from hllm_torchrec.data.dataset import Dataset


def derived_path(dataset: Dataset, *names: str) -> Path:
    """Path of a derived file or folder of the dataset, which may not exist yet.

    The path is in the dataset's folder if the file exists or can be written there. Otherwise (datasets may be shared
    and read-only) it is in the cache, under the dataset's fingerprint.

    Raises:
        ValueError: the file exists in neither folder and neither is writable; or the file is a link.
    """
    own = dataset.root.joinpath(*names)
    refuse_links(dataset.root, own)
    if own.exists() or _is_writable(own):
        return own
    cached = cache_folder(f"derived from {dataset.fingerprint}").joinpath(*names)
    if not cached.exists() and not _is_writable(cached):
        raise ValueError(
            f"{own}: the dataset cannot be written to, and neither can the cache {cached.parent}: set {CACHE} to a "
            "folder for files that are computed from datasets"
        )
    return cached


def refuse_links(root: Path, path: Path) -> None:
    """Check that `path`, which is below `root` and not in the manifest, and the entries in it are not links.

    Raises:
        ValueError: `path`, a folder above it or an entry in it is a link, or is neither a regular file nor a folder.
    """
    steps = [path, *(folder for folder in path.parents if folder.is_relative_to(root) and folder != root)]
    inside = list(path.iterdir()) if path.is_dir() else []
    for file in (*steps, *inside):
        if file.is_symlink() or (file.exists() and not (file.is_file() or file.is_dir())):
            raise ValueError(
                f"{file}: is a link or no plain file, and may lead out of the dataset; replace it by a copy"
            )


def _is_writable(path: Path) -> bool:
    """True if `path`, whose folders may not exist, can be created; on a read-only file system, False even for root."""
    existing = next(folder for folder in path.parents if folder.exists())
    return os.access(existing, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)
