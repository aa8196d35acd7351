"""The table's figures against plain loops: normalised entropy, its resampled interval, paired differences."""

from types import ModuleType

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from hllm_torchrec.data.predictions import Predictions
from tests.helpers.scripts import bench_module


@pytest.fixture
def script() -> ModuleType:
    return bench_module("three_stages")


def predictions(seed: int, skill: float) -> Predictions:
    """300 exposures of 20 users, whose labels are the same for every seed."""
    rng = np.random.default_rng(0)
    users, labels = np.sort(rng.integers(0, 20, 300)), (rng.random(300) < 0.6).astype(float)
    score = skill * (labels - 0.5) + np.random.default_rng(seed).normal(size=300)
    no = np.zeros(300, np.int64)
    return Predictions(users, np.arange(300), no, labels, score, 1 / (1 + np.exp(-score)), no, no.astype(bool))


def entropy(labels: np.ndarray, probabilities: np.ndarray) -> float:
    rate = labels.mean()
    return log_loss(labels, probabilities) / log_loss(labels, np.full(labels.size, rate))


def test_normalised_entropy_is_that_of_the_rows_and_of_resampled_users(script: ModuleType) -> None:
    one = predictions(1, 1.0)
    found = script.entropy_draws(one, draws=50, seed=3)
    assert found[0] == pytest.approx(entropy(one.label, one.probability))
    names, random = np.unique(one.user_id), np.random.default_rng(3)
    for draw in range(1, 4):
        drawn = names[random.integers(names.size, size=names.size)]
        rows = np.concatenate([np.flatnonzero(one.user_id == user) for user in drawn])
        assert found[draw] == pytest.approx(entropy(one.label[rows], one.probability[rows]))


def test_differences_are_means_over_seeds_and_significant_where_a_row_is_better(script: ModuleType) -> None:
    scored = {
        (row, s): predictions(10 * s + n, skill)
        for n, (row, skill) in enumerate([("alone", 0.5), ("both", 2)])
        for s in (0, 1)
    }
    found = script.summarise(scored, ["alone", "both"], [0, 1], draws=200)
    aucs = {key: roc_auc_score(p.label, p.score) for key, p in scored.items()}
    mean = {row: np.mean([aucs[row, s] for s in (0, 1)]) for row in ("alone", "both")}
    both = found["both"]
    assert both["auc"] == pytest.approx(mean["both"]) and both["auc_deviation"] > 0
    assert both["difference"] == pytest.approx(mean["both"] - mean["alone"])
    assert both["difference_interval"][0] > 0 and both["delong_p"] < 1e-3
    assert both["ne_difference_interval"][1] < 0
    assert found["alone"]["difference_interval"] == (0, 0) and found["alone"]["delong_p"] == 1
    text = script.markdown(found, "alone")
    assert text.count("\n") == 3 and "| both | " in text and f"{both['difference']:+.4f} [+" in text
