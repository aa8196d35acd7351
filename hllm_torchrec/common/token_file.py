"""Bearer token of a service, read from a file."""

import ipaddress
from contextlib import suppress
from pathlib import Path


def read_token(file: Path | None, host: str) -> str | None:
    """Return the token in `file`, or None if `file` is None.

    Raises:
        ValueError: `file` is None but other machines can reach `host`; or the file does not exist, or is not one line
            of at least 16 printable ASCII characters.
    """
    if file is None:
        if not is_loopback(host):
            raise ValueError(f"--host {host}: others can reach it: give --token-file, a file with a secret of your own")
        return None
    token = file.read_text(encoding="utf-8").strip() if file.is_file() else ""
    if len(token) < 16 or not token.isascii() or not token.isprintable():
        raise ValueError(f"--token-file {file}: must be a file with one line of at least 16 printable ASCII characters")
    return token


def is_loopback(host: str) -> bool:
    """Return True if only this machine can reach the address."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
