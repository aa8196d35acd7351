"""The DLRM baseline: what its rows hold, that they see no present or future, and how it trains on ranks."""

import dataclasses
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hllm_torchrec.baselines.settings import BaselinesConfig
from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.distributed.process_group import init_distributed
from hllm_torchrec.downstream import dlrm_data
from hllm_torchrec.downstream.dlrm import DLRMTrainer
from hllm_torchrec.downstream.dlrm_config import DLRMConfig
from hllm_torchrec.downstream.dlrm_data import DLRMBatch, DLRMData, Window
from hllm_torchrec.evaluation.scoring import quick_metrics
from tests.helpers import fixtures
from tests.helpers.distributed import run_ranks

CPU = torch.device("cpu")
SMALL = DLRMConfig(
    width=4, bottom=(8,), top=(8,), max_bag=3, user_features=("country",), batch=64, epochs=3, shard_from_rows=30
)


def read(config: DLRMConfig, split: str = "test", rule: str = "time") -> tuple[DLRMData, Window]:
    """The data and its only window."""
    data = DLRMData(fixtures.dataset(rule), config)
    (window,) = data.windows(split)
    return data, window


def bags(batch: DLRMBatch, key: str) -> list[list[int]]:
    """The bags of a sparse feature."""
    jagged = batch.sparse_features[key]
    return [part.tolist() for part in jagged.values().split(jagged.lengths().tolist())]


def everything(window: Window) -> np.ndarray:
    return np.arange(window.exposures)


@pytest.mark.parametrize("rule", ["time", "leave_one_out"])
def test_bags_are_the_last_items_liked_and_disliked_before(rule: str) -> None:
    data, window = read(SMALL, "train", rule)
    batch = data.batch(window, everything(window))
    groups = data.dataset.row_groups("train")
    rows = [row for g in groups for row in data.dataset.read_row_group(g.path, g.index).to_pylist()]
    liked, disliked = [], []
    for row in rows:
        events = list(zip(row["item_ids"], row["timestamps"], row["labels"], strict=True))
        for position, (_, second, label) in enumerate(events):
            if position < row["target_start"] or label is None:
                continue
            seen = [e for p, e in enumerate(events) if (e[1] < second if rule == "time" else p < position)]
            for found, wanted in ((liked, 1.0), (disliked, 0.0)):
                found.append([i if data.item_is_known[i] else 0 for i, _, y in seen if y == wanted][-3:])
    assert bags(batch, "liked") == liked and bags(batch, "disliked") == disliked
    assert max(map(len, liked)) == 3 and min(map(len, liked)) == 0


def test_nothing_of_the_candidates_second_or_later_is_in_its_row() -> None:
    data, window = read(SMALL, "valid")
    histories = window.histories
    row = int(np.argmax(histories.seen[histories.exposures]))
    event = histories.exposures[row]
    start = histories.offsets[histories.row_of_event[event]]
    hidden = np.arange(start + histories.seen[event], histories.offsets[histories.row_of_event[event] + 1])
    labels, items = histories.labels.copy(), histories.item_ids.copy()
    labels[hidden] = 1 - labels[hidden]
    items[hidden[hidden != event]] = 1
    changed = dataclasses.replace(histories, labels=labels, item_ids=items)
    other = dataclasses.replace(
        window,
        histories=changed,
        liked=data._stretches(changed, changed.labels >= 0.5),
        disliked=data._stretches(changed, changed.labels < 0.5),
        numeric=dlrm_data._numeric(changed, SMALL.numeric_features),
    )
    before, after = (data.batch(w, np.array([row])) for w in (window, other))
    assert torch.equal(before.dense_features, after.dense_features)
    assert before.sparse_features.to_dict().keys() == after.sparse_features.to_dict().keys()
    for key in before.sparse_features.keys():
        assert bags(before, key) == bags(after, key), key
    assert before.labels != after.labels
    assert bags(before, "liked") != [[]] or bags(before, "disliked") != [[]]


def test_time_is_the_utc_hour_and_weekday() -> None:
    data, window = read(SMALL)
    batch = data.batch(window, everything(window))
    times = [datetime.fromtimestamp(t, UTC) for t in window.histories.timestamps[window.histories.exposures].tolist()]
    assert bags(batch, "hour") == [[t.hour] for t in times]
    assert bags(batch, "weekday") == [[t.weekday()] for t in times]


