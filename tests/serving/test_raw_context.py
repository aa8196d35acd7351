"""Context values of requests are read as `hllm prepare` reads the cells of a table."""

import json
from typing import Any

import pyarrow as pa
import pytest

from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.serving.raw_context import RawContext
from hllm_torchrec.serving.request_schema import ScoreBody
from tests.helpers import task_shop

CELLS: dict[str, tuple[Any, Any]] = {
    "text": ("phone", "phone"),
    "spaces": (" phone ", "phone "),
    "newline": ("pho\nne", "pho\nne"),
    "integer": (5, 5.0),
    "float": (5.0, "5"),
    "written": ("7.0", "7.00"),
    "negative": (-3.0, -3),
    "fraction": (0.25, "0.25"),
    "true": (True, True),
    "false": (False, "false"),
}
"""(the cell, the value in a request)"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    rows = task_shop.events().to_pydict()
    texts = ["true" if value is True else "false" if value is False else str(value) for value, _ in CELLS.values()]
    rows["device"] = [texts[number % len(texts)] for number in range(len(rows["device"]))]
    return task_shop.prepared(tmp_path_factory.mktemp("shop"), pa.table(rows))


@pytest.mark.parametrize("name", CELLS)
def test_a_value_of_a_request_is_that_of_its_cell(dataset: Dataset, name: str) -> None:
    cell, value = CELLS[name]
    context = RawContext(dataset, ("device",))
    (found,) = context.columns({"device": value}, 1)["context_device"]
    expected = {"spaces": "phone", "integer": "5", "float": "5", "written": "7", "negative": "-3"}.get(name)
    stored = dataset.feature_values("device").to_pylist()
    assert found > 0 and stored[found - 1] == (expected or (str(cell).lower() if isinstance(cell, bool) else str(cell)))
    assert not context.unknown["device"]


def test_values_keep_their_type_in_a_request_over_http(dataset: Dataset) -> None:
    given = '{"a": true, "b": 5, "c": 0.25, "d": "5", "e": null, "f": 9007199254740993}'
    body = ScoreBody.model_validate_json(f'{{"candidates": ["s1"], "context": {given}}}')
    assert repr(body.context) == repr(json.loads(given))
    (found,) = RawContext(dataset, ("device",)).columns({"device": body.context["a"]}, 1)["context_device"]  # type: ignore[index]
    assert dataset.feature_values("device").to_pylist()[found - 1] == "true"
    with pytest.raises(ValueError, match="context 'price' is True; it must be a finite number"):
        RawContext(dataset, ("price",)).columns({"price": True}, 1)


def test_a_value_that_no_cell_can_have_is_refused(dataset: Dataset) -> None:
    with pytest.raises(ValueError, match=r"'device' is \['phone'\]; it must be a text, a number, a boolean, or None"):
        RawContext(dataset, ("device",)).columns({"device": ["phone"]}, 1)  # type: ignore[dict-item]


def test_what_no_cell_had_is_unknown_and_counted(dataset: Dataset) -> None:
    context = RawContext(dataset, ("device",))
    assert context.columns({"device": "fridge"}, 2)["context_device"].tolist() == [0, 0]
    assert context.columns({"device": None}, 1)["context_device"].tolist() == [0]
    assert context.unknown["device"] == 1
