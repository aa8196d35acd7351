"""`hllm train --config configs/recipes/retrieval.yaml --data.dataset DIR` trains and ranks the catalogue by itself."""

import json
from pathlib import Path

import pytest
import yaml

from hllm_torchrec.common.run_log import read_log
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.sources.table_mapping import table
from hllm_torchrec.launch import evaluate, init, train
from tests.helpers import fixtures, task_shop
from tests.helpers.training_fixtures import ITEM_LLAMA

RECIPE = Path(__file__).parents[2] / "configs" / "recipes" / "retrieval.yaml"


def tiny(output: Path, *more: str) -> list[str]:
    """The recipe on the tiny shop, with tiny networks."""
    return [
        *("--config", str(RECIPE), "--data.dataset", str(fixtures.dataset("leave_one_out").root)),
        *("--output", str(output), "--item_llm.pretrained=null", f"--item_llm.shape={json.dumps(ITEM_LLAMA)}"),
        f"--item_llm.tokenizer={fixtures.tokenizer_dir()}",
        f"--user.shape={json.dumps({'width': 24, 'layers': 1, 'heads': 1, 'max_positions': 200})}",
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


def test_a_catalogue_without_texts_needs_no_option_and_no_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mapping = task_shop.write(tmp_path)
    content = yaml.safe_load(mapping.read_text()) | {"bad_rows": {"item_without_text": "keep"}}
    mapping.write_text(yaml.safe_dump(content))
    (tmp_path / "items.csv").write_text("item,title\n" + "".join(f"i{item},\n" for item in range(task_shop.ITEMS)))
    root = prepare(table(mapping), tmp_path / "dataset")
    assert init.main(["--data", str(root), "--task", "retrieval", "--output", str(tmp_path / "own.yaml")]) == 0
    options = [f"--user.shape={json.dumps({'width': 24, 'layers': 1, 'heads': 1, 'max_positions': 200})}"]
    run = ["--config", str(tmp_path / "own.yaml"), "--output", str(tmp_path / "run"), *options, "--max_steps=2"]
    assert train.main([*run, "--objective.collapse_above=1"]) == 0
    recipe = ["--config", str(RECIPE), "--data.dataset", str(root), "--output", str(tmp_path / "again"), *options]
    assert train.main([*recipe, "--max_steps=2", "--objective.collapse_above=1"]) == 0
    assert not (tmp_path / ".cache").exists(), "an encoder was fetched that nothing reads"
