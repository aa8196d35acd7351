"""Rules of all endpoints: bearer token, limit of the body's size, access log, and error answers of one line."""

import hmac
import json
import time as clock
from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hllm_torchrec.common.errors import UnavailableError
from hllm_torchrec.common.terminal import say
from hllm_torchrec.serving.micro_batches import DeadlineMissed, QueueFull
from hllm_torchrec.serving.raw_histories import UnknownIdsError
from hllm_torchrec.serving.reload import ReloadRefusedError
from hllm_torchrec.serving.request_schema import MAX_BODY
from hllm_torchrec.serving.service import Service


class Tokens:
    """FastAPI dependencies that check the service's token. With token None, requests need no token, and the endpoints
    that depend on `token_required` (those that delete or reload) refuse every request."""

    def __init__(self, token: str | None) -> None:
        self._token = token

    def authorized(self, request: Request) -> None:
        """Raise an HTTPException (401) for a request without the token."""
        given = request.headers.get("authorization", "")
        if self._token is not None and not hmac.compare_digest(given.encode(), f"Bearer {self._token}".encode()):
            raise HTTPException(401, "give the service's token in the header: Authorization: Bearer TOKEN")

    def token_required(self, request: Request) -> None:
        """Check as `authorized` does; raise an HTTPException (403) if the service has no token."""
        if self._token is None:
            raise HTTPException(403, "this needs a token, also on this machine: start the service with --token-file")
        self.authorized(request)


def add_access_log(app: FastAPI, service: Service, log: Callable[[object], None] | None) -> None:
    """Add a middleware that counts and times each request, and logs it as a line of JSON without ids and texts.

    log: function that prints a line; None: no log.
    """

    @app.middleware("http")
    async def access_log(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
        started = clock.perf_counter()
        answer = await call(request)
        # The route's template is logged, not the path, which may contain a user id.
        route = getattr(request.scope.get("route"), "path", "").replace(":path}", "}")
        seconds = clock.perf_counter() - started
        service.metrics.requests.labels(route, answer.status_code).inc()
        if route.startswith("/v1/"):
            service.metrics.seconds.labels("request").observe(seconds)
        if log is not None:
            line = {"time": round(clock.time(), 3), "method": request.method, "route": route}
            log(json.dumps(line | {"status": answer.status_code, "ms": round(seconds * 1e3, 2)}))
        return answer


def add_errors(app: FastAPI, service: Service) -> None:
    """Add handlers that answer every error with one line; a client never sees a traceback."""

    def answer(status: int, text: str) -> JSONResponse:
        return JSONResponse({"error": text}, status)

    @app.exception_handler(HTTPException)
    async def known(_: Request, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if isinstance(error.body, bytes):  # not decoded, because it is not declared as JSON
            given = request.headers.get("content-type", "none")
            return answer(422, f"body: its content type is {given}: send it with content-type: application/json")
        field = ".".join(str(part) for part in first["loc"])
        return answer(422, f"{field}: {first['msg']}")

    @app.exception_handler(ValueError)
    async def wrong(_: Request, error: ValueError) -> JSONResponse:
        if isinstance(error, UnknownIdsError):
            service.metrics.unknown.inc()
        return answer(422, str(error))

    @app.exception_handler(UnavailableError)
    async def unavailable(_: Request, error: UnavailableError) -> JSONResponse:
        say(f"hllm serve: {error}")  # the message has a file's path: it is for the operator, not for the client
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
    """ASGI middleware that refuses bodies of more than MAX_BODY bytes, with and without a Content-Length header."""

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
