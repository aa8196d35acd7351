"""`hllm train --config configs/recipes/retrieval.yaml --data.dataset DIR` trains and ranks the catalogue by itself."""

import json
from pathlib import Path

import pytest
import yaml

from hllm_torchrec.common.run_log import read_log
from hllm_torchrec.launch import evaluate, train
from tests.helpers import fixtures
from tests.helpers.training_fixtures import ITEM_LLAMA, USER_LLAMA

RECIPE = Path(__file__).parents[2] / "configs" / "recipes" / "retrieval.yaml"


def tiny(output: Path, *more: str) -> list[str]:
    """The recipe on the tiny shop, with tiny networks in the place of MiniLM and the User LLM."""
    return [
        *("--config", str(RECIPE), "--data.dataset", str(fixtures.dataset("leave_one_out").root)),
        *("--output", str(output), "--item_llm.pretrained=null", f"--item_llm.shape={json.dumps(ITEM_LLAMA)}"),
        f"--item_llm.tokenizer={fixtures.tokenizer_dir()}",
        f"--user.shape={json.dumps(USER_LLAMA)}",
        *("--objective.collapse_above=1", "--max_steps=3", *more),
    ]


def test_the_recipe_runs_says_why_and_saves_what_it_chose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(tiny(tmp_path / "run")) == 0
    said = capsys.readouterr().out
    catalogue = fixtures.dataset("leave_one_out").num_items - 1
    assert "recipe retrieval: item_llm.text_keys: [title, brand], chosen because items have text in" in said
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved.get("recipe") is None and saved["item_llm"]["text_keys"] == ["title", "brand"]
    assert saved["evaluation"]["protocol"] == "leave_one_out" and saved["item_llm"]["whiten"] is True
    (measured,) = [line for line in read_log(tmp_path / "run") if line["event"] == "measured"]
    assert measured["length"] > 0
    assert evaluate.main(["--run", str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())["retrieval"]
    assert found["protocol"] == "leave_one_out" and found["candidates"] == catalogue


def test_ids_alone_are_the_same_recipe_without_texts(tmp_path: Path) -> None:
    assert train.main(tiny(tmp_path / "run", "--item_llm.enabled=false", "--objective.text_similarity=0")) == 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["item_llm"]["enabled"] is False
    assert not [line for line in read_log(tmp_path / "run") if line["event"] == "measured"]
