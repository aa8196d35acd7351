"""Scoring a split: every exposure once on any number of ranks, and numbers that agree with naive ones."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score
from torch.nn.functional import cosine_similarity

from hllm_torchrec.config.schema import Config
from hllm_torchrec.data.predictions import PredictionColumns, write_predictions
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.evaluation.scoring import metrics_of_target_ranks, quick_metrics, rank_catalogue_targets, score_split
from hllm_torchrec.metrics.distributed_ranking import CatalogueShard
from hllm_torchrec.models.assembly import build_experiment
from hllm_torchrec.models.experiment import Experiment
from tests.helpers import fixtures
from tests.helpers.distributed import run_ranks
from tests.helpers.training_fixtures import config

COLUMNS = {
    "user_id": np.int64,
    "position": np.int32,
    "item_id": np.int64,
    "timestamp": np.int64,
    "label": np.float32,
    "score": np.float32,
    "probability": np.float32,
    "history_length": np.int32,
    "item_is_cold": np.bool_,
}


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


def build(settings: Config) -> Experiment:
    return build_experiment(settings, init_distributed())


def score(settings: Config, split: str = "valid") -> PredictionColumns:
    experiment = build(settings)
    loader = experiment.loader(split, settings.evaluation.batch_users)
    return score_split(experiment, loader)


def score_and_measure(settings: Config) -> tuple[PredictionColumns, dict[str, float]]:
    columns = score(settings)
    return columns, quick_metrics(columns)


def rows(columns: PredictionColumns) -> dict[tuple[int, int], tuple[Any, ...]]:
    """(user, position) -> the other columns but the score."""
    names = [name for name in COLUMNS if name not in ("user_id", "position", "score", "probability")]
    keys = zip(columns["user_id"].tolist(), columns["position"].tolist(), strict=True)
    return dict(zip(keys, zip(*(columns[name].tolist() for name in names), strict=True), strict=True))


def expected_rows(split: str) -> dict[tuple[int, int], tuple[Any, ...]]:
    """The same from the sequences themselves."""
    warm = set(np.concatenate([piece.item_ids for piece in fixtures.pieces("train")]).tolist())
    found = {}
    for piece in fixtures.pieces(split):
        for at in range(piece.first_target, piece.item_ids.size):
            if not np.isnan(piece.labels[at]):
                item, time = int(piece.item_ids[at]), int(piece.timestamps[at])
                earlier = int((piece.timestamps < time).sum())
                found[piece.user_id, at] = (item, time, float(piece.labels[at]), earlier, item not in warm)
    return found


@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize("fusion", ["late", "early"])
def test_every_exposure_is_scored_once_with_its_facts(split: str, fusion: str, tmp_path: Path) -> None:
    columns = score(config(tmp_path, objective__fusion=fusion, data__max_history=12), split)
    assert {name: values.dtype for name, values in columns.items()} == COLUMNS
    assert len(columns["score"]) == len(rows(columns))
    assert rows(columns) == expected_rows(split)
    expected = 1 / (1 + np.exp(-columns["score"].astype(np.float64)))
    np.testing.assert_allclose(columns["probability"], expected, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_exposures_and_agree_on_the_metrics(world: int, tmp_path: Path) -> None:
    settings = config(tmp_path, evaluation__batch_users=3)
    whole, metrics = score_and_measure(settings)
    parts = run_ranks(score_and_measure, world, settings)
    together = {name: np.concatenate([columns[name] for columns, _ in parts]) for name in COLUMNS}
    assert len(together["score"]) == len(whole["score"])
    assert rows(together) == rows(whole)
    np.testing.assert_allclose(_by_key(together), _by_key(whole), atol=1e-5)
    for _, found in parts:
        assert found == pytest.approx(metrics, abs=1e-6)


def _by_key(columns: PredictionColumns) -> np.ndarray:
    return columns["score"][np.lexsort((columns["position"], columns["user_id"]))]


def test_scoring_has_no_dropout_and_training_has_it_again(tmp_path: Path) -> None:
    settings = config(tmp_path, objective__head_dropout=0.5, user__dropout=0.5)
    plain = score(replace(settings, objective=replace(settings.objective, head_dropout=0.0)))
    experiment = build(settings)
    loader = experiment.loader("valid", 8)
    found = score_split(experiment, loader)
    np.testing.assert_array_equal(found["score"], plain["score"])
    assert experiment.hllm.training and experiment.hllm.head.training


# --- metrics during training -----------------------------------------------------------------------------


def test_quick_metrics_equal_scikit_learn(tmp_path: Path) -> None:
    columns, metrics = score_and_measure(config(tmp_path))
    labels, probability = columns["label"], 1 / (1 + np.exp(-columns["score"].astype(np.float64)))
    assert metrics["auc"] == pytest.approx(roc_auc_score(labels, columns["score"]))
    assert metrics["log_loss"] == pytest.approx(log_loss(labels, probability))
    users = [columns["user_id"] == user for user in np.unique(columns["user_id"])]
    ranked = [mine for mine in users if 0 < labels[mine].sum() < mine.sum()]
    within = [roc_auc_score(labels[mine], columns["score"][mine]) for mine in ranked]
    assert len(ranked) > 1
    assert metrics["gauc"] == pytest.approx(np.average(within, weights=[mine.sum() for mine in ranked]))
    assert metrics["rows"] == len(labels)


def test_the_approximate_auc_of_training_keeps_its_bound(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random(5000) < 0.3).astype(np.float32)
    columns = {"label": labels, "score": (rng.normal(size=5000) + labels).astype(np.float32)}
    columns["user_id"] = np.arange(5000) % 50
    exact, found = quick_metrics(columns), quick_metrics(columns, "approximate")
    assert 0 < abs(found["auc"] - exact["auc"]) <= found["auc_error"] < 1e-3
    assert found["log_loss"] == exact["log_loss"] and found["rows"] == 5000
    assert found["gauc"] == exact["gauc"] != pytest.approx(exact["auc"], abs=1e-6)


def test_quick_metrics_survive_large_scores_and_ties() -> None:
    labels = np.array([1, 0, 1, 0], np.float32)
    scores = np.array([800, -800, 3, 3], np.float32)
    found = quick_metrics({"user_id": np.zeros(4, np.int64), "label": labels, "score": scores})
    assert found["auc"] == pytest.approx(0.875)
    assert found["log_loss"] == pytest.approx((math.log1p(math.exp(-3)) + math.log1p(math.exp(3))) / 4)


@pytest.mark.parametrize("auc", ["exact", "approximate"])
def test_a_row_of_weight_two_counts_as_two_rows_and_one_of_weight_zero_as_none(
    auc: Literal["exact", "approximate"],
) -> None:
    rng = np.random.default_rng(0)
    label = (rng.random(200) < 0.4).astype(np.float32)
    columns = {
        "user_id": rng.integers(1, 12, 200),
        "label": label,
        "score": (rng.normal(size=200) + label).astype(np.float32),
    }
    weight = rng.integers(0, 3, 200)
    repeated = {name: np.repeat(values, weight) for name, values in columns.items()}
    weighted = quick_metrics(columns | {"weight": weight.astype(np.float32)}, auc)
    expected = quick_metrics(repeated, auc)
    for name in ("auc", "gauc", "log_loss", *(["auc_error"] if auc == "approximate" else [])):
        assert weighted[name] == pytest.approx(expected[name], rel=1e-6), name
    assert weighted["gauc"] != pytest.approx(quick_metrics(columns, auc)["gauc"], rel=1e-3)


def test_quick_metrics_of_one_class_have_no_auc() -> None:
    columns = {"user_id": np.arange(3), "label": np.ones(3, np.float32), "score": np.zeros(3, np.float32)}
    found = quick_metrics(columns)
    assert math.isnan(found["auc"]) and math.isnan(found["gauc"]) and found["log_loss"] == pytest.approx(math.log(2))


# --- predictions -----------------------------------------------------------------------------------------


def test_predictions_are_written_whole_and_read_back(tmp_path: Path) -> None:
    columns = score(config(tmp_path / "run"))
    path = write_predictions(columns, tmp_path / "predictions" / "valid", rank=3)
    assert path.name == "part-00003.parquet"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    table = pq.read_table(path)
    assert table.column_names == list(COLUMNS)
    for name, values in columns.items():
        np.testing.assert_array_equal(table[name].to_numpy(), values)


# --- retrieval -------------------------------------------------------------------------------------------


def retrieval(settings: Config) -> dict[str, Any]:
    experiment = build(settings)
    loader = experiment.loader("valid", settings.evaluation.batch_users)
    items = experiment.encode_catalogue()
    assert items is not None
    shard = CatalogueShard.of_rank(items)
    return metrics_of_target_ranks(
        *rank_catalogue_targets(experiment.model, loader, shard, experiment.device), (1, 5, 20)
    )


def events_before(user: int, position: int) -> set[int]:
    """The items of all events of a user before the second of an event, from the dataset."""
    (piece,) = (piece for piece in fixtures.pieces("valid") if piece.user_id == user)
    return set(piece.item_ids[piece.timestamps < piece.timestamps[position]].tolist())


def naive_retrieval(settings: Config) -> dict[str, float]:
    """Rank every item for each positive exposure, one at a time."""
    experiment = build(settings)
    hllm = experiment.hllm.eval()
    items = experiment.encode_catalogue()
    assert items is not None
    ranks, skipped = [], 0
    for batch in experiment.loader("valid", 1).batches(0):
        with torch.no_grad():
            predicted = hllm(batch, want_next=True).next_items
        for row in torch.nonzero(batch.labels > 0).flatten().tolist():
            visible = int(batch.query_visible[batch.target_query[row]])
            if visible == 0:
                skipped += 1
                continue
            scores = cosine_similarity(predicted[row][None], items)
            target = int(batch.target_items[row])
            seen = events_before(int(batch.user_ids), int(batch.positions[row])) - {target}
            rivals = [i for i in range(1, len(items)) if i != target and i not in seen]
            ranks.append(1 + sum(float(scores[i]) >= float(scores[target]) - 1e-6 for i in rivals))
    found = {"rows": len(ranks), "without_history": skipped}
    for k in (1, 5, 20):
        found[f"recall@{k}"] = np.mean([rank <= k for rank in ranks])
        found[f"ndcg@{k}"] = np.mean([1 / math.log2(rank + 1) if rank <= k else 0.0 for rank in ranks])
    return found | {"mrr": np.mean([1 / rank for rank in ranks])}


@pytest.mark.parametrize("fusion", ["none", "late", "early"])
def test_retrieval_equals_a_naive_loop(fusion: str, tmp_path: Path) -> None:
    settings = config(tmp_path, objective__fusion=fusion, objective__generative_weight=1, seed=2)
    found, expected = retrieval(settings), naive_retrieval(settings)
    assert expected["rows"] > 10
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("read", [{"data__max_history": 8}, {"data__history": "positive"}])
def test_all_seen_items_are_left_out_whatever_the_model_reads(read: dict[str, Any], tmp_path: Path) -> None:
    settings = config(tmp_path, objective__fusion="none", seed=2, **read)
    found, expected = retrieval(settings), naive_retrieval(settings)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_retrieval_is_the_same_on_two_ranks(tmp_path: Path) -> None:
    settings = config(tmp_path, objective__fusion="none")
    one = retrieval(settings)
    for found in run_ranks(retrieval, 2, settings):
        assert found == pytest.approx(one, abs=1e-6)
