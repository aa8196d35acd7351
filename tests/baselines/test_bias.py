"""The baselines without a model: their formulas by a naive loop, and that nothing of the present is seen."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hllm_torchrec.baselines.bias import run_bias, score_running_bias
from hllm_torchrec.baselines.settings import ItemMeanConfig, RunningBiasConfig
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.histories import Histories, ItemLabels, rank_row_groups, read_histories, training_labels
from hllm_torchrec.data.loader import Loader, LoaderSpec
from hllm_torchrec.metrics.auc import roc_auc
from tests.helpers import fixtures
from tests.helpers.distributed import run_ranks

SPLITS = ("valid", "test")
RULES = ("time", "leave_one_out")


def rows(split: str, rule: str) -> Iterator[dict[str, Any]]:
    """A split's users, as Python values."""
    dataset = fixtures.dataset(rule)
    for group in dataset.row_groups(split):
        yield from dataset.read_row_group(group.path, group.index).to_pylist()


def item_biases(rule: str, shrinkage: float) -> tuple[float, dict[int, float]]:
    """mu and b_i, by a loop."""
    labels: dict[int, list[float]] = {}
    for row in rows("train", rule):
        for item, label in zip(row["item_ids"], row["labels"], strict=True):
            if label is not None:
                labels.setdefault(item, []).append(label)
    every = [label for known in labels.values() for label in known]
    mean = sum(every) / len(every)
    return mean, {i: sum(y - mean for y in known) / (len(known) + shrinkage) for i, known in labels.items()}


def naive_running_bias(split: str, rule: str, config: RunningBiasConfig) -> dict[tuple[int, int], float]:
    """(user, position) -> mu + b_i + b_ut, by a loop."""
    mean, bias = item_biases(rule, config.item_shrinkage)
    scores = {}
    for row in rows(split, rule):
        events = list(zip(row["item_ids"], row["timestamps"], row["labels"], strict=True))
        for position, (item, second, label) in enumerate(events):
            if position < row["target_start"] or label is None:
                continue
            earlier = [
                y - mean - bias.get(i, 0.0)
                for p, (i, s, y) in enumerate(events)
                if y is not None and (s < second if rule == "time" else p < position)
            ]
            user = sum(earlier) / (len(earlier) + config.user_shrinkage)
            scores[row["user_id"], position] = mean + bias.get(item, 0.0) + user
    return scores


def by_exposure(columns: dict[str, np.ndarray], name: str = "score") -> dict[tuple[int, int], float]:
    """(user, position) -> a column's value."""
    keys = zip(columns["user_id"].tolist(), columns["position"].tolist(), strict=True)
    return dict(zip(keys, columns[name].tolist(), strict=True))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("split", SPLITS)
def test_running_bias_is_the_loop_over_earlier_events(split: str, rule: str) -> None:
    config = RunningBiasConfig(item_shrinkage=3.0, user_shrinkage=2.0)
    columns = run_bias(fixtures.dataset(rule), config, (split,))[split]
    expected = naive_running_bias(split, rule, config)
    assert by_exposure(columns) == pytest.approx(expected, abs=1e-6)
    assert len(expected) == columns["score"].size > 10


def test_item_mean_is_shrunk_and_the_overall_mean_for_items_without_training_label() -> None:
    labels = ItemLabels(count=np.array([0.0, 3.0, 0.0, 1.0]), total=np.array([0.0, 3.0, 0.0, 0.0]))
    assert labels.mean == 0.75
    assert labels.mean + labels.bias(1.0) == pytest.approx([0.75, (3 + 0.75) / 4, 0.75, 0.75 / 2])
    assert labels.mean + labels.bias(0.0) == pytest.approx([0.75, 1.0, 0.75, 0.0])


def test_item_mean_scores_every_exposure_by_its_item() -> None:
    mean, bias = item_biases("time", 5.0)
    columns = run_bias(fixtures.dataset(), ItemMeanConfig(), ("test",))["test"]
    assert columns["score"] == pytest.approx([mean + bias.get(i, 0.0) for i in columns["item_id"].tolist()])
    assert np.array_equal(columns["probability"], columns["score"].clip(0, 1))


def test_without_training_labels_the_mean_is_one_half() -> None:
    nothing = ItemLabels(np.zeros(3), np.zeros(3))
    assert nothing.mean == 0.5 and not nothing.bias(0.0).any()


def histories_of(dataset: Dataset, split: str = "test", delay: int = 0) -> Histories:
    return read_histories(dataset, rank_row_groups(dataset, split), delay)


