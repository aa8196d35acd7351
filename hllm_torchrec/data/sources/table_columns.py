"""The parts of a table mapping, which give the file and the column of each field of events, items and users."""

from dataclasses import dataclass, field
from typing import Any

from hllm_torchrec.data.sources.dialect import Format


@dataclass(frozen=True)
class Join:
    """A file with additional columns of items, joined by the item's id."""

    path: str
    item: str
    columns: list[str]
    """Columns of `items.text` and `items.features` that are in this file."""
    format: Format | None = None


@dataclass(frozen=True)
class EventColumns:
    """The `events` part of the mapping."""

    path: str
    user: str
    item: str
    time: str | None = None
    time_unit: str = "seconds"
    label: str | None = None
    positive_from: float | None = None
    action: str | None = None
    actions: list[str] = field(default_factory=list)
    labels: dict[str, Any] = field(default_factory=dict)
    """Replaces `label`: several labels by name; see `declared_columns`."""
    weight: str | None = None
    sampling_rate: str | None = None
    context: dict[str, Any] = field(default_factory=dict)
    """Values of the request by name; see `declared_columns`."""
    format: Format | None = None


@dataclass(frozen=True)
class ItemColumns:
    """The `items` part of the mapping."""

    path: str
    item: str
    text: list[str]
    features: dict[str, str | None] = field(default_factory=dict)
    created_at: str | None = None
    time_unit: str = "seconds"
    active: str | None = None
    """Flag column: false marks a withdrawn item, which stays in histories but is no candidate; an empty cell: true."""
    html: str = "keep"
    """"clean" removes HTML tags from the texts and replaces entities by characters; "keep" leaves texts unchanged."""
    format: Format | None = None
    join: list[Join] = field(default_factory=list)


@dataclass(frozen=True)
class UserColumns:
    """The `users` part of the mapping."""

    path: str
    user: str
    features: dict[str, str | None] = field(default_factory=dict)
    format: Format | None = None
