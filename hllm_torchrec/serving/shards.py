"""Sharding of a service by user: the user of a request, the shard of a user, and the file of a shard's events.

A shard runs the complete application (`create_app`) in its process, which `ask_application` calls without a socket.
`merged_metrics` joins the metrics of all shards.
"""

import asyncio
import json
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Scope

Answer = tuple[int, list[tuple[bytes, bytes]], bytes]
"""Status, headers and body of an HTTP answer."""


def user_of(method: str, path: str, body: bytes) -> str | None:
    """The raw user id in a request; None for a request without a user, or with an invalid body (a shard refuses it).

    path: decoded, as in an ASGI scope.
    """
    if path.startswith("/v1/users/"):
        # The path of a DELETE ends with the user id, which may itself end with "/events".
        return path.removeprefix("/v1/users/").removesuffix("/events" if method == "GET" else "")
    try:
        found = json.loads(body)
    except ValueError:
        return None
    user = found.get("user") if isinstance(found, dict) else None
    return user if isinstance(user, str) else None


def shard_of(user: str, shards: int) -> int:
    """Index of a user's shard, the same in all processes."""
    return int.from_bytes(blake2b(user.encode("utf-8", "surrogatepass"), digest_size=8).digest()) % shards


def state_file(folder: Path, number: int, shards: int) -> Path:
    """File of a shard's events.

    Raises:
        ValueError: the folder has files of another number of shards, with another assignment of users to shards.
    """
    others = sorted({found.stem.rpartition("-")[2] for found in folder.glob("shard-*-of-*.sqlite")} - {str(shards)})
    if others:
        raise ValueError(f"{folder}: has the events of {others[0]} shards: give shards={others[0]}, or another state")
    return folder / f"shard-{number}-of-{shards}.sqlite"


async def ask_application(app: ASGIApp, scope: dict[str, Any], body: bytes) -> Answer:
    """Call an ASGI application in this process; return its complete answer."""
    full_scope: Scope = {"type": "http", "http_version": "1.1", "scheme": "http", "root_path": "", "state": {}, **scope}
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

    await app(full_scope, receive, send)
    return found["status"], found["headers"], found["body"]


def merged_metrics(texts: Sequence[str | None]) -> bytes:
    """Metrics of all shards in Prometheus's text format. Each sample gets the label `shard`, the shard's number.

    texts: the metrics of each shard, None if it gave no answer; the metric `hllm_shard_up` tells which did.
    """
    up = GaugeMetricFamily("hllm_shard_up", "1 for a shard that answers, else 0", labels=["shard"])
    families: dict[str, Metric] = {up.name: up}
    for number, text in enumerate(texts):
        up.add_metric([str(number)], float(text is not None))
        for found in text_string_to_metric_families(text or ""):
            family = families.setdefault(found.name, Metric(found.name, found.documentation, found.type))
            for sample in found.samples:
                family.add_sample(sample.name, {**sample.labels, "shard": str(number)}, sample.value)

    class Families(Collector):
        def collect(self) -> list[Metric]:
            return list(families.values())

    registry = CollectorRegistry()
    registry.register(Families())
    return generate_latest(registry)
