"""The DLRM with tasks, context, weights and thinned-out negatives: the same of each as a model reads."""

import dataclasses
from typing import Any, Literal

import numpy as np
import pytest
import torch

from hllm_torchrec.baselines.settings import BaselinesConfig
from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.data.batch_spec import BatchSpec
from hllm_torchrec.data.collate import Collator
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.request_context import fit_context
from hllm_torchrec.distributed.process_group import init_distributed
from hllm_torchrec.downstream.dlrm import DLRMTrainer, build_dlrm
from hllm_torchrec.downstream.dlrm_config import DLRMConfig
from hllm_torchrec.downstream.dlrm_data import DLRMBatch, DLRMData, Window
from hllm_torchrec.downstream.plugin import PluggedDLRM, append_vectors
from hllm_torchrec.modules.expert_over_arch import ExpertOverArch
from tests.helpers import task_shop

CONFIG = DLRMConfig(
    width=4,
    bottom=(8,),
    top=(8,),
    batch=64,
    context=("device", "price"),
    tasks=task_shop.TASKS,
    negative_rate=0.5,
    item_dropout=0.0,
)


def of_model(dataset: Dataset, split: str, training: bool) -> HybridBatch:
    """All exposures of a split in one batch of a model with the same settings."""
    context, _ = fit_context(dataset, CONFIG.context)
    spec = BatchSpec("late", context=CONFIG.context, tasks=tuple(CONFIG.tasks), negative_rate=0.5, time_depth=0)
    pieces = [p for g in dataset.row_groups(split) for p in dataset.sequences([g]).pieces()]
    return Collator(dataset, spec, CONFIG.seed, training, context=context)(pieces, 0, 0)


def of_dlrm(dataset: Dataset, split: str, training: bool) -> tuple[DLRMBatch, Window, np.ndarray]:
    """The batch of the same exposures, their window and rows."""
    data = DLRMData(dataset, CONFIG)
    (window,) = data.windows(split)
    rows = data._drawn(window, 1) if training else np.arange(window.exposures)
    return data.batch(window, rows, np.random.default_rng(0) if training else None), window, rows


@pytest.mark.parametrize("training", [True, False])
def test_exposures_labels_weights_and_offsets_are_those_of_a_model(training: bool) -> None:
    dataset, split = task_shop.weighted(), "train" if training else "test"
    model, (batch, window, rows) = of_model(dataset, split, training), of_dlrm(dataset, split, training)
    events = window.histories.exposures[rows]
    assert torch.equal(torch.from_numpy(window.histories.item_ids[events]), model.target_items)
    assert 0.4 < len(rows) / window.exposures < 0.8 if training else len(rows) == window.exposures
    for name in ("labels", "task_labels", "task_weights", "logit_offset"):
        ours, theirs = getattr(batch, name), getattr(model, name)
        assert (ours is None) == (theirs is None) == (name == "logit_offset" and not training)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_context_is_that_of_a_model() -> None:
    dataset = task_shop.weighted()
    model, (batch, window, rows) = of_model(dataset, "test", False), of_dlrm(dataset, "test", False)
    devices = batch.sparse_features["context_device"]
    assert devices.lengths().tolist() == [1] * len(rows)
    every = model.features["context_device"].values()
    assert torch.equal(devices.values(), every[model.target_query])
    assert 0 in devices.values().tolist(), "a device that training has not seen is the unknown one"
    raw = window.histories.extra["context_price"][window.histories.exposures]
    train = [dataset.sequences([group]) for group in dataset.row_groups("train")]
    known = np.concatenate([one.extra["context_price"][one.own_events] for one in train])
    expected = np.nan_to_num((raw - np.nanmean(known)) / np.nanstd(known))
    assert batch.dense_features[:, -1].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert np.isnan(raw).any()


def test_a_step_takes_the_weighted_mean_of_each_task() -> None:
    dataset = task_shop.weighted()
    trainer = DLRMTrainer(dataset, CONFIG, init_distributed())
    batch, _, rows = of_dlrm(dataset, "train", True)
    with torch.no_grad():
        outputs = trainer._outputs(batch)
    assert outputs.shape == (len(rows), 6)
    assert batch.logit_offset is not None
    means = {}
    for place, (task, own) in enumerate(zip(trainer.tasks, outputs.split([1, 1, 1, 3], dim=1), strict=True)):
        weights, total = batch.task_weights[:, place], 0.0
        for row in torch.nonzero(weights).flatten().tolist():
            output = own[row : row + 1] + (batch.logit_offset[row] if place == 0 else 0)
            label = batch.task_labels[row : row + 1, place]
            scales = torch.tensor([task.center, task.scale])
            total += float(weights[row] * task.losses(output, label, scales)[0])
        means[task.name] = total / float(weights.sum())
    loss, counted = trainer.train_step(batch).tolist()
    expected = means["click"] + 0.5 * means["like"] + means["watch"] + means["stars"]
    assert counted == len(rows) and loss / counted == pytest.approx(expected, rel=1e-5)


