"""The parts of a table mapping: which file and which columns hold what."""

from dataclasses import dataclass, field
from typing import Any

from hllm_torchrec.data.sources.dialect import Format


@dataclass(frozen=True)
class Join:
    """A file with further columns of items, joined by the item's id; its first row of an item is used."""

    path: str
    item: str
    columns: list[str]
    """Columns of `items.text` and `items.features` that this file has."""
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
    """Instead of `label`: several labels by name, see `declared_columns`."""
    weight: str | None = None
    sampling_rate: str | None = None
    context: dict[str, Any] = field(default_factory=dict)
    """Values of the request by name, see `declared_columns`."""
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
    """Column that says whether an item is offered; empty: it is. A withdrawn one is history, but no candidate."""
    html: str = "keep"
    """"clean": entities become characters, and tags are removed from the texts."""
    format: Format | None = None
    join: list[Join] = field(default_factory=list)


@dataclass(frozen=True)
class UserColumns:
    """The `users` part of the mapping."""

    path: str
    user: str
    features: dict[str, str | None] = field(default_factory=dict)
    format: Format | None = None
