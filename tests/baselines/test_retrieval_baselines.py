"""The retrieval baselines against their definitions written as loops, and through the models' own metrics."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hllm_torchrec.baselines import retrieval_baselines
from hllm_torchrec.baselines.retrieval_baselines import ItemToItem, fit, measure_baseline, run_retrieval_baseline
from hllm_torchrec.baselines.settings import RetrievalBaselinesConfig
from hllm_torchrec.data.histories import Histories, read_histories
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.evaluation.retrieval_comparison import read_target_ranks
from hllm_torchrec.launch import cli
from tests.helpers import fixtures
from tests.helpers.distributed import run_ranks

CONFIG = RetrievalBaselinesConfig(window=4, markov_shrinkage=2.0, ks=(1, 5, 20))
SETTINGS: dict[str, dict[str, float]] = {
    "popularity": {},
    "ease": {"l2": 3.0},
    "markov": {"decay": 0.5, "gap_decay": 0.25, "damping": 0.5},
}


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


def histories(split: str) -> Histories:
    dataset = fixtures.dataset("leave_one_out")
    return read_histories(dataset, dataset.row_groups(split))


def sequences() -> list[list[int]]:
    """Training items of every user."""
    train = histories("train")
    return [train.item_ids[a:b].tolist() for a, b in zip(train.offsets, train.offsets[1:])]


def naive_scores(name: str, history: list[int]) -> NDArray:
    items, users = fixtures.dataset("leave_one_out").num_items, sequences()
    events = np.bincount(np.concatenate(users), minlength=items).astype(float)
    if name == "popularity":
        return events
    if name == "ease":
        x = np.zeros((len(users), items))
        for user, sequence in enumerate(users):
            x[user, sequence] = 1
        p = np.linalg.inv(x.T @ x + 3.0 * np.eye(items))
        b = np.eye(items) - p / np.diag(p)
        return sum((b[i] for i in history), np.zeros(items))
    scores = events / events.sum() * 1e-3
    for age, item in enumerate(reversed(history[-4:])):
        for sequence in users:
            for at, leader in enumerate(sequence):
                for gap in range(1, 5):
                    if leader == item and at + gap < len(sequence):
                        follower = sequence[at + gap]
                        weight = 0.25 ** (gap - 1) * 0.5**age / (events[item] + 2)
                        scores[follower] += weight / math.sqrt(max(events[follower], 1))
    return scores


@pytest.mark.parametrize("name", SETTINGS)
def test_scores_equal_the_definition_written_as_a_loop(name: str) -> None:
    train, valid = histories("train"), histories("valid")
    model = fit(name, train, fixtures.dataset("leave_one_out").num_items, CONFIG, **SETTINGS[name])
    rows = np.arange(0, valid.exposures.size, 4)
    found = model.scores(valid, rows)
    for row, scores in zip(rows, found, strict=True):
        event = valid.exposures[row]
        start = valid.offsets[valid.row_of_event[event]]
        history = valid.item_ids[start:event].tolist()
        np.testing.assert_allclose(scores, naive_scores(name, history), rtol=1e-4, atol=1e-6)
    assert len(rows) > 3


@pytest.mark.parametrize(("filter_seen", "positive_only"), [(True, False), (False, True)])
def test_metrics_equal_a_sort_of_the_catalogue(filter_seen: bool, positive_only: bool) -> None:
    config = RetrievalBaselinesConfig(ks=(1, 5, 20), filter_seen=filter_seen, positive_only=positive_only)
    test, items = histories("test"), fixtures.dataset("leave_one_out").num_items
    rng = np.random.default_rng(0)
    model = ItemToItem(rng.normal(size=(items, items)).astype(np.float32), np.zeros(items, np.float32))
    places = []
    for row, event in enumerate(test.exposures):
        if positive_only and test.labels[event] == 0:
            continue
        scores = model.scores(test, np.array([row]))[0]
        target, seen = test.item_ids[event], test.item_ids[test.offsets[test.row_of_event[event]] : event]
        rivals = [i for i in range(1, items) if i != target and not (filter_seen and i in seen)]
        places.append(1 + sum(scores[i] >= scores[target] for i in rivals))
    found = measure_baseline(model, test, config)
    assert found["rows"] == len(places) > 5
    for k in (1, 5, 20):
        assert found[f"recall@{k}"] == pytest.approx(np.mean([p <= k for p in places]))
        assert found[f"ndcg@{k}"] == pytest.approx(np.mean([p <= k and 1 / math.log2(p + 1) for p in places]))


def run_markov() -> dict[str, Any]:
    init_distributed()
    config = RetrievalBaselinesConfig(markov_decay=(0.0, 0.5), markov_gap_decay=(0.0,), markov_damping=(0.0,))
    return run_retrieval_baseline("markov", fixtures.dataset("leave_one_out"), config)


def test_settings_are_chosen_on_validation_and_two_ranks_agree_with_one() -> None:
    one = run_markov()
    best = max(one["tried"], key=lambda entry: entry["ndcg@10"])
    assert one["settings"] == {name: best[name] for name in one["settings"]} and len(one["tried"]) == 2
    assert one["valid"]["ndcg@10"] == best["ndcg@10"]
    for other in run_ranks(run_markov, 2):
        assert other["test"] == pytest.approx(one["test"]) and other["settings"] == one["settings"]


def test_the_command_writes_results_that_name_the_protocol(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(fixtures.dataset("leave_one_out").root)
    arguments = ["retrieval", "--dataset", root, "--output", str(tmp_path), "--only", "popularity", "ease"]
    assert cli.main([*arguments, "--ease_l2", "[10, 100]"]) == 0
    metrics = json.loads((tmp_path / "ease" / "metrics.json").read_text())
    ranks = read_target_ranks(tmp_path / "ease" / "retrieval" / "test").rank
    assert (ranks <= 10).mean() == pytest.approx(metrics["retrieval"]["recall@10"])
    assert metrics["split"] == "test" and metrics["retrieval"]["protocol"] == "leave_one_out"
    assert metrics["retrieval"]["candidates"] == fixtures.dataset("leave_one_out").num_items - 1
    assert [entry["l2"] for entry in metrics["provenance"]["tried"]] == [10, 100]
    assert json.loads((tmp_path / "popularity" / "metrics-valid.json").read_text())["split"] == "valid"
    assert "ease {'l2': " in capsys.readouterr().out


def test_what_cannot_be_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["retrieval", "--dataset", str(fixtures.dataset().root), "--output", str(tmp_path)]) == 2
    assert "split by 'time'; prepare one with --split leave_one_out" in capsys.readouterr().err
    monkeypatch.setattr(retrieval_baselines, "MAX_EASE_ITEMS", 5)
    with pytest.raises(ValueError, match="ease: the catalogue has 40 items; EASE inverts an items x items matrix"):
        fit("ease", histories("train"), 41, CONFIG, l2=1.0)
