"""Endpoints of the service (FastAPI): they check, call `Service` and turn errors into one line of JSON.

app = create_app(service)       # run it with uvicorn, or with `hllm serve`
"""

import hmac
import json
import shlex
import time as clock
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path as FilePath
from typing import Annotated, Any

import numpy as np
from fastapi import Depends, FastAPI, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hllm_torchrec import __version__
from hllm_torchrec.common.errors import UnavailableError
from hllm_torchrec.common.terminal import say
from hllm_torchrec.data.event_log import LoggedEvent
from hllm_torchrec.serving.engine import RawEvents, RecommendRequest, ScoreRequest
from hllm_torchrec.serving.micro_batches import DeadlineMissed, QueueFull
from hllm_torchrec.serving.raw_histories import UnknownIdsError
from hllm_torchrec.serving.reload import Reloader, ReloadRefusedError
from hllm_torchrec.serving.request_schema import (
    MAX_BODY,
    Event,
    EventsAnswer,
    EventsBody,
    ForgottenAnswer,
    HistoryAnswer,
    ItemsAnswer,
    ItemsBody,
    NewItemBody,
    PastEvent,
    Problem,
    RecommendAnswer,
    RecommendBody,
    RecommendedAnswer,
    ReloadAnswer,
    ScoreAnswer,
    ScoreBody,
)
from hllm_torchrec.serving.service import Service

UserId = Annotated[str, Path(min_length=1, max_length=256)]
DEMO = FilePath(__file__).parent / "demo.html"
DEMO_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"
REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "the body cannot be decoded"},
    401: {"model": Problem, "description": "no bearer token, or another one"},
    403: {"model": Problem, "description": "the service was started without a token, which this needs"},
    409: {"model": Problem, "description": "the model was not reloaded, and the one before stays"},
    413: {"model": Problem, "description": "the body is too large"},
    422: {"model": Problem, "description": "the body is not of its form, or names what is not known"},
    429: {"model": Problem, "description": "the queue is full: try again later, or elsewhere"},
    503: {"model": Problem, "description": "no answer within the deadline, a full disk, or the service is ending"},
}


