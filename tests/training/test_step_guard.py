"""A batch that makes the loss or the gradients NaN, a validation AUC too good to be true: the run stops, or says so."""

import json
import math
import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hllm_torchrec.checkpoint.layout import checkpoints_by_step
from hllm_torchrec.checkpoint.load import best_checkpoint
from hllm_torchrec.config.schema import Config
from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.data.loader import Loader
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.sources.table_mapping import table
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.training.step_guard import StepGuard
from hllm_torchrec.training.trainer import Trainer
from hllm_torchrec.training.trainer_setup import build_trainer
from tests.helpers import fixtures
from tests.helpers.distributed import run_ranks
from tests.helpers.training_fixtures import config, lines, losses, weights

BAD = {2, 3}
"""Steps, from 0, whose batches are bad."""


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


class Dirty(Loader):
    """A loader whose numeric features are NaN in some batches."""

    def batches(self, epoch: int, first_step: int = 0) -> Generator[HybridBatch, None, None]:
        for number, batch in enumerate(super().batches(epoch, first_step)):
            if number in BAD:
                assert batch.numeric is not None
                batch.numeric.fill_(float("nan"))
            yield batch


def dirty(settings: Config, rank: int = 0) -> Trainer:
    """A trainer whose training data is dirty on one rank."""
    trainer = build_trainer(settings, init_distributed())
    if trainer.rank == rank:
        loader = trainer._loader(trainer.schedule.segments[0].stage)
        loader.__class__, loader.prefetch = Dirty, 0
    return trainer


EVERY = {"evaluation__checkpoint_every": 1, "evaluation__keep_last": 100, "optim__ema": 0.9}


@pytest.mark.slow
def test_skipped_steps_change_nothing_and_their_batches_are_kept(tmp_path: Path) -> None:
    trainer = dirty(config(tmp_path / "run", reliability__not_finite="skip", **EVERY))
    trainer.run()
    assert [line["step"] for line in lines(tmp_path / "run", "skipped")] == [3, 4]
    assert "the loss is nan" in lines(tmp_path / "run", "skipped")[0]["reason"]
    assert [line["step"] for line in lines(tmp_path / "run", "step")] == [1, 2, 5, 6, 7, 8]
    assert all(tensor.isfinite().all() for tensor in weights(trainer).values())
    of_step = [(path / "__0_0.distcp").read_bytes() for path in checkpoints_by_step(tmp_path / "run" / "checkpoints")]
    assert of_step[1] == of_step[2] == of_step[3] and of_step[0] != of_step[1] and of_step[3] != of_step[4]
    kept = json.loads((tmp_path / "run" / "bad_batches" / "step-00000003-rank0.json").read_text())
    assert kept["step"] == 3 and "the loss is nan" in kept["reason"]
    loader = trainer._loader(trainer.schedule.segments[0].stage)
    users = list(Loader.batches(loader, 0, 2))[0].user_ids.tolist()
    assert [batch["user_ids"] for batch in kept["batches"]] == [users]


def test_without_leave_to_skip_the_run_stops_and_names_the_batch(tmp_path: Path) -> None:
    trainer = dirty(config(tmp_path / "run", **EVERY))
    with pytest.raises(FloatingPointError, match=r"step 3: the loss is nan: .* ids are in .*step-00000003-rank0.json"):
        trainer.run()
    assert [path.name[-1] for path in checkpoints_by_step(tmp_path / "run" / "checkpoints")] == ["1", "2"]


def test_too_many_skipped_steps_in_a_row_stop_the_run(tmp_path: Path) -> None:
    trainer = dirty(config(tmp_path / "run", reliability__not_finite="skip", reliability__max_skipped=1))
    with pytest.raises(FloatingPointError, match=r"step 4: .* 2 consecutive steps failed, more than .*max_skipped 1"):
        trainer.run()


def test_gradients_that_overflow_do_not_reach_the_dense_weights(tmp_path: Path) -> None:
    settings = config(tmp_path / "run", reliability__not_finite="skip", features__shard_from_rows=10_000, max_steps=2)
    trainer = build_trainer(settings, init_distributed())
    parameter = next(p for name, p in trainer.hllm.named_parameters() if name.startswith("head."))
    before = weights(trainer)
    handle = parameter.register_hook(lambda gradient: gradient * torch.inf)
    batches = list(trainer._micro_batches(trainer.schedule.segments[0]))
    assert trainer.train_step(batches[0]) == {}
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())
    assert "the norm of the gradients is" in trainer.guard.reason
    handle.remove()
    assert trainer.train_step(batches[1])["loss"] > 0
    assert any(not torch.equal(value, before[name]) for name, value in weights(trainer).items())


def test_an_auc_above_the_limit_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    guard = StepGuard(config(tmp_path), rank=0)
    guard.check_leakage(1, 0.99)
    guard.check_leakage(2, None)
    guard.check_leakage(2, math.nan)
    assert not caplog.records
    guard.check_leakage(3, 0.9901)
    assert "step 3: validation AUC 0.9901 is above reliability.leakage_above 0.99: look for a feature" in caplog.text
    StepGuard(config(tmp_path), rank=1).check_leakage(4, 1.0)
    assert len(caplog.records) == 1


