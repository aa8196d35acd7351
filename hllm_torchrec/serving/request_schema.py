"""Bodies of the service's requests and answers, with their limits, from which the OpenAPI document is generated.

Ids are raw ids (strings, as in the source of the dataset), times are seconds UTC.
"""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from hllm_torchrec.data.bad_rows import MAX_SECOND

MAX_CANDIDATES, MAX_EVENTS = 10_000, 10_000
"""Largest numbers of candidates and of events in one request."""
MAX_BODY = 4 << 20
"""Largest size of the body of a request, in bytes."""

RawId = Annotated[str, Field(min_length=1, max_length=256, examples=["242"])]
Second = Annotated[int, Field(ge=0, le=MAX_SECOND, description="seconds UTC", examples=[893_286_638])]


def _is_label(value: float) -> float:
    if value not in (0.0, 1.0):
        raise ValueError("must be 0 or 1")
    return value


Label = Annotated[float, AfterValidator(_is_label), Field(ge=0, le=1)]
Context = dict[str, str | bool | int | float | None] | None


class _Body(BaseModel):
    """Body of a request; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Event(_Body):
    """An event of a user."""

    item: RawId
    timestamp: Second
    label: Label | None = Field(
        None, description="label of an exposure: 1 positive, 0 negative; null: the event is not an exposure"
    )
    action: str | None = Field(None, max_length=256, description="name of the action, as in the source; null: unknown")


class ScoreBody(_Body):
    """Candidates to score for a user, or for the history in the request."""

    user: RawId | None = Field(None, description="raw id; null, or one that is not known: a new user")
    candidates: list[RawId] = Field(min_length=1, max_length=MAX_CANDIDATES)
    time: Second | None = Field(
        None,
        description="time of the request; null: now. Only events before `time` minus `data.feedback_delay` count; with "
        "a leave-one-out dataset all events count",
    )
    history: list[Event] | None = Field(
        None,
        max_length=MAX_EVENTS,
        description="events to use instead of the user's known events, and not stored; null: the user's known events",
    )
    context: Context = Field(
        None,
        description="name -> value for every context column that the model reads (`data.context`); value null: unknown",
    )


class ScoreAnswer(BaseModel):
    """Scores in the order of the candidates. model: mark of the weights, their calibration and the dataset version."""

    scores: list[float] = Field(description="logits of the first label: the `score` of `hllm evaluate`")
    probabilities: list[float] = Field(description="probabilities of the first label, calibrated if the run is")
    tasks: dict[str, list[float]] = Field(
        description="predictions of each task, by name; empty for a model with a single task"
    )
    events: int = Field(description="number of the user's events that the request could see")
    model: str


class RecommendBody(_Body):
    """Request for the best items of the catalogue for a user, or for the history in the request."""

    user: RawId | None = Field(None, description="raw id; null, or one that is not known: a new user")
    top: int = Field(10, ge=1, le=1000)
    time: Second | None = Field(None, description="as in /v1/score")
    history: list[Event] | None = Field(None, max_length=MAX_EVENTS, description="as in /v1/score")
    context: Context = Field(None, description="as in /v1/score")
    candidates: int = Field(
        200,
        ge=1,
        le=MAX_CANDIDATES,
        description="number of items that the index retrieves; without an index all items are ranked",
    )
    seen_too: bool = Field(False, description="whether items of the history may be recommended")
    filters: dict[str, list[str]] = Field(
        {},
        max_length=16,
        description="item feature -> values: only items with at least one of the values of each feature are returned",
    )


class RecommendedAnswer(BaseModel):
    """A recommended item. text: the item's text columns, joined."""

    item: str
    text: str
    score: float
    probability: float
    title: Annotated[
        str | None, Field(description="title for the user's cluster (hllm serve --creatives); null: the item has none")
    ] = None


class RecommendAnswer(BaseModel):
    """Items, the best first; fewer than `top` if the filters and exclusions allow no more."""

    items: list[RecommendedAnswer]
    events: int
    model: str


class EventsBody(_Body):
    """Events of a user to store."""

    user: RawId
    events: list[Event] = Field(min_length=1, max_length=MAX_EVENTS)


class EventsAnswer(BaseModel):
    """The events are stored on the disk; requests of later seconds see them. kept: number of events."""

    kept: int


class NewItemBody(_Body):
    """An item that is not in the prepared dataset."""

    item: RawId
    text: dict[str, Annotated[str, Field(max_length=10_000)]] = Field(description="text column -> text")
    features: dict[str, list[Annotated[str, Field(max_length=256)]]] = Field({}, description="item feature -> values")


class ItemsBody(_Body):
    """New items; their texts are encoded before the answer."""

    items: list[NewItemBody] = Field(min_length=1, max_length=100)


class ItemsAnswer(BaseModel):
    """added: number of items that are new, or whose text or features have changed, including those that other processes
    added meanwhile."""

    added: int


class ForgottenAnswer(BaseModel):
    """The service no longer has or reads data of the user; the dataset and other files are not changed."""

    events: int = Field(description="number of the user's events that were deleted here")
    remaining: str = Field(description="where the user's data may still be, and the command that removes it")


class ReloadAnswer(BaseModel):
    """Marks of the models now and before (equal if no new model is published), and the changes of the probabilities of
    recent requests."""

    model: str
    previous: str
    requests: int
    largest_change: float
    mean_change: float


class PastEvent(BaseModel):
    """An event of a user's history. text: the item's text."""

    item: str
    text: str
    timestamp: int
    label: float | None


class HistoryAnswer(BaseModel):
    """The latest events of a user, the newest first. total: number of all events of the user."""

    events: list[PastEvent]
    total: int


class Problem(BaseModel):
    """Answer to a request that was refused. error: the reason."""

    error: str
