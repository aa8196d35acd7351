"""Supported combinations of torch, torchrec and fbgemm, and the check of the installed combination.

Incompatible versions fail deep inside a shared library ("undefined symbol"), so importing the package refuses them.
The check reads only package metadata and imports none of the libraries. As a program, this file prints the versions
for `scripts/install.sh`: `python hllm_torchrec/_versions.py 2.13` prints `2.13.0 1.8.0 1.8.0 3.7.1`.
"""

import re
import sys
import warnings
from importlib import metadata
from typing import NamedTuple


class Release(NamedTuple):
    """Exact versions of packages that were built for each other."""

    torch: str
    torchrec: str
    fbgemm: str
    triton: str
    """Required by torch's CUDA build; without a GPU the tests run Triton's interpreter and compiler."""


#: Torch's minor version -> supported release, oldest first.
RELEASES = {
    "2.11": Release(torch="2.11.0", torchrec="1.6.1", fbgemm="1.6.0", triton="3.6.0"),
    "2.12": Release(torch="2.12.0", torchrec="1.7.0", fbgemm="1.7.0", triton="3.7.0"),
    "2.13": Release(torch="2.13.0", torchrec="1.8.0", fbgemm="1.8.0", triton="3.7.1"),
    "2.14": Release(torch="2.14.1", torchrec="1.9.2", fbgemm="1.9.0", triton="3.8.0"),
}

#: Key of the release that is installed by default, with which CI runs and the published results were made.
DEFAULT = "2.13"

REMEDY = "from the checkout, run: bash scripts/install.sh --cpu (or --cuda, or auto)"


def check() -> None:
    """Check that compatible versions of torch, torchrec and fbgemm are installed.

    If all three are newer than every tested release, the function only warns.

    Raises:
        ImportError: a package is missing, too old or incompatible; the message lists the installed versions and the
            remedy.
    """
    versions = installed()
    problem = find_version_problem(versions)
    if problem:
        raise ImportError(f"hllm_torchrec: {problem} (installed: {_describe(versions)}); {REMEDY}")
    if _minor(versions["torch"]) not in RELEASES:
        warnings.warn(f"hllm_torchrec is not tested with {_describe(versions)}", stacklevel=2)


def installed() -> dict[str, str]:
    """Return name -> version for those of torch, torchrec, fbgemm-gpu and fbgemm-gpu-cpu that are installed."""
    found = {}
    for name in ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def find_version_problem(versions: dict[str, str]) -> str | None:
    """Return a description of the problem with these versions, or None.

    Args:
        versions: package name -> version, as returned by `installed`.
    """
    fbgemm = [name for name in ("fbgemm-gpu", "fbgemm-gpu-cpu") if name in versions]
    missing = [name for name in ("torch", "torchrec") if name not in versions]
    missing += [] if fbgemm else ["fbgemm-gpu or fbgemm-gpu-cpu"]
    if missing:
        return f"{', '.join(missing)} not installed"
    if len(fbgemm) == 2:
        return "fbgemm-gpu and fbgemm-gpu-cpu overwrite each other's files; only one may be installed"
    torch = _minor(versions["torch"])
    if _order(torch) < min(map(_order, RELEASES)):
        return f"torch {versions['torch']} is too old; {_supported()}"
    return _find_mismatch(torch, versions["torchrec"], fbgemm[0], versions[fbgemm[0]])


def _find_mismatch(torch: str, torchrec: str, fbgemm_name: str, fbgemm: str) -> str | None:
    """Return a description of the package that is incompatible with this torch minor version, or None.

    If torch is newer than every tested release, a package is incompatible if its minor version is not newer than the
    one of the last tested release.
    """
    release = RELEASES.get(torch)
    newest = list(RELEASES.values())[-1]
    for name, version, wanted, last in (
        ("torchrec", torchrec, release and release.torchrec, newest.torchrec),
        (fbgemm_name, fbgemm, release and release.fbgemm, newest.fbgemm),
    ):
        if wanted and _minor(version) != _minor(wanted):
            return f"torch {torch} needs {name} {_minor(wanted)}, not {version}"
        if not wanted and _order(_minor(version)) <= _order(_minor(last)):
            return f"{name} {version} was built for another torch than {torch}; {_supported()}"
    return None


def _minor(version: str) -> str:
    """Return the first two numbers of a version: "2.13" for "2.13.0+cpu"."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return f"{match[1]}.{match[2]}" if match else "0.0"


def _order(minor: str) -> tuple[int, int]:
    """Sort key of a minor version: (2, 13) for "2.13"."""
    major, _, rest = minor.partition(".")
    return int(major), int(rest)


def _supported() -> str:
    """Describe the tested releases for a message."""
    return "supported: " + ", ".join(
        f"torch {release.torch} with torchrec {release.torchrec} and fbgemm {release.fbgemm}"
        for release in RELEASES.values()
    )


def _describe(versions: dict[str, str]) -> str:
    """Describe the installed versions for a message."""
    return ", ".join(f"{name} {version}" for name, version in versions.items()) or "none of them"


def _print_release(torch: str) -> None:
    """Print the exact versions for a torch minor version, for scripts/install.sh.

    Raises:
        SystemExit: the torch version is not supported.
    """
    if torch not in RELEASES:
        sys.exit(f"error: torch {torch} is not supported; {_supported()}")
    print(*RELEASES[torch])


if __name__ == "__main__":
    _print_release(sys.argv[1] if len(sys.argv) > 1 else DEFAULT)