def test_predictions_have_a_column_of_every_task_and_the_weight() -> None:
    dataset = task_shop.weighted()
    trainer = DLRMTrainer(dataset, dataclasses.replace(CONFIG, epochs=1), init_distributed())
    trainer.train_epoch(1)
    columns, model = trainer.score("test"), of_model(dataset, "test", False)
    further = ("like", "watch", "stars")
    kinds = {"like": "probability", "watch": "prediction", "stars": "prediction"}
    assert {f"{kinds[task]}_{task}" for task in further} <= set(columns)
    assert columns["weight"].tolist() == model.weights.tolist()
    stars = columns["label_stars"]
    assert set(stars[~np.isnan(stars)]) == {1.0, 2.0, 3.0} and np.isnan(stars).any()


def test_stored_vectors_join_the_outputs_of_all_tasks() -> None:
    batch, _, rows = of_dlrm(task_shop.weighted(), "test", False)
    data = DLRMData(task_shop.weighted(), CONFIG)
    model = build_dlrm(CONFIG, data.tables(), [0.0, 1.0, 2.0], data.dense_width, [3])
    assert isinstance(model, PluggedDLRM)
    for table in model.dlrm.sparse_arch.to_empty(device="cpu").parameters():
        torch.nn.init.zeros_(table)
    found = append_vectors(batch.dense_features, torch.ones(len(rows), 4))
    assert model(found, batch.sparse_features).shape == (len(rows), 3)


def test_experts_are_mixed_by_a_gate_of_each_task() -> None:
    torch.manual_seed(0)
    built = ExpertOverArch(5, (6, 4), (1, 3), experts=3)
    features = torch.randn(7, 5)
    found = built(features)
    for row, x in enumerate(features):
        gates = (built.gates.weight @ x).view(2, 3).softmax(dim=1)
        expected = []
        for gate, tower in zip(gates, built.towers, strict=True):
            shared = sum(weight * expert(x) for weight, expert in zip(gate, built.experts, strict=True))
            expected.append(tower[2].weight @ torch.relu(tower[0].weight @ shared + tower[0].bias) + tower[2].bias)
        torch.testing.assert_close(found[row], torch.cat(expected))
    built.initialize_bias([1.0, 2.0, 3.0, 4.0])
    assert built.towers[1][2].bias.tolist() == [2.0, 3.0, 4.0]


BIASED = dataclasses.replace(CONFIG, towers="mmoe", experts=2, position_bias=("place",), epochs=1, lr=0.05)


@pytest.mark.parametrize("towers", ["mmoe", "shared_bottom"])
def test_a_position_bias_is_learned_and_left_out_of_predictions(towers: Literal["mmoe", "shared_bottom"]) -> None:
    dataset = task_shop.weighted()
    trainer = DLRMTrainer(dataset, dataclasses.replace(BIASED, towers=towers), init_distributed())
    bias = trainer.position_bias
    assert bias is not None and bias.places == [0, 1], "of click and like, not of numbers"
    (window,) = trainer.data.windows("test")
    batch = trainer.data.batch(window, np.arange(window.exposures))
    ids = batch.bias_ids
    assert ids is not None and 0 in ids.tolist() or len(set(ids[:, 0].tolist())) > 1
    trainer.train_epoch(1)
    table = bias.embedding_bags["bias_place"].weight
    assert table.abs().max() > 0.01 and bias.mean.abs().max() > 1e-4
    scores = trainer.score("test")["score"]
    with torch.no_grad():
        table.add_(10.0)
    assert np.array_equal(trainer.score("test")["score"], scores), "predictions do not read the table"
    with torch.no_grad():
        bias.mean.add_(1.0)
    np.testing.assert_allclose(trainer.score("test")["score"], scores + 1, atol=1e-5)


def test_vectors_tasks_experts_and_bias_go_together() -> None:
    batch, _, rows = of_dlrm(task_shop.weighted(), "test", False)
    data = DLRMData(task_shop.weighted(), BIASED)
    model = build_dlrm(BIASED, data.tables(), [0.0, 1.0, 2.0], data.dense_width, [3], outputs=[1, 2])
    assert isinstance(model, PluggedDLRM) and isinstance(model.dlrm.over_arch, ExpertOverArch)
    for table in model.dlrm.sparse_arch.to_empty(device="cpu").parameters():
        torch.nn.init.zeros_(table)
    found = append_vectors(batch.dense_features, torch.ones(len(rows), 4))
    assert model(found, batch.sparse_features).shape == (len(rows), 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"position_bias": ("price",)},
            r"dlrm\.position_bias: 'price' is numeric; only categorical context has a bias",
        ),
        ({"position_bias": ("plaice",)}, r"dlrm\.position_bias: 'plaice': no context .*did you mean 'place'"),
        ({"tasks": {"click": {}, "lik": {}}}, r"dlrm\.tasks\.lik: no label of the dataset \(did you mean 'like'\?\)"),
        ({"context": ("devise",)}, r"dlrm\.context: 'devise': no context of the dataset \(did you mean 'device'\?\)"),
    ],
)
def test_what_the_dataset_lacks_is_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DLRMData(task_shop.dataset(), DLRMConfig(**settings))


def test_context_of_the_bias_is_no_input() -> None:
    with pytest.raises(ConfigError, match=r"dlrm\.position_bias: 'place' is in dlrm\.context too"):
        BaselinesConfig(dlrm=DLRMConfig(context=("place",), position_bias=("place",)))


def test_malformed_tasks_are_one_line() -> None:
    with pytest.raises(ConfigError, match=r"dlrm\.tasks\.click\.weights: unknown key"):
        BaselinesConfig(dlrm=DLRMConfig(tasks={"click": {"weights": 1}}))