def test_users_and_items_without_training_event_are_read_as_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Dataset.open(fixtures.dataset().root)
    groups, counts = dataset.row_groups, dataset.training_item_counts()
    counts[::3] = 0
    trained = {
        user
        for group in groups("train")[:9]
        for user in dataset.read_row_group(group.path, group.index, ["user_id"])["user_id"].to_pylist()
    }
    # as if the training part had been smaller
    monkeypatch.setattr(dataset, "row_groups", lambda part: groups(part)[: 9 if part == "train" else None])
    monkeypatch.setattr(dataset, "training_item_counts", lambda: counts)
    data = DLRMData(dataset, SMALL)
    (window,) = data.windows("test")
    batch, histories = data.batch(window, everything(window)), window.histories
    users = histories.user_ids[histories.row_of_event[histories.exposures]].tolist()
    items = histories.item_ids[histories.exposures].tolist()
    assert bags(batch, "user") == [[user if user in trained else 0] for user in users]
    assert bags(batch, "item") == [[item if counts[item] else 0] for item in items]
    assert [0] in bags(batch, "user") and [0] in bags(batch, "item")


def test_ids_drop_out_in_training_only() -> None:
    data, window = read(dataclasses.replace(SMALL, item_dropout=0.5, user_dropout=0.9), "train")
    kept = data.batch(window, everything(window))
    dropped = data.batch(window, everything(window), np.random.default_rng(0))
    rates = {}
    for key in ("item", "user"):
        before, after = np.ravel(bags(kept, key)), np.ravel(bags(dropped, key))
        assert (before > 0).all() and np.isin(after[after != before], 0).all()
        rates[key] = float((after == 0).mean())
    assert rates["item"] == pytest.approx(0.5, abs=0.1) and rates["user"] == pytest.approx(0.9, abs=0.06)
    assert bags(kept, "liked") == bags(dropped, "liked")


def test_switches_leave_features_out() -> None:
    bare = dataclasses.replace(SMALL, user_id=False, user_features=(), time=False)
    data, window = read(bare)
    assert list(data.tables()) == ["item", "liked", "disliked"]
    assert data.batch(window, everything(window)).sparse_features.keys() == ["item", "liked", "disliked"]


def test_small_windows_hold_the_same_exposures(monkeypatch: pytest.MonkeyPatch) -> None:
    data, whole = read(SMALL, "train")
    monkeypatch.setattr(dlrm_data, "WINDOW_USERS", 5)
    parts = list(data.windows("train"))
    assert len(parts) > 3
    assert np.array_equal(np.concatenate([p.numeric for p in parts]), whole.numeric)
    shuffled = list(data.windows("train", np.random.default_rng(1)))
    assert sorted(np.concatenate([p.histories.user_ids for p in shuffled])) == sorted(whole.histories.user_ids)


def test_an_epoch_has_every_exposure_once_in_an_order_of_its_own() -> None:
    data, window = read(SMALL, "train")
    first, again, second = (
        np.concatenate([b.dense_features.numpy() for b in data.training_batches(epoch)]) for epoch in (1, 1, 2)
    )
    assert np.array_equal(first, again) and not np.array_equal(first, second)
    for epoch in (first, second):
        assert np.array_equal(np.sort(epoch, axis=0), np.sort(window.numeric, axis=0))


def test_sharded_tables_belong_to_the_in_backward_optimizer_only() -> None:
    trainer = DLRMTrainer(fixtures.dataset(), SMALL, init_distributed())
    fused = list(trainer.model.fused_optimizer.params)
    assert [name for name in fused if "item_table" in name] and len(fused) == 1
    dense = sum(parameter.numel() for group in trainer.dense.param_groups for parameter in group["params"])
    every = sum(parameter.numel() for parameter in trainer.model.parameters())
    assert every - dense == fixtures.dataset().num_items * SMALL.width


