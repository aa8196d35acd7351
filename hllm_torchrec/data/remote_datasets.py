"""Dataset directories at URLs, read and written through local copies.

A copy contains one version of a dataset. Its folder is named by the hash of the manifest, so a copy never changes while
a process reads it. Files that another copy already has are hard-linked instead of fetched again.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hllm_torchrec.common.atomic_files import atomic_folder
from hllm_torchrec.common.hashing import hash_files
from hllm_torchrec.common.urls import (
    cache_folder,
    fetch_files,
    host_lock,
    print_transfer,
    read_text,
    remove_files,
    upload_files,
    url_name,
    url_of,
)
from hllm_torchrec.data.manifest import MANIFEST, VERSIONS, listed_files, version_of
from hllm_torchrec.data.versions import kept_versions


def local_dataset(url: str, version: int | None = None) -> Path:
    """Path of this host's copy of a version (None: newest) of the dataset at `url`; fetches and checks it if needed.

    Raises:
        ValueError: the URL has no dataset or does not have this version, or its files differ from its manifest.
        OSError: the URL cannot be reached.
    """
    text = _manifest_text(url, version)
    # One process per host fetches; the others wait for the lock and then find the copy.
    with host_lock(url) as folder:
        target = folder / hashlib.sha256(text.encode()).hexdigest()[:16] / url_name(url)
        if not target.is_dir():
            with atomic_folder(target) as new:
                _fetch_whole(url, text, new, folder)
    return target


def _manifest_text(url: str, version: int | None) -> str:
    text = read_text(f"{url}/{MANIFEST}")
    if text is None:
        raise ValueError(f"{url} is not a prepared dataset: no {MANIFEST}. Make one with `hllm prepare --output {url}`")
    newest = version_of(_parsed(url, text))
    if version is None or version == newest:
        return text
    kept = read_text(f"{url}/{VERSIONS}/{version:05d}.json")
    if kept is None:
        raise ValueError(f"{url}: no version {version}; the newest is {newest}. Choose one that was not pruned")
    return kept


def _parsed(url: str, text: str) -> dict[str, Any]:
    """Parse a manifest from the network. Raises ValueError if it is damaged or a name leads out of the dataset."""
    try:
        manifest = dict(json.loads(text))
        facts = {str(name): (int(one["bytes"]), str(one["sha256"])) for name, one in listed_files(manifest).items()}
        version_of(manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{url}/{MANIFEST} is damaged ({error}); prepare the dataset again") from error
    for name in facts:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{url}/{MANIFEST} is damaged: {name!r} leads out of the dataset; prepare it again")
    return manifest


def _fetch_whole(url: str, text: str, folder: Path, copies: Path) -> None:
    facts = listed_files(_parsed(url, text))
    missing = [name for name in facts if not _link_known(name, facts[name], folder, copies)]
    print_transfer("fetching", url, {name: facts[name]["bytes"] for name in missing})
    fetch_files(url, missing, folder)
    hashes = hash_files([folder / name for name in missing], "checksums")
    for name in missing:
        if hashes[folder / name] != facts[name]["sha256"]:
            raise ValueError(
                f"{url}/{name}: its contents are not those of the manifest: the dataset was replaced while it was "
                "fetched (start again), or damaged (prepare it again with --overwrite)"
            )
    # The text that was read first, because its hash is the name of the copy.
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def _link_known(name: str, facts: Mapping[str, Any], folder: Path, copies: Path) -> bool:
    """Link a file from another copy whose manifest has the same file; returns False if there is none."""
    for manifest in copies.glob(f"*/*/{MANIFEST}"):
        known = listed_files(json.loads(manifest.read_text(encoding="utf-8"))).get(name)
        if known == facts and (manifest.parent / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(manifest.parent / name, folder / name)
            return True
    return False


@contextmanager
def writable_dataset(output: Path) -> Iterator[Path]:
    """Context manager: yields the folder in which to prepare the dataset `output` or to add a version to it.

    The folder is `output` itself or, for a URL, a local copy of its contents. The copy is published at the URL when
    the block ends without an exception.

    Raises:
        ValueError, OSError: the URL cannot be reached, its dataset is damaged, or another process has published there
            in the meantime.
    """
    url = url_of(output)
    if url is None:
        yield output
        return
    before = read_text(f"{url}/{MANIFEST}")
    cache_folder(url).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="prepare-", dir=cache_folder(url)) as scratch:
        folder = Path(scratch) / url_name(url)
        if before is not None:
            # Links are enough, because files of a version are never changed, and manifests are replaced.
            shutil.copytree(local_dataset(url), folder, copy_function=os.link)
        yield folder
        if read_text(f"{url}/{MANIFEST}") != before:
            raise ValueError(f"{url}: another process has published a version in the meantime; run the command again")
        publish_dataset(folder, url)


def publish_dataset(folder: Path, url: str) -> None:
    """Upload the dataset in `folder` to `url`: first the files that `url` lacks, then the manifest, as the commit.

    Files of a version that is not kept (`prepare --overwrite`) are removed at the end. If existing files would be
    overwritten by different ones, the old manifest is removed first, so the dataset does not exist during the upload.

    Raises:
        OSError: the URL cannot be written to.
    """
    text = (folder / MANIFEST).read_text(encoding="utf-8")
    there = read_text(f"{url}/{MANIFEST}")
    if there == text:
        return
    files, old = listed_files(json.loads(text)), listed_files(_parsed(url, there)) if there is not None else {}
    sizes = {name: facts["bytes"] for name, facts in files.items() if old.get(name) != facts}
    if sizes.keys() & old.keys():
        remove_files(url, [MANIFEST])
    print_transfer("uploading", url, sizes)
    upload_files(folder, sizes, url)
    kept = kept_versions(folder)
    upload_files(folder, [f"{VERSIONS}/{path.name}" for path in (folder / VERSIONS).glob("*.json")], url)
    upload_files(folder, [MANIFEST], url)
    needed = {name for manifest in kept.values() for name in listed_files(manifest)}
    remove_files(url, old.keys() - needed)
