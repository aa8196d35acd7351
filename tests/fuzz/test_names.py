"""Fuzz: columns of events, items and users with the names that datasets and events have for columns of their own."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.sources.table_mapping import table
from tests.fuzz.mutations import FEWER, Target, check_reader
from tests.helpers import fixtures

NAMES = (
    "row", "item_id", "raw_item_id", "user_id", "raw_user_id", "timestamp", "time_text", "label", "text_of_label",
    "label_text", "action", "active", "created_at", "order", "item_ids", "timestamps", "labels", "actions", "weight",
    "target_start", "sampling_rate", "label_a", "context_a", "feature_a", "score", "probability", "position", "a", "A",
    "text", "id", "value",
)  # fmt: skip
OTHER_NAMES = (*NAMES, "b c", "\N{LATIN SMALL LETTER E WITH ACUTE}", "x.y", "1", "true", "null", "")
ROWS = 12


def check(mutation: Any) -> bool:
    """Prepare a shop whose columns have the names drawn, and compare all values; whether it was read."""
    ids, labels, contexts, (text, feature), (other,), declared = mutation
    folder = fixtures.folder() / "fuzz-names"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    columns = dict(zip(("user", "item", "time"), ids))
    events: dict[str, list[Any]] = {
        columns["user"]: [f"u{n % 3}" for n in range(ROWS)],
        columns["item"]: [f"i{n % 4}" for n in range(ROWS)],
        columns["time"]: [1_700_000_000 + n for n in range(ROWS)],
    }
    free = [name for name in (*NAMES, *(f"c{n}" for n in range(9))) if name not in events]
    places = iter(free[declared:])
    own: dict[str, str] = {}
    for name in (*labels, *contexts, "the weight"):
        own[name] = next(places)
    for number, name in enumerate(labels):
        events[own[name]] = [(n >> number) % 2 for n in range(ROWS)]
    for number, name in enumerate(contexts):
        events[own[name]] = [f"v{n % 5}" if number == 0 else n + number / 2 for n in range(ROWS)]
    events[own["the weight"]] = [1 + n / 4 for n in range(ROWS)]
    pq.write_table(pa.table(events), folder / "e.parquet")
    items = {"the id": [f"i{n}" for n in range(4)], text: [f"Title {n}" for n in range(4)]}
    items |= {feature: [f"f{n % 2}" for n in range(4)]}
    pq.write_table(pa.table(items), folder / "i.parquet")
    pq.write_table(pa.table({"the id": ["u0", "u1", "u2"], other: ["x", "y", "x"]}), folder / "u.parquet")
    kinds = ["categorical", *["numeric"] * 9]
    mapping = {
        "name": "names",
        "events": {
            "path": "e.parquet",
            **columns,
            "labels": {name: {"kind": "binary", "column": own[name]} for name in labels},
            "context": {name: {"kind": kind, "column": own[name]} for name, kind in zip(contexts, kinds)},
            "weight": own["the weight"],
        },
        "items": {"path": "i.parquet", "item": "the id", "text": [text], "features": {feature: None}},
        "users": {"path": "u.parquet", "user": "the id", "features": {other: None}},
    }
    (folder / "m.yaml").write_text(json.dumps(mapping))
    return check_reader(lambda: compare(folder, events, own, mapping), [str(folder), "names: "])


def compare(folder: Path, events: dict[str, list[Any]], own: dict[str, str], mapping: dict[str, Any]) -> None:
    """Every value of the dataset is that of the files."""
    dataset = Dataset.open(prepare(table(folder / "m.yaml"), folder / "data"))
    items, users = dataset.items["raw_item_id"].to_pylist(), dataset.users["raw_user_id"].to_pylist()
    (text,), (feature,), (other,) = (
        mapping["items"]["text"],
        mapping["items"]["features"],
        mapping["users"]["features"],
    )
    assert dataset.text([text])[text].to_pylist() == [f"Title {raw[1:]}" for raw in items]
    assert values(dataset, "item", feature) == [f"f{int(raw[1:]) % 2}" for raw in items]
    assert values(dataset, "user", other) == [("x", "y", "x")[int(raw[1:])] for raw in users]
    first, *others = mapping["events"]["labels"]
    contexts = list(mapping["events"]["context"])
    words = [None, *dataset.feature_values(contexts[0]).to_pylist()]
    seen = 0
    for user, raw in enumerate(users, start=1):
        found = dataset.user_events(user)
        for place in range(len(found)):
            row = int(found.timestamps[place]) - 1_700_000_000
            expected = {name: events[column][row] for name, column in own.items()}
            assert (raw, items[found.item_ids[place] - 1]) == (f"u{row % 3}", f"i{row % 4}")
            assert found.labels[place] == expected[first]
            assert [found.extra[f"label_{name}"][place] for name in others] == [expected[name] for name in others]
            assert words[int(found.extra[f"context_{contexts[0]}"][place])] == expected[contexts[0]]
            assert [found.extra[f"context_{name}"][place] for name in contexts[1:]] == [
                expected[n] for n in contexts[1:]
            ]
            assert found.extra["weight"][place] == expected["the weight"]
            seen += 1
    assert seen == ROWS


def values(dataset: Dataset, kind: str, name: str) -> list[str]:
    """The only value of a feature for each item or user from 1 on."""
    words = [None, *dataset.feature_values(name).to_pylist()]
    ids, offsets = dataset.feature_ids(kind, name)
    return [words[ids[start]] for start in offsets[1:-1]]


def distinct(names: tuple[str, ...], least: int, most: int) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(names), min_size=least, max_size=most, unique=True)


TARGET = Target(
    "names",
    st.tuples(
        distinct(OTHER_NAMES, 3, 3),
        distinct(NAMES, 1, 3),
        distinct(NAMES, 1, 3),
        distinct(OTHER_NAMES, 2, 2),
        distinct(OTHER_NAMES, 1, 1),
        st.integers(0, 20),
    ),
    check,
)


@pytest.mark.slow
@FEWER
@example((["who", "what", "when"], ["click", "text"], ["weight", "price"], ["title", "genre"], ["country"], 20))
@example((["who", "what", ""], ["click"], ["device"], ["title", "genre"], ["country"], 20))
@example((["who", "what", "when"], ["click"], ["device"], ["row", "genre"], ["country"], 20))
@given(TARGET.inputs)
def test_columns_of_any_name_are_read_or_refused(mutation: Any) -> None:
    check(mutation)


def test_what_is_usual_is_read() -> None:
    assert check(
        (["who", "what", "when"], ["click", "weight"], ["device", "price"], ["title", "genre"], ["country"], 28)
    )