@pytest.mark.slow
def test_training_lowers_the_loss_and_keeps_the_best_epoch(tmp_path: Path) -> None:
    trainer = DLRMTrainer(fixtures.dataset(), dataclasses.replace(SMALL, lr=0.03, epochs=8), init_distributed())
    first = trainer.train_epoch(1)
    best = trainer.fit(tmp_path / "checkpoints")
    assert trainer.train_epoch(9) < first - 0.02
    trainer = DLRMTrainer(fixtures.dataset(), dataclasses.replace(SMALL, lr=0.03, epochs=8), init_distributed())
    trainer.train_epoch(1)
    best_again = trainer.fit(tmp_path / "checkpoints")
    assert best_again == best
    assert quick_metrics(trainer.score("valid"))["auc"] == best["auc"]
    assert len(list((tmp_path / "checkpoints").glob("step-*"))) == 1


def test_a_loss_that_is_no_number_stops_with_the_remedy(tmp_path: Path) -> None:
    trainer = DLRMTrainer(fixtures.dataset(), SMALL, init_distributed())
    with torch.no_grad():
        trainer.dense.param_groups[0]["params"][0].fill_(math.nan)
    with pytest.raises(FloatingPointError, match="dlrm: the loss of epoch 1 is nan: lower dlrm.lr or dlrm.table_lr"):
        trainer.fit(tmp_path)


def one_step(root: str, config: DLRMConfig) -> dict[str, Any]:
    """This rank's predictions after a step on its share of all training exposures."""
    trainer = DLRMTrainer(Dataset.open(root), config, CPU)
    (window,) = trainer.data.windows("train")
    trainer.train_step(trainer.data.batch(window, everything(window)))
    return trainer.score("test")


@pytest.mark.slow
def test_a_step_on_two_ranks_is_the_step_of_one_on_both_shares() -> None:
    config = dataclasses.replace(SMALL, lr=0.05, table_lr=0.5, clip_norm=0.5)
    root = str(fixtures.dataset().root)
    (alone,) = run_ranks(one_step, 1, root, config)
    shares = run_ranks(one_step, 2, root, config)
    together = {name: np.concatenate([share[name] for share in shares]) for name in alone}
    order, own = (np.lexsort((c["position"], c["user_id"])) for c in (together, alone))
    assert np.array_equal(together["user_id"][order], alone["user_id"][own])
    assert together["score"][order] == pytest.approx(alone["score"][own], abs=2e-5)
    before = DLRMTrainer(fixtures.dataset(), config, init_distributed()).score("test")["score"]
    assert np.abs(alone["score"] - before).max() > 0.01


def train_with_few_groups(root: str, config: DLRMConfig, folder: str) -> tuple[int, float]:
    """Train where rank 1 has nothing to read; (exposures scored here, validation AUC)."""
    dataset = Dataset.open(root)
    groups = dataset.row_groups
    dataset.row_groups = lambda part: groups(part)[:1]  # type: ignore[method-assign]
    trainer = DLRMTrainer(dataset, config, CPU)
    metrics = trainer.fit(Path(folder) / "checkpoints")
    return trainer.score("test")["score"].size, metrics["log_loss"]


@pytest.mark.slow
def test_a_rank_without_rows_keeps_step(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, epochs=1)
    (n, loss), (none, same_loss) = run_ranks(
        train_with_few_groups, 2, str(fixtures.dataset().root), config, str(tmp_path)
    )
    assert n > 0 and none == 0 and loss == same_loss


def test_features_that_there_are_not_are_named() -> None:
    config = dataclasses.replace(SMALL, user_features=("contry",), numeric_features=("mood",))
    with pytest.raises(ConfigError) as raised:
        DLRMData(fixtures.dataset(), config)
    assert raised.value.problems == [
        "dlrm.user_features: 'contry': unknown (did you mean 'country'?); there are country",
        "dlrm.numeric_features: 'mood': unknown; there are history_length, user_mean, log_gap",
    ]


def test_broken_rules_are_reported_together() -> None:
    with pytest.raises(ConfigError) as raised:
        broken = {"width": 0, "top": (), "bottom": (8, 0), "experts": 1, "user_dropout": 1.0, "numeric_features": ()}
        BaselinesConfig(dlrm=DLRMConfig(**broken))
    assert raised.value.problems == [
        "dlrm.width: 0: must be >= 1",
        "dlrm.experts: 1: must be >= 2",
        "dlrm.user_dropout: 1.0: must be >= 0 and < 1",
        "dlrm.bottom: [8, 0]: every layer must be at least 1 wide",
        "dlrm.top: empty: torchrec's DLRM needs at least one",
        "dlrm.numeric_features: empty: torchrec's DLRM needs at least one",
    ]
