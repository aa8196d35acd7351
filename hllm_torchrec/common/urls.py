"""Files at URLs: reading, downloading, uploading and removing them, with readable errors."""

import hashlib
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
from fsspec.registry import known_implementations

from hllm_torchrec.common.errors import without_credentials
from hllm_torchrec.common.locks import hold_lock, lock_wait
from hllm_torchrec.common.terminal import say

CACHE = "HLLM_CACHE"
"""Environment variable with the folder of local copies."""
EXTRAS = {"s3": "pip install 'hllm_torchrec[s3]'", "s3a": "pip install 'hllm_torchrec[s3]'"}
"""Protocol -> command that installs its package; for other protocols fsspec's message contains the command."""
#: Keys of fsspec's file details that identify the version of a file's contents, in order of preference.
_VERSIONS = ("ETag", "etag", "md5Hash", "mtime", "created", "LastModified")
_AT_ONCE = 8
_SHOWN_BYTES = 100_000_000
_CLIENTS = ("botocore", "aiobotocore", "aiohttp")
_NETWORK = (socket.gaierror, ConnectionError, TimeoutError)


def url_of(path: str | Path) -> str | None:
    """URL of `path` without a trailing slash, or None for a local path.

    `Path("s3://bucket/x")` drops one of the two slashes, which is restored here: a URL can be passed as a `Path`.
    """
    scheme, colon, rest = str(path).partition(":/")
    if not colon or scheme not in known_implementations:
        return None
    root = "/" if scheme in ("file", "local") else ""
    return f"{scheme}://{root}{rest.strip('/')}"


def display_url(path: str | Path) -> str:
    """Path or URL as the user wrote it, also if `Path` has dropped a slash."""
    return url_of(path) or str(path)


def url_name(url: str) -> str:
    """Last component of a URL, which is also the name of the local copy."""
    return url.rpartition("/")[2]


def cache_folder(url: str) -> Path:
    """Folder on this host for copies of `url`."""
    root = os.environ.get(CACHE) or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "hllm_torchrec")
    return Path(root).expanduser() / "remote" / hashlib.sha256(url.encode()).hexdigest()[:16]


@contextmanager
def host_lock(url: str) -> Iterator[Path]:
    """Lock this host's copies of `url` against other processes of the host; yields their folder.

    Raises:
        Locked: another process holds the lock for longer than HLLM_LOCK_WAIT seconds (an hour).
    """
    folder = cache_folder(url)
    folder.mkdir(parents=True, exist_ok=True)
    with hold_lock(folder / "lock", f"{url}: another process uses this host's copies", wait=lock_wait()):
        yield folder


# ---------------------------------------------------------------------- reading and listing


def read_text(url: str) -> str | None:
    """Text of a small file, or None if the file or its bucket does not exist.

    Raises:
        ValueError, OSError: as `open_filesystem`.
    """
    with open_filesystem(url) as (system, path):
        try:
            return str(system.cat_file(path).decode())
        except FileNotFoundError:
            return None


class FileFacts(NamedTuple):
    """Size in bytes and version of a file. version: changes with the contents; empty if the file system has none."""

    size: int
    version: str


def list_files(url: str) -> dict[str, FileFacts]:
    """Return path relative to `url` -> facts, for all files below `url`; empty if `url` does not exist.

    Raises:
        ValueError, OSError: as `open_filesystem`.
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
    """Copy files below `url` into `folder`, under the same names. Each gets its name only when it is complete.

    Raises:
        ValueError, OSError: as `open_filesystem`; files fetched before the error remain.
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
    """Copy files of `folder` to `url`, under the same names. A missing bucket is not created.

    Raises:
        ValueError, OSError: as `open_filesystem`; files uploaded before the error remain.
    """
    with open_filesystem(url) as (system, path):
        _side_by_side(lambda name: system.put_file(str(folder / name), f"{path}/{name}"), names)


def create_file(url: str, text: str) -> bool:
    """Create a small file atomically, where the file system supports conditional writes.

    Returns:
        False if the file exists already, for example because another job has just created it.

    Raises:
        ValueError, OSError: as `open_filesystem`.
    """
    with open_filesystem(url) as (system, path):
        data = text.encode()
        try:
            if url.startswith(("file:", "local:")):
                _link_new(Path(path), data)
                return True
            # A conditional write (If-None-Match in S3).
            system.pipe_file(path, data, mode="create")
        except (FileExistsError, TypeError) as error:
            if isinstance(error, FileExistsError) or system.exists(path):
                return False
            system.pipe_file(path, data)  # a file system without conditional writes
        return bool(system.cat_file(path) == data)


