"""The service on a Ray cluster: the users are divided into shards, each with separate states and events.

    serve run hllm_torchrec.serving.ray_serve:application run=/disk/run state=/disk/states token_file=token shards=2

A shard is a Ray Serve deployment with one replica that runs the complete application of `create_app`, so limits, errors
and answers are those of `hllm serve`. The entry deployment sends a request to the shard of its user, hash(user) mod
shards. Each shard has a file of events below `state`. Ray restarts a replica that dies; the new replica reads this
file, so no acknowledged event is lost if the replica can access the file. Until the restart is complete, requests of
the shard's users wait; a request that has no answer a second after its deadline gets the status 503.

Needs the extra `ray`: pip install "hllm_torchrec[serve,faiss,ray]".
"""

import asyncio
import itertools
import os
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Literal

from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request

from hllm_torchrec.common.token_file import read_token
from hllm_torchrec.data.event_log import EventLog
from hllm_torchrec.distributed.process_group import distributed_device
from hllm_torchrec.serving.app import create_app
from hllm_torchrec.serving.batch_scorer import BatchScorer
from hllm_torchrec.serving.engine import Engine
from hllm_torchrec.serving.micro_batches import BatchLimits
from hllm_torchrec.serving.reload import Reloader
from hllm_torchrec.serving.request_schema import MAX_BODY
from hllm_torchrec.serving.service import Service
from hllm_torchrec.serving.shards import Answer, ask_application, merged_metrics, shard_of, state_file, user_of

METRICS = "/metrics"
OF_ALL = ("/healthz", "/readyz", "/v1/reload", METRICS)
"""Paths whose requests are sent to every shard. The answer with the highest status is returned; the answers of METRICS
are merged."""


class Options(BaseModel):
    """Arguments of `application`.

    `hllm serve --help` explains those of the same names, cache_mib (--cache) and deadline_ms (--deadline).
    """

    model_config = ConfigDict(extra="forbid")

    run: Path
    state: Path
    """Folder of the shards' events; it must survive the replica."""
    token_file: Path
    shards: int = Field(2, ge=1)
    checkpoint: str = "best"
    dataset: Path | None = None
    items: Path | None = None
    cache_mib: int = Field(1024, ge=1)
    index: Literal["flat", "ivf", "none"] = "flat"
    batch: int = Field(16, ge=1)
    queue: int = Field(256, ge=1)
    deadline_ms: float = Field(1000.0, gt=0)
    cpus: float = Field(1.0, ge=0)
    """CPUs that Ray reserves for each shard."""


def application(options: Options) -> serve.Application:
    """Build the application for `serve run` or `serve.run`."""
    shards = [
        serve.deployment(
            Shard,
            name=f"shard-{number}",
            num_replicas=1,
            # Above the limit of the shard's own queue, which refuses requests with 429.
            max_ongoing_requests=2 * options.queue,
            ray_actor_options={"num_cpus": options.cpus},
        ).bind(options, number)
        for number in range(options.shards)
    ]
    entry = serve.deployment(Entry, max_ongoing_requests=4 * options.queue, ray_actor_options={"num_cpus": 0})
    return entry.bind(options.deadline_ms / 1e3, *shards)


class Shard:
    """Ray actor that runs the application of `create_app` for the users of one shard."""

    def __init__(self, options: Options, number: int) -> None:
        self._open = ExitStack()
        device = self._open.enter_context(distributed_device())
        file = state_file(options.state, number, options.shards)
        log = self._open.enter_context(closing(EventLog(file)))

        def load() -> Engine:
            given = options.dataset, options.items
            scorer = BatchScorer.of_run(options.run, options.checkpoint, device, dataset=given[0], store=given[1])
            return Engine(scorer, log, options.cache_mib << 20, options.index, file.parent)

        limits = BatchLimits(options.batch, 0.0, options.queue, options.deadline_ms / 1e3)
        self._service = Service(load(), limits, read_token(options.token_file, "a cluster"))
        self._app = create_app(self._service, None, Reloader(self._service, load))

    async def answer(self, scope: dict[str, Any], body: bytes) -> Answer:
        """Answer a request. scope: the fields of the ASGI scope that can be sent between processes."""
        return await ask_application(self._app, scope, body)

    def process(self) -> int:
        """Process id of the replica."""
        return os.getpid()

    def __del__(self) -> None:
        """Answer the accepted requests when Ray ends the replica."""
        if hasattr(self, "_service"):
            self._service.close()
        self._open.close()


class Entry:
    """Ray deployment that sends each request to the shard of its user."""

    def __init__(self, deadline: float, *shards: DeploymentHandle) -> None:
        self._deadline, self._shards, self._turns = deadline, shards, itertools.cycle(range(len(shards)))

    async def __call__(self, request: Request) -> Response:
        """Answer a request."""
        # The path in the scope is already decoded.
        path, query, headers = request.scope["path"], request.scope["query_string"], list(request.scope["headers"])
        scope: dict[str, Any] = {"method": request.method, "path": path, "query_string": query, "headers": headers}
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY:
                return JSONResponse({"error": f"the body must have at most {MAX_BODY} bytes"}, 413)
        shards = self._shards if path in OF_ALL else [self._shards[self._shard(request.method, path, body)]]
        # A reload takes as long as a start, so it has no deadline.
        seconds = None if path == "/v1/reload" else self._deadline + 1
        answers = [await _ask(shard, scope, body, seconds) for shard in shards]
        if path == METRICS and request.method == "GET":
            texts = [content.decode() if status == 200 else None for status, _, content in answers]
            return Response(merged_metrics(texts), media_type="text/plain; version=0.0.4")
        status, fields, content = max(answers, key=lambda answer: answer[0])
        return Response(content, status, {name.decode(): value.decode() for name, value in fields})

    def _shard(self, method: str, path: str, body: bytes) -> int:
        """The shard of the request's user. Requests without a user, which have no state, go to the shards in turn."""
        user = user_of(method, path, body)
        return next(self._turns) if user is None else shard_of(user, len(self._shards))


async def _ask(shard: DeploymentHandle, scope: dict[str, Any], body: bytes, seconds: float | None) -> Answer:
    """A shard's answer, or 503 if the shard has died, is starting, or takes longer than `seconds` (None: no limit)."""

    async def shard_answer() -> Answer:
        answer: Answer = await shard.answer.remote(scope, body)
        return answer

    try:
        return await asyncio.wait_for(shard_answer(), seconds)
    except (RayError, RayServeException, TimeoutError):
        error = JSONResponse({"error": "the shard of this user gives no answer: try again later"}, 503)
        return 503, error.raw_headers, bytes(error.body)
