"""Endpoints of the service (FastAPI): they check, call `Service` and turn errors into one line of JSON.

app = create_app(service)       # run it with uvicorn, or with `hllm serve`
"""

import hmac
import json
import time as clock
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hllm_torchrec import __version__
from hllm_torchrec.common.terminal import say
from hllm_torchrec.serving.engine import RawEvents, ScoreRequest
from hllm_torchrec.serving.micro_batches import DeadlineMissed, QueueFull
from hllm_torchrec.serving.request_schema import MAX_BODY, Event, Problem, ScoreAnswer, ScoreBody
from hllm_torchrec.serving.service import Service

REFUSALS: dict[int | str, dict[str, Any]] = {
    401: {"model": Problem, "description": "no bearer token, or another one"},
    413: {"model": Problem, "description": "the body is too large"},
    422: {"model": Problem, "description": "the body is not of its form, or names what is not known"},
    429: {"model": Problem, "description": "the queue is full: try again later, or elsewhere"},
    503: {"model": Problem, "description": "no answer within the deadline, or the service is ending"},
}


def create_app(service: Service, log: Callable[[object], None] | None = say) -> FastAPI:
    """Build the application; log: prints a line of JSON for each request, without ids and texts; None: no log."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(title="hllm serve", version=__version__, lifespan=lifespan, responses=REFUSALS)
    _add_errors(app)
    app.add_middleware(BodyLimit)

    def authorized(request: Request) -> None:
        _check_token(request, service.token)

    @app.middleware("http")
    async def access_log(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
        started = clock.perf_counter()
        answer = await call(request)
        if log is not None:
            route = request.scope.get("route")
            # The route's template, never the path: that may name a user.
            line = {"time": round(clock.time(), 3), "method": request.method, "route": getattr(route, "path", None)}
            log(json.dumps(line | {"status": answer.status_code, "ms": _milliseconds(started)}))
        return answer

    @app.get("/healthz", summary="200 while the process works")
    async def healthz() -> JSONResponse:
        alive = service.batches.alive
        return JSONResponse({"alive": alive}, 200 if alive else 503)

    @app.get("/readyz", summary="200 while requests are answered")
    async def readyz() -> JSONResponse:
        return JSONResponse({"ready": service.ready, "model": service.engine.mark}, 200 if service.ready else 503)

    @app.post("/v1/score", dependencies=[Depends(authorized)], summary="Score candidates for a user")
    async def score(body: ScoreBody) -> ScoreAnswer:
        moment = int(service.now()) if body.time is None else body.time
        history = None if body.history is None else _raw_events(body.history)
        found = await service.score(ScoreRequest(body.user, body.candidates, moment, history))
        chances = 1 / (1 + np.exp(-found.logits.astype(np.float64)))
        return ScoreAnswer(
            scores=found.logits.tolist(), probabilities=chances.tolist(), events=found.events, model=found.model
        )

    return app


def _raw_events(events: list[Event]) -> RawEvents:
    return RawEvents(
        [event.item for event in events],
        [event.timestamp for event in events],
        [np.nan if event.label is None else event.label for event in events],
        [event.action for event in events],
    )


def _milliseconds(started: float) -> float:
    return round((clock.perf_counter() - started) * 1e3, 2)


def _check_token(request: Request, token: str | None) -> None:
    given = request.headers.get("authorization", "")
    if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
        raise HTTPException(401, "give the service's token in the header: Authorization: Bearer TOKEN")


def _add_errors(app: FastAPI) -> None:
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
        return answer(422, str(error))

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