def create_app(
    service: Service, log: Callable[[object], None] | None = say, reloader: Reloader | None = None
) -> FastAPI:
    """Build the application.

    log: prints a line of JSON for each request, without ids and texts; None: no log. reloader: of /v1/reload; None:
    there is no such endpoint.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(title="hllm serve", version=__version__, lifespan=lifespan, responses=REFUSALS)
    _add_errors(app, service)
    app.add_middleware(BodyLimit)

    def authorized(request: Request) -> None:
        _check_token(request, service.token)

    def owned(request: Request) -> None:
        if service.token is None:
            raise HTTPException(403, "this needs a token, also on this machine: start the service with --token-file")
        _check_token(request, service.token)

    @app.middleware("http")
    async def access_log(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
        started = clock.perf_counter()
        answer = await call(request)
        # The route's template, never the path: that may name a user.
        route = getattr(request.scope.get("route"), "path", "").replace(":path}", "}")
        seconds = clock.perf_counter() - started
        service.metrics.requests.labels(route, answer.status_code).inc()
        if route.startswith("/v1/"):
            service.metrics.seconds.labels("request").observe(seconds)
        if log is not None:
            line = {"time": round(clock.time(), 3), "method": request.method, "route": route}
            log(json.dumps(line | {"status": answer.status_code, "ms": round(seconds * 1e3, 2)}))
        return answer

    @app.get("/healthz", summary="200 while the process works")
    async def healthz() -> JSONResponse:
        alive = service.batches.alive
        return JSONResponse({"alive": alive}, 200 if alive else 503)

    @app.get("/readyz", summary="200 while requests are answered")
    async def readyz() -> JSONResponse:
        return JSONResponse({"ready": service.ready, "model": service.engine.mark}, 200 if service.ready else 503)

    @app.get("/metrics", summary="Counters in Prometheus's format")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    def moment(given: int | None) -> int:
        return int(service.now()) if given is None else given

    @app.post("/v1/score", dependencies=[Depends(authorized)], summary="Score candidates for a user")
    async def score(body: ScoreBody) -> ScoreAnswer:
        given = _raw_events(body.history)
        request = ScoreRequest(body.user, body.candidates, moment(body.time), given, body.context)
        found, probabilities = await service.score(request)
        several = {name: values.tolist() for name, values in found.tasks.items()} if len(found.tasks) > 1 else {}
        return ScoreAnswer(
            scores=found.logits.tolist(),
            probabilities=probabilities,
            tasks=several,
            events=found.events,
            model=found.model,
        )

    @app.post("/v1/recommend", dependencies=[Depends(authorized)], summary="The best items for a user")
    async def recommend(body: RecommendBody) -> RecommendAnswer:
        given = body.model_dump(exclude={"time", "history"})
        request = RecommendRequest(**given, time=moment(body.time), history=_raw_events(body.history))
        found, probabilities = await service.score(request)
        items = [
            RecommendedAnswer(item=raw, text=text, score=score, probability=probability)
            for (raw, text), score, probability in zip(found.items, found.logits.tolist(), probabilities, strict=True)
        ]
        return RecommendAnswer(items=items, events=found.events, model=found.model)

    @app.post("/v1/events", dependencies=[Depends(authorized)], summary="Keep events of a user")
    def events(body: EventsBody) -> EventsAnswer:
        kept = [LoggedEvent(event.item, event.timestamp, event.label, event.action) for event in body.events]
        service.engine.append(body.user, kept)
        return EventsAnswer(kept=len(kept))

    @app.post("/v1/items", dependencies=[Depends(authorized)], summary="Make new items known by their text")
    def items(body: ItemsBody) -> ItemsAnswer:
        return ItemsAnswer(added=service.engine.add_items(*_columns(body.items)))

    @app.delete("/v1/users/{user:path}", dependencies=[Depends(owned)], summary="Forget a user")
    async def forget(user: UserId) -> ForgottenAnswer:
        return ForgottenAnswer(events=await service.forget(user), remaining=_remaining(service, user))

    @app.get("/v1/users/{user:path}/events", dependencies=[Depends(authorized)], summary="Latest events of a user")
    def history(user: UserId, last: Annotated[int, Query(ge=1, le=1000)] = 20) -> HistoryAnswer:
        known = service.engine.histories.read(user).events
        latest = known[max(0, len(known) - last) :]
        names = service.engine.item_texts(latest.item_ids)
        rows = zip(names, latest.timestamps.tolist(), latest.labels.tolist(), strict=True)
        events = [
            PastEvent(item=raw, text=text, timestamp=second, label=None if np.isnan(label) else label)
            for (raw, text), second, label in rows
        ]
        return HistoryAnswer(events=events[::-1], total=len(known))

    @app.get("/", include_in_schema=False)
    def demo() -> HTMLResponse:
        return HTMLResponse(DEMO.read_text(encoding="utf-8"), headers={"Content-Security-Policy": DEMO_POLICY})

    if reloader is not None:

        @app.post("/v1/reload", dependencies=[Depends(owned)], summary="Load what is published now")
        def reload() -> ReloadAnswer:
            return ReloadAnswer(**asdict(reloader.reload()))

    return app


def _remaining(service: Service, user: str) -> str:
    """What a service cannot forget: the dataset, and what was made from it."""
    given = shlex.join(["--dataset", str(service.engine.scorer.experiment.dataset.root), f"--user={user}"])
    command = f"hllm forget {given} --runs RUNS --stores STORES"
    return f"dataset, runs and stores keep what they have of the user until: {command}"


def _columns(items: list[NewItemBody]) -> tuple[list[str], dict[str, list[str]], dict[str, list[list[str]]]]:
    """Raw ids, texts and features of items as columns; one that an item lacks is empty."""
    texts = {name: [item.text.get(name, "") for item in items] for name in {n for item in items for n in item.text}}
    names = {name for item in items for name in item.features}
    return [item.item for item in items], texts, {n: [item.features.get(n, []) for item in items] for n in names}


def _raw_events(events: list[Event] | None) -> RawEvents | None:
    if events is None:
        return None
    return RawEvents(
        [event.item for event in events],
        [event.timestamp for event in events],
        [np.nan if event.label is None else event.label for event in events],
        [event.action for event in events],
    )


def _check_token(request: Request, token: str | None) -> None:
    given = request.headers.get("authorization", "")
    if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
        raise HTTPException(401, "give the service's token in the header: Authorization: Bearer TOKEN")


def _add_errors(app: FastAPI, service: Service) -> None:
    """Answers of one line for all errors; a client never sees a traceback."""

    def answer(status: int, text: str) -> JSONResponse:
        return JSONResponse({"error": text}, status)

    @app.exception_handler(HTTPException)
    async def known(_: Request, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return answer(422, f"{place}: {first['msg']}")

    @app.exception_handler(ValueError)
    async def wrong(_: Request, error: ValueError) -> JSONResponse:
        if isinstance(error, UnknownIdsError):
            service.metrics.unknown.inc()
        return answer(422, str(error))

    @app.exception_handler(UnavailableError)
    async def unavailable(_: Request, error: UnavailableError) -> JSONResponse:
        say(f"hllm serve: {error}")  # the file is for who runs the service
        return answer(503, "the service cannot write or read its files, and has kept nothing: try again later")

    @app.exception_handler(ReloadRefusedError)
    async def refused(_: Request, error: ReloadRefusedError) -> JSONResponse:
        return answer(409, str(error))

    @app.exception_handler(QueueFull)
    async def full(_: Request, error: QueueFull) -> JSONResponse:
        return answer(429, "the queue is full: try again later")

    @app.exception_handler(DeadlineMissed)
    async def late(_: Request, error: DeadlineMissed) -> JSONResponse:
        return answer(503, "no answer within the deadline: try again later")

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        return answer(500, "internal error")


class BodyLimit:
    """ASGI middleware that refuses bodies of more than MAX_BODY bytes, also those that do not say their length."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not length.isdigit() or int(length) > MAX_BODY:
            await JSONResponse({"error": f"the body must have at most {MAX_BODY} bytes"}, 413)(scope, receive, send)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > MAX_BODY:
                raise HTTPException(413, f"the body must have at most {MAX_BODY} bytes")
            return message

        await self.app(scope, counted, send)
