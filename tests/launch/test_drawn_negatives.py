"""A ranking head on data in which every event is positive, from training to the scorer."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.data.drawn_negatives import STRIDE
from hllm_torchrec.distributed.process_group import init_distributed
from hllm_torchrec.launch.evaluate import main as evaluate
from hllm_torchrec.models.assembly import build_experiment
from hllm_torchrec.models.hard_candidates import retrieved_candidates
from hllm_torchrec.serving.scorer import Scorer, UserHistory
from hllm_torchrec.store.store import EmbeddingStore
from tests.data.test_drawn_negatives import implicit
from tests.helpers import task_shop, training_fixtures


def settings(**changes: Any) -> dict[str, Any]:
    drawn = {"count": 4, "by": "popularity"}
    own = {"data__dataset": implicit().root, "data__drawn_negatives": drawn, "evaluation__drawn_negatives": 6}
    return task_shop.SETTINGS | own | changes


@pytest.mark.slow
def test_an_implicit_run_is_trained_evaluated_and_served(tmp_path: Path) -> None:
    training_fixtures.train(training_fixtures.config(tmp_path / "run", **settings()))
    checked = training_fixtures.lines(tmp_path / "run", "eval")[-1]
    assert 0 < checked["auc"] < 1 and 0 < checked["gauc"] < 1
    assert evaluate(["--run-dir", str(tmp_path / "run"), "--split", "test", "--draws", "0", "--no-tensorboard"]) == 0
    rows = pq.read_table(tmp_path / "run" / "predictions" / "test").to_pylist()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    positive = [row for row in rows if row["label"] == 1]
    assert len(rows) > 4 * len(positive) and metrics["weighted"]
    assert all((row["position"] >= STRIDE) == (row["label"] == 0) for row in rows)
    weights = {row["weight"] for row in rows if row["label"] == 0}
    assert list(weights) == pytest.approx([(implicit().num_items - 1) / 6])
    with Scorer.of_run(tmp_path / "run") as scorer:
        for row in (positive[0], next(row for row in rows if row["label"] == 0)):
            events = scorer.experiment.dataset.user_events(row["user_id"])
            seen = events[events.timestamps < row["timestamp"]]
            history = UserHistory(row["user_id"], seen.item_ids, seen.timestamps, seen.labels, seen.actions)
            found = scorer.score(history, np.array([row["item_id"]]), row["timestamp"])
            assert found == pytest.approx([row["score"]], abs=1e-5)


def stores(folder: Path) -> dict[str, str]:
    """Stores in which the items in order lie on a quarter of a circle, and every user beside the last one."""
    dataset = implicit()
    for kind, table in (("item", dataset.items), ("user", dataset.users)):
        raw = table[f"raw_{kind}_id"].to_pylist()
        angles = torch.linspace(0, 1.5, len(raw)) if kind == "item" else torch.full((len(raw),), 1.6)
        with EmbeddingStore.create(folder / f"{kind}s", 2, "fp32").writer() as writer:
            writer.upsert(raw, torch.stack([angles.cos(), angles.sin()], dim=1))
            writer.commit()
    return {f"{kind}_store": str(folder / f"{kind}s") for kind in ("item", "user")}


def test_hard_candidates_are_the_nearest_items_of_the_stores(tmp_path: Path) -> None:
    dataset, found = implicit(), stores(tmp_path)
    items = np.arange(1, dataset.num_items)
    near, offsets = retrieved_candidates(dataset, items, found["item_store"], found["user_store"], 3)
    assert np.diff(offsets).tolist() == [0] + [3] * (dataset.num_users - 1)
    assert near[:3].tolist() == items[-3:][::-1].tolist()
    EmbeddingStore.create(tmp_path / "wide", 3, "fp32")
    with pytest.raises(ValueError, match=r"has vectors of width 2, .*wide of 3: give the stores of `hllm embed"):
        retrieved_candidates(dataset, items, found["item_store"], str(tmp_path / "wide"), 3)
    drawn = {"count": 50, "by": "hard", "top": 3, **found}
    config = training_fixtures.config(tmp_path / "run", **settings(data__drawn_negatives=drawn))
    experiment = build_experiment(config, init_distributed())
    batch = next(iter(experiment.loader("train", 20, training=True).batches(0)))
    negatives = batch.target_items[batch.labels == 0].numpy()
    assert np.isin(negatives, items[-3:]).mean() > 0.4
    assert experiment.loader("valid", 20).collator.draws.by == "uniform"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective__fusion": "none"}, "data.drawn_negatives.count: objective.fusion 'none' has no head"),
        ({"objective__tasks": {"label": {}}}, "data.drawn_negatives.count: drawn items have no other labels"),
        ({"data__drawn_negatives": {"by": "hard"}}, "data.drawn_negatives.by: 'hard': hard negatives need both"),
        ({"data__drawn_negatives": {"item_store": "x"}}, "'uniform': hard negatives need both"),
        ({"data__drawn_negatives": {"count": 101}}, "data.drawn_negatives.count: 101: must be >= 0 and <= 100"),
        ({"data__dataset": task_shop.dataset().root}, "count: 4: the dataset has [0-9]+ negative exposures of its own"),
    ],
)
def test_what_has_no_meaning_is_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_experiment(training_fixtures.config(tmp_path, **settings(**changes)), init_distributed())
