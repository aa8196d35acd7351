"""First days: both models are configurations, and the summary is of all days by kind."""

from pathlib import Path

import yaml

from hllm_torchrec.config.loading import load_config
from tests.helpers.scripts import bench_module

first_day = bench_module("first_day")


def test_both_models_are_configurations_that_differ_in_the_text(tmp_path: Path) -> None:
    found = {}
    for model in first_day.MODELS:
        (tmp_path / f"{model}.yaml").write_text(yaml.safe_dump(first_day.settings(model, tmp_path)))
        found[model] = load_config(["--config", str(tmp_path / f"{model}.yaml"), "--data.dataset", "x"])
    text, ids = found["text"], found["ids"]
    assert text.item_llm.enabled and not ids.item_llm.enabled and not text.item_llm.trainable
    assert text.stages[0].item_embeddings == "cached" and text.data == ids.data and text.features == ids.features
    assert not ids.data.item_features and ids.features.item_id, "an item is its ID"


def test_the_summary_is_of_all_days_by_kind() -> None:
    days = [
        {"kind": ["first", "first", "others"], "label": [1, 0, 1], "score": [0.9, 0.1, 0.2], "ranks": [["first", 3.0]]},
        {
            "kind": ["first", "others", "second"],
            "label": [0, 0, 1],
            "score": [0.95, 0.1, 0],
            "ranks": [["first", 21.0]],
        },
        {"kind": ["second", "second", "first"], "label": [0, 1, 1], "score": [1, 2, 0.5], "ranks": [["second", 20.0]]},
    ]
    found = first_day.summary(days)
    assert (found["first"]["exposures"], found["first"]["auc"], found["first"]["recall@20"]) == (4, 0.5, 0.5)
    assert (found["second"]["auc"], found["second"]["recall@20"], found["second"]["clicks"]) == (0.5, 1.0, 1)
    assert found["others"]["auc"] == 1.0 and "clicks" not in found["others"]
