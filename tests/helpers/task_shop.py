"""A tiny shop whose events have several labels, weights, sampling rates and request context."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import yaml

from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.sources.table_mapping import table
from tests.helpers import fixtures

USERS, ITEMS, PAGES, SLOTS = 20, 16, 7, 4
DEVICES = ("phone", "desk", "watch")
LABELS: dict[str, Any] = {
    "click": "binary",
    "like": {"kind": "binary", "given": "click"},
    "watch": {"kind": "regression", "transform": "log1p"},
    "stars": {"kind": "ordinal", "values": [1, 2, 3], "given": "click"},
}
CONTEXT: dict[str, Any] = {"device": "categorical", "place": "categorical", "price": "numeric"}


def events(seed: int = 0, first_day: int = 0, days: int = PAGES) -> pa.Table:
    """Pages of SLOTS items in one second; the watch is a device of the last page only."""
    rng = np.random.default_rng(seed)
    pages = USERS * days
    user, day = np.divmod(np.arange(pages), days)
    item = np.stack([rng.permutation(ITEMS)[:SLOTS] for _ in range(pages)])
    device = np.where(day == PAGES - 1, rng.integers(0, 3, pages), rng.integers(0, 2, pages))
    place = np.tile(np.arange(1, SLOTS + 1), (pages, 1))
    click = rng.random((pages, SLOTS)) < np.where((item + user[:, None]) % 3 == 0, 0.8, 0.2)
    columns = {
        "user": np.char.add("u", np.repeat(user, SLOTS).astype(str)),
        "item": np.char.add("i", item.ravel().astype(str)),
        "second": np.repeat(1_600_000_000 + (day + first_day) * 86_400 + user * 60, SLOTS),
        "click": click.ravel().astype(int),
        "like": (rng.random((pages, SLOTS)) < 0.5).ravel().astype(int),
        "watch": np.where(click, rng.exponential(30, click.shape).round(2), 0).ravel(),
        "stars": rng.integers(1, 4, (pages, SLOTS)).ravel(),
        "device": np.array(DEVICES)[np.repeat(device, SLOTS)],
        "place": place.ravel(),
        "price": np.where(rng.random(pages * SLOTS) < 0.1, "", rng.integers(1, 9, pages * SLOTS).astype(str)),
        "weight": rng.choice([0.5, 1.0, 2.0], pages * SLOTS),
        "rate": np.repeat(rng.choice([0.25, 1.0], pages), SLOTS),
    }
    return pa.table({name: pa.array(values) for name, values in columns.items()})


def mapping(**changes: Any) -> dict[str, Any]:
    """The mapping; changes are those of its events."""
    own = {"path": "events.csv", "user": "user", "item": "item", "time": "second", "labels": LABELS, "context": CONTEXT}
    return {
        "name": "task-shop",
        "events": own | changes,
        "items": {"path": "items.csv", "item": "item", "text": ["title"]},
    }


def write(folder: Path, rows: pa.Table | None = None, **changes: Any) -> Path:
    """Write the files and the mapping of a shop; returns the mapping's path."""
    folder.mkdir(parents=True, exist_ok=True)
    pa.csv.write_csv(events() if rows is None else rows, folder / "events.csv")
    items = pa.table({"item": [f"i{i}" for i in range(ITEMS)], "title": [f"word{i}" for i in range(ITEMS)]})
    pa.csv.write_csv(items, folder / "items.csv")
    (folder / "mapping.yaml").write_text(yaml.safe_dump(mapping(**changes), sort_keys=False))
    return folder / "mapping.yaml"


def prepared(folder: Path, rows: pa.Table | None = None, **changes: Any) -> Dataset:
    """A prepared shop in `folder`/dataset."""
    return Dataset.open(prepare(table(write(folder / "files", rows, **changes)), folder / "dataset"))


@cache
def dataset() -> Dataset:
    """The shop with all labels and all context."""
    return prepared(fixtures.folder() / "task-shop")


@cache
def weighted() -> Dataset:
    """The shop with weights and sampling rates as well."""
    return prepared(fixtures.folder() / "weighted-shop", weight="weight", sampling_rate="rate")


SETTINGS: dict[str, Any] = {
    "item_llm__enabled": False,
    "item_llm__shape": None,
    "item_llm__tokenizer": None,
    "data__item_features": [],
    "data__user_features": [],
    "data__numeric_features": [],
    "data__max_history": 32,
    "objective__negatives": 4,
}
"""Settings of an ID-only run on the shop, for `training_fixtures.config`."""
TASKS: dict[str, Any] = {"click": {}, "like": {"weight": 0.5}, "watch": {}, "stars": {}}