def test_a_feedback_delay_needs_seconds() -> None:
    with pytest.raises(ValueError, match="feedback_delay: 60: the dataset is split by 'leave_one_out', so events are"):
        histories_of(fixtures.dataset("leave_one_out"), delay=60)


@pytest.mark.parametrize(("rule", "delay"), [("time", 0), ("time", 80_000), ("leave_one_out", 0)])
def test_a_label_changes_later_scores_only(rule: str, delay: int) -> None:
    dataset = fixtures.dataset(rule)
    labels, histories = training_labels(dataset), histories_of(dataset, "valid", delay)
    before = score_running_bias(histories, labels, RunningBiasConfig())
    exposures = histories.exposures
    rng, reached = np.random.default_rng(0), 0
    for event in rng.choice(np.flatnonzero(~np.isnan(histories.labels)), 20, replace=False):
        changed = histories.labels.copy()
        changed[event] = 1 - changed[event]
        after = score_running_bias(dataclasses.replace(histories, labels=changed), labels, RunningBiasConfig())
        same_user = histories.row_of_event[exposures] == histories.row_of_event[event]
        sees = same_user & (histories.seen[exposures] > histories.position[event])
        assert np.array_equal(np.abs(after - before) > 1e-9, sees)
        age = histories.timestamps[exposures] - histories.timestamps[event]
        assert rule != "time" or np.array_equal(sees, same_user & (age > delay))
        reached += int(sees.sum())
    assert reached > 0


@pytest.mark.parametrize("rule", RULES)
def test_exposures_are_those_that_a_model_scores(rule: str) -> None:
    dataset, cfg = fixtures.dataset(rule), fixtures.config(rule)
    loader = Loader(dataset, fixtures.collator(cfg, rule), LoaderSpec("test", batch_users=4, max_history=1024))
    theirs: dict[tuple[int, int], tuple[float, ...]] = {}
    for batch in loader.batches(0):
        pieces = np.repeat(np.arange(batch.user_ids.numel()), batch.query_offsets.diff().numpy())
        users = batch.user_ids.numpy()[pieces[batch.target_query.numpy()]]
        values = zip(
            batch.target_items.tolist(),
            batch.query_times[batch.target_query].tolist(),
            batch.labels.tolist(),
            batch.history_lengths.tolist(),
            strict=True,
        )
        theirs |= dict(zip(zip(users.tolist(), batch.positions.tolist(), strict=True), values, strict=True))
    columns = run_bias(dataset, ItemMeanConfig(), ("test",))["test"]
    named = [by_exposure(columns, name) for name in ("item_id", "timestamp", "label", "history_length")]
    assert {key: tuple(column[key] for column in named) for key in named[0]} == theirs
    assert np.array_equal(columns["item_is_cold"], dataset.training_item_counts()[columns["item_id"]] == 0)


def scores_on_this_rank(root: str) -> dict[tuple[int, int], float]:
    return by_exposure(run_bias(Dataset.open(root), RunningBiasConfig(), ("test",))["test"])


@pytest.mark.slow
def test_two_ranks_share_the_exposures_and_score_them_as_one() -> None:
    dataset = fixtures.dataset()
    first, second = run_ranks(scores_on_this_rank, 2, str(dataset.root))
    assert first and second and not first.keys() & second.keys()
    alone = by_exposure(run_bias(dataset, RunningBiasConfig(), ("test",))["test"])
    assert first | second == pytest.approx(alone, abs=1e-6)


def test_a_split_without_files_is_named(tmp_path: Path) -> None:
    manifest = fixtures.dataset().manifest
    files = {name: facts for name, facts in manifest["files"].items() if "/valid/" not in name}
    dataset = Dataset(tmp_path, {**manifest, "files": files})
    with pytest.raises(ValueError, match="split 'valid' is empty: prepare the dataset"):
        rank_row_groups(dataset, "valid")


def test_published_figures_on_movielens(root: Path) -> None:
    folder = root / "data" / "ml-100k"
    if not (folder / "manifest.json").is_file():
        pytest.skip("data/ml-100k is not prepared")
    dataset = Dataset.open(folder)
    if dataset.manifest["split"].get("fractions") != [0.8, 0.1, 0.1]:
        pytest.skip("data/ml-100k has another split")
    for config, published in ((ItemMeanConfig(), 0.7055), (RunningBiasConfig(), 0.7491)):
        columns = run_bias(dataset, config, ("test",))["test"]
        assert roc_auc(columns["label"], columns["score"]) == pytest.approx(published, abs=1e-4)
