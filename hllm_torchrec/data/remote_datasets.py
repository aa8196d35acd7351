"""Dataset directories at URLs, read and written through local copies.

A copy is named by the hash of its manifest, so it never changes while a process reads it.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hllm_torchrec.common.atomic_files import atomic_folder
from hllm_torchrec.common.hashing import hash_files
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
    url_of,
)
from hllm_torchrec.data.manifest import MANIFEST


def local_dataset(url: str) -> Path:
    """This host's copy of the dataset at `url`; fetches it and checks its SHA-256 hashes if it does not exist.

    Raises:
        ValueError: the URL has no dataset, or its files are not those of its manifest.
        OSError: the URL cannot be reached.
    """
    text = read_text(f"{url}/{MANIFEST}")
    if text is None:
        raise ValueError(f"{url} is not a prepared dataset: no {MANIFEST}. Make one with `hllm prepare --output {url}`")
    # One process per host fetches; the others wait for the lock and then find the copy.
    with host_lock(url) as folder:
        target = folder / hashlib.sha256(text.encode()).hexdigest()[:16] / url_name(url)
        if not target.is_dir():
            with atomic_folder(target) as new:
                _fetch_whole(url, text, new)
    return target


def _fetch_whole(url: str, text: str, folder: Path) -> None:
    try:
        facts = {str(name): (int(f["bytes"]), str(f["sha256"])) for name, f in json.loads(text)["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{url}/{MANIFEST} is damaged ({error}); prepare the dataset again") from error
    # The manifest comes from the network: its names must not lead out of the folder.
    for name in facts:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{url}/{MANIFEST} is damaged: {name!r} leads out of the dataset; prepare it again")
    print_transfer("fetching", url, {name: size for name, (size, _) in facts.items()})
    fetch_files(url, facts, folder)
    hashes = hash_files([folder / name for name in facts], "checksums")
    for name, (_, sha256) in facts.items():
        if hashes[folder / name] != sha256:
            raise ValueError(
                f"{url}/{name}: its contents are not those of the manifest: the dataset was replaced while it was "
                "fetched (start again), or damaged (prepare it again with --overwrite)"
            )
    (folder / MANIFEST).write_text(text, encoding="utf-8")  # the text that was read first, which names the copy


@contextmanager
def writable_dataset(output: Path) -> Iterator[Path]:
    """Context manager with the folder in which to prepare the dataset `output`.

    The folder is `output` itself, or for a URL a local copy of its contents. For a URL, the folder's contents replace
    those of the URL when the block ends without an exception.

    Raises:
        ValueError, OSError: the URL cannot be reached, or its dataset is damaged.
    """
    url = url_of(output)
    if url is None:
        yield output
        return
    there = read_text(f"{url}/{MANIFEST}") is not None
    cache_folder(url).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="prepare-", dir=cache_folder(url)) as scratch:
        folder = Path(scratch) / url_name(url)
        if there:
            shutil.copytree(local_dataset(url), folder)
        yield folder
        publish_dataset(folder, url)


def publish_dataset(folder: Path, url: str) -> None:
    """Replace the dataset at `url` by the one in `folder`; during the upload the URL has no dataset.

    Raises:
        OSError: the URL cannot be written to.
    """
    text = (folder / MANIFEST).read_text(encoding="utf-8")
    if read_text(f"{url}/{MANIFEST}") == text:
        return
    sizes = {name: facts["bytes"] for name, facts in json.loads(text)["files"].items()}
    # A dataset exists if its manifest does: remove the manifest first and upload it last, so that no reader takes a
    # mixture of old and new files for a dataset. Files of the old dataset go at the end.
    remove_files(url, [MANIFEST])
    print_transfer("uploading", url, sizes)
    upload_files(folder, sizes, url)
    upload_files(folder, [MANIFEST], url)
    remove_files(url, list_files(url).keys() - {*sizes, MANIFEST})
