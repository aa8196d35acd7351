"""Endpoints of the service (FastAPI): they validate requests, call `Service`, and answer errors with one line of JSON.

app = create_app(service)       # run it with uvicorn, or with `hllm serve`
"""

import shlex
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path as FilePath
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, FastAPI, Path, Query
from fastapi.responses import HTMLResponse, JSONResponse, Response

from hllm_torchrec import __version__
from hllm_torchrec.common.terminal import say
from hllm_torchrec.data.event_log import LoggedEvent
from hllm_torchrec.serving.engine import RawEvents, RecommendRequest, ScoreRequest
from hllm_torchrec.serving.http_rules import BodyLimit, Tokens, add_access_log, add_errors
from hllm_torchrec.serving.reload import Reloader
from hllm_torchrec.serving.request_schema import (
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
    401: {"model": Problem, "description": "the bearer token is missing or wrong"},
    403: {"model": Problem, "description": "this endpoint needs a token, and the service was started without one"},
    409: {"model": Problem, "description": "the model was not reloaded; the previous one is still in use"},
    413: {"model": Problem, "description": "the body is too large"},
    422: {"model": Problem, "description": "the body does not match the schema, or names an unknown id"},
    429: {"model": Problem, "description": "the queue is full: try again later, or elsewhere"},
    503: {"model": Problem, "description": "no answer within the deadline, a full disk, or the service is ending"},
}


def create_app(
    service: Service, log: Callable[[object], None] | None = say, reloader: Reloader | None = None
) -> FastAPI:
    """Build the application.

    log: function that prints a line of JSON for each request, without ids and texts; None: no log. reloader:
    for the endpoint /v1/reload; None: no such endpoint.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(title="hllm serve", version=__version__, lifespan=lifespan, responses=REFUSALS)
    add_errors(app, service)
    app.add_middleware(BodyLimit)
    add_access_log(app, service, log)
    tokens = Tokens(service.token)
    allowed, owned = [Depends(tokens.authorized)], [Depends(tokens.token_required)]
    app.include_router(_probes(service))
    app.include_router(_scores(service), dependencies=allowed)
    app.include_router(_additions(service), dependencies=allowed)
    app.include_router(_forgetting(service), dependencies=owned)
    app.include_router(_histories(service), dependencies=allowed)
    app.include_router(_demo())
    if reloader is not None:
        app.include_router(_reloads(reloader), dependencies=owned)
    return app


def _probes(service: Service) -> APIRouter:
    """Endpoints for an orchestrator: liveness, readiness, metrics."""
    router = APIRouter()

    @router.get("/healthz", summary="200 while the process works")
    async def healthz() -> JSONResponse:
        alive = service.batches.alive
        return JSONResponse({"alive": alive}, 200 if alive else 503)

    @router.get("/readyz", summary="200 while requests are answered")
    async def readyz() -> JSONResponse:
        return JSONResponse({"ready": service.ready, "model": service.engine.mark}, 200 if service.ready else 503)

    @router.get("/metrics", summary="Counters in Prometheus's format")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return router


def _scores(service: Service) -> APIRouter:
    """Endpoints for scores and recommendations."""
    router = APIRouter()

    def moment(given: int | None) -> int:
        return int(service.now()) if given is None else given

    @router.post("/v1/score", summary="Score candidates for a user")
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

    @router.post("/v1/recommend", summary="The best items for a user", response_model_exclude_unset=True)
    async def recommend(body: RecommendBody) -> RecommendAnswer:
        given = body.model_dump(exclude={"time", "history"})
        request = RecommendRequest(**given, time=moment(body.time), history=_raw_events(body.history))
        found, probabilities = await service.score(request)
        items = [
            RecommendedAnswer(item=raw, text=text, score=score, probability=probability)
            for (raw, text), score, probability in zip(found.items, found.logits.tolist(), probabilities, strict=True)
        ]
        if service.titles is not None:  # without titles the answer has no such field
            for item, title in zip(items, service.titles_of(body.user, [raw for raw, _ in found.items]), strict=True):
                item.title = title
        return RecommendAnswer(items=items, events=found.events, model=found.model)

    return router


def _additions(service: Service) -> APIRouter:
    """Endpoints that store events and new items."""
    router = APIRouter()

    @router.post("/v1/events", summary="Keep events of a user")
    def events(body: EventsBody) -> EventsAnswer:
        kept = [LoggedEvent(event.item, event.timestamp, event.label, event.action) for event in body.events]
        service.engine.append(body.user, kept)
        return EventsAnswer(kept=len(kept))

    @router.post("/v1/items", summary="Make new items known by their text")
    def items(body: ItemsBody) -> ItemsAnswer:
        return ItemsAnswer(added=service.engine.add_items(*_columns(body.items)))

    return router


def _forgetting(service: Service) -> APIRouter:
    router = APIRouter()

    @router.delete("/v1/users/{user:path}", summary="Forget a user")
    async def forget(user: UserId) -> ForgottenAnswer:
        return ForgottenAnswer(events=await service.forget(user), remaining=_remaining(service, user))

    return router


def _histories(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/users/{user:path}/events", summary="Latest events of a user")
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

    return router


def _demo() -> APIRouter:
    router = APIRouter()

    @router.get("/", include_in_schema=False)
    def demo() -> HTMLResponse:
        return HTMLResponse(DEMO.read_text(encoding="utf-8"), headers={"Content-Security-Policy": DEMO_POLICY})

    return router


def _reloads(reloader: Reloader) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/reload", summary="Load what is published now")
    def reload() -> ReloadAnswer:
        return ReloadAnswer(**asdict(reloader.reload()))

    return router


def _remaining(service: Service, user: str) -> str:
    """Text for the answer: where the user's data remain, and the command that removes them."""
    given = shlex.join(["--dataset", str(service.engine.scorer.experiment.dataset.root), f"--user={user}"])
    command = f"hllm forget {given} --runs RUNS --stores STORES"
    if service.engine.histories.dataset_has(user):
        return f"the dataset, runs and stores still contain this user; remove it with: {command}"
    return f"the dataset that is served does not contain this user; to search its other versions: {command}"


def _columns(items: list[NewItemBody]) -> tuple[list[str], dict[str, list[str]], dict[str, list[list[str]]]]:
    """Raw ids, texts and features of items as columns; a text or feature that an item lacks is empty."""
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
