"""Shards of the users of a service: whose a request is, where it goes, where its events are.

A shard has the whole application (`create_app`) and is asked in its own process, `ask_application`.
"""

import asyncio
import json
from hashlib import blake2b
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Scope

Answer = tuple[int, list[tuple[bytes, bytes]], bytes]
"""Status, headers and body."""


def user_of(method: str, path: str, body: bytes) -> str | None:
    """The user whom a request is about; None without one, or with a body that the shard will refuse.

    path: decoded, as in an ASGI scope.
    """
    if path.startswith("/v1/users/"):
        # DELETE has the user alone, whose id may end in the same way.
        return path.removeprefix("/v1/users/").removesuffix("/events" if method == "GET" else "")
    try:
        found = json.loads(body)
    except ValueError:
        return None
    user = found.get("user") if isinstance(found, dict) else None
    return user if isinstance(user, str) else None


def shard_of(user: str | None, shards: int) -> int:
    """Number of a user's shard, the same in all processes; 0 without a user."""
    if user is None:
        return 0
    return int.from_bytes(blake2b(user.encode("utf-8", "surrogatepass"), digest_size=8).digest()) % shards


def state_file(folder: Path, number: int, shards: int) -> Path:
    """File of a shard's events.

    Raises:
        ValueError: the folder has files of another number of shards, in which users are elsewhere.
    """
    others = sorted({found.stem.rpartition("-")[2] for found in folder.glob("shard-*-of-*.sqlite")} - {str(shards)})
    if others:
        raise ValueError(f"{folder}: has the events of {others[0]} shards: give shards={others[0]}, or another state")
    return folder / f"shard-{number}-of-{shards}.sqlite"


async def ask_application(app: ASGIApp, scope: dict[str, Any], body: bytes) -> Answer:
    """The answer of an ASGI application in this process, as a whole."""
    whole: Scope = {"type": "http", "http_version": "1.1", "scheme": "http", "root_path": "", "state": {}, **scope}
    sent, ended = [{"type": "http.request", "body": body, "more_body": False}], asyncio.Event()
    found: dict[str, Any] = {"body": b""}

    async def receive() -> Message:
        if sent:
            return sent.pop()
        await ended.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            found.update(status=message["status"], headers=list(message["headers"]))
            return
        found["body"] += message.get("body", b"")
        if not message.get("more_body", False):
            ended.set()

    await app(whole, receive, send)
    return found["status"], found["headers"], found["body"]
