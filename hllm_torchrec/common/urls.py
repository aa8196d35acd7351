"""Files at URLs: reading, fetching, uploading and removing them, and what goes wrong in words."""

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
from filelock import FileLock
from fsspec.registry import known_implementations

CACHE = "HLLM_CACHE"
"""Variable that names the folder of copies."""
EXTRAS = {"s3": "pip install 'hllm_torchrec[s3]'", "s3a": "pip install 'hllm_torchrec[s3]'"}
"""Protocol -> how to install what it needs; fsspec's own words say it for the others."""
_VERSIONS = ("ETag", "etag", "md5Hash", "mtime", "created", "LastModified")
_AT_ONCE = 8
_SHOWN_BYTES = 100_000_000
_CLIENTS = ("botocore", "aiobotocore", "aiohttp")


def url_of(path: str | Path) -> str | None:
    """The URL that `path` is, without a slash at its end; None for a path of this machine.

    `Path("s3://bucket/x")` has one slash less, which is put back: so a URL may go through whatever takes a path.
    """
    scheme, colon, rest = str(path).partition(":/")
    if not colon or scheme not in known_implementations:
        return None
    root = "/" if scheme in ("file", "local") else ""
    return f"{scheme}://{root}{rest.strip('/')}"


def display_url(place: str | Path) -> str:
    """A place as its user wrote it, whatever `Path` has made of it."""
    return url_of(place) or str(place)


def url_name(url: str) -> str:
    """The last part of a URL, which names the copy too."""
    return url.rpartition("/")[2]


def cache_folder(url: str) -> Path:
    """This host's folder for copies of `url`."""
    root = os.environ.get(CACHE) or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "hllm_torchrec")
    return Path(root).expanduser() / "remote" / hashlib.sha256(url.encode()).hexdigest()[:16]


@contextmanager
def host_lock(url: str) -> Iterator[Path]:
    """Be the only process of this host that touches its copies of `url`; gives their folder."""
    folder = cache_folder(url)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        yield folder


# ---------------------------------------------------------------------- what is there


def read_text(url: str) -> str | None:
    """A small file's text, or None where there is no such file, or no such bucket.

    Raises:
        ValueError, OSError: as `reached`.
    """
    with open_filesystem(url) as (system, path):
        try:
            return str(system.cat_file(path).decode())
        except FileNotFoundError:
            return None


class FileFacts(NamedTuple):
    """What a file system says of a file. version: changes with the contents, if the system has such a thing."""

    size: int
    version: str


def list_files(url: str) -> dict[str, FileFacts]:
    """Every file below `url`, by its name from there on; nothing where nothing is.

    Raises:
        ValueError, OSError: as `reached`.
    """
    with open_filesystem(url) as (system, path):
        try:
            found = system.find(path, detail=True)
        except FileNotFoundError:
            return {}
    prefix = path.rstrip("/") + "/"
    return {
        name[len(prefix) :]: FileFacts(
            int(facts["size"]), next((str(facts[key]) for key in _VERSIONS if facts.get(key)), "")
        )
        for name, facts in found.items()
        if name.startswith(prefix)
    }


# ---------------------------------------------------------------------- moving files


def fetch_files(url: str, names: Iterable[str], folder: Path) -> None:
    """Copy files below `url` into `folder`, under the same names; each takes its name when it is whole.

    Raises:
        ValueError, OSError: as `reached`; what has been fetched by then stays.
    """
    wanted = list(names)
    folder.mkdir(parents=True, exist_ok=True)
    with open_filesystem(url) as (system, path), tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:

        def one(number: int) -> None:
            beside, target = Path(scratch) / str(number), folder / wanted[number]
            system.get_file(f"{path}/{wanted[number]}", str(beside))
            target.parent.mkdir(parents=True, exist_ok=True)
            beside.replace(target)

        _side_by_side(one, range(len(wanted)))


def upload_files(folder: Path, names: Iterable[str], url: str) -> None:
    """Copy files of `folder` to `url`, under the same names. A bucket is not made.

    Raises:
        ValueError, OSError: as `reached`; what has been uploaded by then stays.
    """
    with open_filesystem(url) as (system, path):
        _side_by_side(lambda name: system.put_file(str(folder / name), f"{path}/{name}"), names)


def remove_files(url: str, names: Iterable[str]) -> None:
    """Remove files below `url`; those that are not there are ignored.

    Raises:
        ValueError, OSError: as `reached`.
    """
    with open_filesystem(url) as (system, path):
        for name in names:
            try:
                system.rm_file(f"{path}/{name}")
            except FileNotFoundError:
                continue


def print_transfer(what: str, url: str, sizes: Mapping[str, int]) -> None:
    """Say on standard error what is about to move, if it is so much that somebody will wait."""
    total = sum(sizes.values())
    if total >= _SHOWN_BYTES:
        print(f"{what} {url}: {len(sizes):,} files, {total / 1e9:,.1f} GB", file=sys.stderr, flush=True)


def _side_by_side(work: Callable[[Any], None], parts: Iterable[Any]) -> None:
    """Do `work` on every part, several at a time; the first failure is raised when all have ended."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for done in [pool.submit(work, part) for part in parts]:
            done.result()


# ---------------------------------------------------------------------- what goes wrong


@contextmanager
def open_filesystem(url: str) -> Iterator[tuple[Any, str]]:
    """fsspec's file system of `url`, and its path there; nothing that it listed before is believed.

    Raises:
        ValueError: a package is missing, or there are no credentials; says the remedy.
        OSError: no such bucket, no permission, or the server does not answer; in one line, with the URL.
    """
    options = {"auto_mkdir": True} if url.startswith(("file:", "local:")) else {}  # the others have no folders
    try:
        system, path = fsspec.core.url_to_fs(url, **options)
        system.invalidate_cache()
        yield system, path
    except ImportError as error:
        remedy = EXTRAS.get(url.partition(":")[0], str(error))
        raise ValueError(f"{url}: a package that reads such URLs is not installed: {remedy}") from error
    except PermissionError as error:
        raise PermissionError(f"{url}: access is denied ({_line(error)}): look at the credentials' rights") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{url}: not found ({_line(error)}): is the bucket there, and its name right?"
        ) from error
    except Exception as error:
        if not type(error).__module__.startswith(_CLIENTS):
            raise
        if "Credentials" in type(error).__name__:
            raise ValueError(
                f"{url}: no credentials ({_line(error)}): set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                "AWS_PROFILE"
            ) from error
        raise ConnectionError(f"{url}: {type(error).__name__}: {_line(error)}") from error


def _line(error: Exception) -> str:
    """An error's words in one line."""
    return " ".join(str(error).split())