def test_a_run_may_stop_at_an_auc_above_the_limit_with_its_checkpoint_saved(tmp_path: Path) -> None:
    options = {"reliability__leakage": "stop", "reliability__leakage_above": 0.5001, "max_steps": 1}
    with pytest.raises(ValueError, match=r"step 1: validation AUC 0\.\d+ is above .*leakage_above 0\.5001: look for"):
        build_trainer(config(tmp_path / "run", **options), init_distributed()).run()
    assert [path.name for path in checkpoints_by_step(tmp_path / "run" / "checkpoints")] == ["step-00000001"]
    assert lines(tmp_path / "run", "eval")[0]["auc"] > 0.5001


ONE_CLASS = {"auc": math.nan, "log_loss": 0.25, "rows": 7.0}
NO_TARGETS = {"ndcg@5": None, "retrieval_rows": 0}


@pytest.mark.parametrize(
    ("metrics", "score", "message"),
    [
        ({"auc": 0.75, "log_loss": 0.5, "rows": 7.0}, 0.75, None),
        ({"ndcg@5": 0.25}, 0.25, None),
        (
            ONE_CLASS,
            -0.25,
            "step 3: the validation part has labels of one class: its AUC is undefined, and checkpoints",
        ),
        (ONE_CLASS | {"log_loss": 0.0, "rows": 0.0}, None, "the validation part has nothing to score: .*latest"),
        (
            NO_TARGETS,
            None,
            "the validation part has nothing to score: no checkpoint is the best; use --checkpoint latest",
        ),
    ],
)
def test_checkpoints_are_compared_by_what_is_defined(
    metrics: dict[str, Any], score: float | None, message: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    guard = StepGuard(config(tmp_path, evaluation__ks=[5, 10]), rank=0)
    assert [guard.selection_score(step, metrics) for step in (3, 4)] == [score, score]
    assert len(caplog.records) == (message is not None) and re.search(message or "", caplog.text)
    assert StepGuard(config(tmp_path, evaluation__ks=[5, 10]), rank=1).selection_score(3, metrics) == score
    assert len(caplog.records) == (message is not None)


@pytest.mark.parametrize(
    ("select_by", "gauc", "score"),
    [("auc", 0.5, 0.75), ("gauc", 0.5, 0.5), ("auc_and_gauc", 0.5, 0.625), ("gauc", math.nan, 0.75)],
)
def test_checkpoints_are_compared_by_the_metric_that_is_wanted(
    select_by: str, gauc: float, score: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    guard = StepGuard(config(tmp_path, evaluation__select_by=select_by), rank=0)
    assert guard.selection_score(1, {"auc": 0.75, "gauc": gauc, "log_loss": 0.5, "rows": 7.0}) == score
    assert ("has no user with both labels" in caplog.text) == math.isnan(gauc)


def test_a_run_without_both_classes_in_validation_trains_and_has_a_best_checkpoint(tmp_path: Path) -> None:
    source = fixtures.write_shop(tmp_path / "shop")
    mapping = yaml.safe_load(source.read_text())
    for name in ("label", "positive_from"):  # implicit feedback: every event is positive
        del mapping["events"][name]
    source.write_text(yaml.safe_dump(mapping))
    dataset = prepare(table(source), tmp_path / "data", split="time")
    options = {"reliability__leakage": "stop", "data__dataset": dataset, "item_llm__enabled": False, "max_steps": 2}
    trainer = build_trainer(config(tmp_path / "run", **options), init_distributed())
    trainer.run()
    assert math.isnan(trainer.metrics["auc"]) and trainer.early_stopping.best == -trainer.metrics["log_loss"]
    assert best_checkpoint(tmp_path / "run" / "checkpoints") is not None


def run_dirty_on_rank_one(settings: Config) -> list[int]:
    trainer = dirty(settings, rank=1)
    trainer.run()
    return [number for number, value in enumerate(weights(trainer).values()) if not value.isfinite().all()]


@pytest.mark.slow
@pytest.mark.parametrize("dense", ["ddp", "fsdp"])
def test_all_ranks_skip_what_is_bad_on_one(dense: str, tmp_path: Path) -> None:
    options = {"data__batch_users": 2, "parallel__dense": dense, "optim__accumulate": 2, "max_steps": 4}
    settings = config(tmp_path / "run", reliability__not_finite="skip", **options)
    assert run_ranks(run_dirty_on_rank_one, 2, settings) == [[], []]
    assert [line["step"] for line in lines(tmp_path / "run", "skipped")] == [2]  # micro-batches 2 and 3
    assert len(losses(tmp_path / "run")) == 3
    assert len(list((tmp_path / "run" / "bad_batches").iterdir())) == 2
