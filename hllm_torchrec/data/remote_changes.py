"""Changes of the versions of a dataset at a URL (forgetting, pruning), made in a local copy of all its files."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hllm_torchrec.common.atomic_files import remove_folder
from hllm_torchrec.common.urls import (
    cache_folder,
    fetch_files,
    host_lock,
    list_files,
    print_transfer,
    read_text,
    remove_files,
    upload_files,
    url_name,
)
from hllm_torchrec.data.manifest import MANIFEST, VERSIONS

_Stamp = tuple[int, int, int]


@contextmanager
def mirrored_dataset(url: str, *, contents: bool = True) -> Iterator[Path]:
    """Context manager: yields a folder with all files at `url`, and publishes the block's changes when it ends.

    If the block raises an exception, nothing is changed at the URL. If the upload is interrupted, running the command
    again completes it: data files are uploaded first, then manifests of new versions, then `manifest.json`, then
    changed manifests of earlier versions; deleted files are removed last.

    Args:
        contents: False: create all files except JSON files (manifests, pins) empty, for a block that only removes
            versions.

    Raises:
        ValueError, OSError: the URL cannot be reached or has no dataset, or another process has published in the
            meantime.
    """
    before = read_text(f"{url}/{MANIFEST}")
    if before is None:
        raise ValueError(f"{url} is not a prepared dataset: no {MANIFEST}. Make one with `hllm prepare --output {url}`")
    cache_folder(url).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mirror-", dir=cache_folder(url)) as scratch:
        folder = Path(scratch) / url_name(url)
        files = {name: facts.size for name, facts in list_files(url).items()}
        wanted = {name: size for name, size in files.items() if contents or name.endswith(".json")}
        print_transfer("fetching", url, wanted)
        fetch_files(url, wanted, folder)
        for name in files.keys() - wanted.keys():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        fetched = _stamps(folder)
        yield folder
        if read_text(f"{url}/{MANIFEST}") != before:
            raise ValueError(f"{url}: another process has published a version in the meantime; run the command again")
        _publish(folder, fetched, url)


def _is_manifest(name: str) -> bool:
    return name == MANIFEST or name.startswith(f"{VERSIONS}/")


def _stamps(folder: Path) -> dict[str, _Stamp]:
    """File name -> inode, size and modification time, which differ if the file was replaced."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".lock"))
    stats = {path.relative_to(folder).as_posix(): path.stat() for path in paths}
    return {name: (one.st_ino, one.st_size, one.st_mtime_ns) for name, one in stats.items()}


def _publish(folder: Path, fetched: dict[str, _Stamp], url: str) -> None:
    """Upload the changes of the folder to the URL; fetched: stamps of the files before the changes."""
    now = _stamps(folder)
    changed = {name for name, stamp in now.items() if fetched.get(name) != stamp}
    new_manifests = {name for name in changed - fetched.keys() if _is_manifest(name)}
    data = {name for name in changed if not _is_manifest(name)}
    print_transfer("uploading", url, {name: now[name][1] for name in changed})
    for names in (data, new_manifests, changed & {MANIFEST}, changed - data - new_manifests - {MANIFEST}):
        upload_files(folder, sorted(names), url)
    gone = fetched.keys() - now.keys()
    for manifests in (False, True):  # remove manifests last: a version stays listed until all its files are removed
        remove_files(url, [name for name in gone if _is_manifest(name) == manifests])
    _remove_copies(url, gone)


def _remove_copies(url: str, gone: set[str]) -> None:
    """Remove this host's copies of versions that contain one of the removed files."""
    with host_lock(url) as copies:
        for manifest in copies.glob(f"*/*/{MANIFEST}"):
            is_copy = not manifest.parent.parent.name.startswith("mirror-")
            if is_copy and any((manifest.parent / name).is_file() for name in gone):
                remove_folder(manifest.parent.parent)