def _link_new(path: Path, data: bytes) -> None:
    """Create a local file with its content in one step; FileExistsError if it exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(prefix=f".{path.name}-", dir=path.parent) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        os.link(file.name, path)


def remove_files(url: str, names: Iterable[str]) -> None:
    """Remove files below `url`; missing files are ignored.

    Raises:
        ValueError, OSError: as `open_filesystem`.
    """
    with open_filesystem(url) as (system, path):
        for name in names:
            try:
                system.rm_file(f"{path}/{name}")
            except FileNotFoundError:
                continue


def print_transfer(what: str, url: str, sizes: Mapping[str, int]) -> None:
    """Announce a transfer on standard error if it is large enough to take noticeable time."""
    total = sum(sizes.values())
    if total >= _SHOWN_BYTES:
        say(f"{what} {url}: {len(sizes):,} files, {total / 1e9:,.1f} GB", sys.stderr)


def _side_by_side(work: Callable[[Any], None], parts: Iterable[Any]) -> None:
    """Run `work` on every part in threads; the first error is raised, and parts that have not started are cancelled."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            for done in [pool.submit(work, part) for part in parts]:
                done.result()
        except BaseException:  # also Ctrl-C: otherwise all remaining parts would be transferred before the process ends
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# ---------------------------------------------------------------------- errors


@contextmanager
def open_filesystem(url: str) -> Iterator[tuple[Any, str]]:
    """Context manager that yields the fsspec file system of `url` and the path on it; cached listings are discarded.

    Errors of file system clients in its body are translated as well.

    Raises:
        ValueError: a package or the credentials are missing, or fsspec cannot open such a URL; the message contains the
            remedy.
        OSError: the bucket does not exist, access is denied, or the server does not answer: one line with the URL; or a
            local file cannot be read or written: the line names the file.
    """
    options = {"auto_mkdir": True} if url.startswith(("file:", "local:")) else {}  # object stores have no folders
    shown = without_credentials(url)
    try:
        system, path = _connect(url, options)
        system.invalidate_cache()  # fsspec caches listings, but other processes write at the same URLs
        yield system, path
    except ImportError as error:
        remedy = EXTRAS.get(url.partition(":")[0], str(error))
        raise ValueError(f"{shown}: a package that reads such URLs is not installed: {remedy}") from error
    except (FileNotFoundError, PermissionError) as error:
        if Path(str(error.filename)).is_absolute():  # a local file that is uploaded or fetched, not one of the URL
            raise
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(
                f"{shown}: not found ({_line(error)}): check that the bucket exists and its name is correct"
            ) from error
        raise PermissionError(
            f"{shown}: access is denied ({_line(error)}): check the credentials' permissions"
        ) from error
    except Exception as error:
        # Many errors of HTTP and S3 clients are not OSErrors. Other exceptions do not concern the URL.
        if not (type(error).__module__.startswith(_CLIENTS) or isinstance(error, _NETWORK)):
            raise
        if "Credentials" in type(error).__name__:
            raise ValueError(
                f"{shown}: no credentials ({_line(error)}): set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                "AWS_PROFILE"
            ) from error
        raise ConnectionError(f"{shown}: {type(error).__name__}: {_line(error)}") from error


def _connect(url: str, options: dict[str, Any]) -> tuple[Any, str]:
    """Return the file system and the path of a URL; options: arguments of the file system's constructor."""
    try:
        system, path = fsspec.core.url_to_fs(url, **options)
    except (TypeError, ValueError, AttributeError, IsADirectoryError, NotADirectoryError) as error:
        raise ValueError(
            f"{without_credentials(url)}: such a URL cannot be opened by itself ({_line(error)}): give one "
            "of a server, such as s3://bucket/path or https://host/path"
        ) from error
    return system, path


def _line(error: Exception) -> str:
    """Return an error message as one line without credentials: clients repeat the URL in their messages."""
    return without_credentials(" ".join(str(error).split()))
