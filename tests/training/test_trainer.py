"""Training: the same numbers on any number of ranks and after any interruption, and a log that tells."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.metrics import roc_auc_score

from hllm_torchrec.checkpoint.layout import checkpoints_by_step
from hllm_torchrec.checkpoint.selection import best_checkpoint
from hllm_torchrec.common.run_log import read_log
from hllm_torchrec.config.loading import config_from_file
from hllm_torchrec.config.schema import Config
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.training.trainer import Trainer
from hllm_torchrec.training.trainer_setup import build_trainer
from tests.helpers import fixtures
from tests.helpers.distributed import RankFailed, run_ranks
from tests.helpers.training_fixtures import (
    MIXED,
    assert_equal_weights,
    config,
    each_on_rank,
    interrupted,
    lines,
    losses,
    on_rank,
    train,
    weights,
)

TRAINED = [{"name": "live", "epochs": 1}]
CACHED = [{"name": "stored", "epochs": 1, "item_embeddings": "cached"}]


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


# --- the same numbers ------------------------------------------------------------------------------------


def test_the_same_configuration_gives_the_same_losses_and_weights(tmp_path: Path) -> None:
    options = {"objective__head_dropout": 0.2, "objective__generative_weight": 0.5, "data__id_dropout": 0.2}
    first, second = (train(config(tmp_path / name, **options)) for name in "ab")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert first.metrics == second.metrics
    assert_equal_weights(weights(first), weights(second))


GOLDEN = {
    "late": [3.39895, 1.37293, 1.86857, 1.8273],
    "early": [3.79778, 2.10038, 1.68146, 1.62933],
    "none": [2.56224, 1.82721, 2.09803, 1.72672],
}


@pytest.mark.quick
@pytest.mark.parametrize("fusion", list(GOLDEN))
def test_losses_are_those_of_the_last_release(fusion: str, tmp_path: Path) -> None:
    """A change here is a change of numbers: say so in the changelog, then write the new ones down."""
    settings = config(tmp_path / "run", objective__fusion=fusion, objective__generative_weight=0.5, max_steps=4)
    train(settings)
    assert losses(tmp_path / "run") == pytest.approx(GOLDEN[fusion], abs=2e-3)


def test_another_seed_gives_other_losses(tmp_path: Path) -> None:
    for seed in (0, 1):
        train(config(tmp_path / str(seed), seed=seed, max_steps=2))
    assert losses(tmp_path / "0") != losses(tmp_path / "1")


LAMBDA = {"objective__generative_weight": 0.5}
WORLDS = {
    "late-trained": {"objective__fusion": "late", "stages": TRAINED},
    "late-cached-lambda": {"objective__fusion": "late", "stages": CACHED, **LAMBDA},
    "early-trained-lambda": {"objective__fusion": "early", "stages": TRAINED, **LAMBDA, "item_llm__standardise": True},
    "early-cached": {"objective__fusion": "early", "stages": CACHED},
    "none-trained": {"objective__fusion": "none", "stages": TRAINED},
    "none-cached": {"objective__fusion": "none", "stages": CACHED},
    "late-ids-only": {"objective__fusion": "late", "item_llm__enabled": False},
}
GENTLE = {"optim__lr": 0.002, "optim__item_llm_lr": 0.002}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, dict[str, Any]]]]:
    """A folder with the runs of `WORLDS` on two ranks, and what each rank ended with, by name."""
    folder = tmp_path_factory.mktemp("two")
    settings = {name: config(folder / name, data__batch_users=2, **GENTLE, **own) for name, own in WORLDS.items()}
    return folder, run_ranks(each_on_rank, 2, settings, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("name", WORLDS)
def test_one_rank_equals_two_ranks(
    name: str, two_ranks: tuple[Path, list[dict[str, dict[str, Any]]]], tmp_path: Path
) -> None:
    train(config(tmp_path / "one", data__batch_users=4, **GENTLE, **WORLDS[name]))
    folder, ranks = two_ranks
    assert losses(folder / name) == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    (one,), (two,) = (lines(output, "eval") for output in (tmp_path / "one", folder / name))
    metric = "ndcg@10" if WORLDS[name]["objective__fusion"] == "none" else "auc"
    assert two[metric] == pytest.approx(one[metric], abs=1e-4)
    assert ranks[0][name]["metrics"] == ranks[1][name]["metrics"]


def test_two_micro_batches_equal_one_batch_twice_as_large(tmp_path: Path) -> None:
    replicated = {
        "features__shard_from_rows": 10_000,
        "max_steps": 4,
    }  # sharded tables step at every micro-batch
    whole = train(config(tmp_path / "whole", data__batch_users=4, **replicated))
    halves = train(config(tmp_path / "halves", data__batch_users=2, optim__accumulate=2, **replicated))
    assert losses(tmp_path / "halves") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)
    assert halves.metrics["auc"] == pytest.approx(whole.metrics["auc"], abs=1e-4)


@pytest.mark.slow
def test_accumulation_over_ranks_equals_one_rank(tmp_path: Path) -> None:
    options = {"features__shard_from_rows": 10_000, "max_steps": 4, "stages": MIXED}
    train(config(tmp_path / "one", data__batch_users=4, **options))
    run_ranks(on_rank, 2, config(tmp_path / "two", data__batch_users=1, optim__accumulate=2, **options))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)


def with_a_rank_without_users(fusion: str, dense: str) -> dict[str, Any]:
    return {
        "objective__fusion": fusion,
        "parallel__dense": dense,
        "stages": [
            {"name": "live", "epochs": 1},
            {"name": "stored", "epochs": 0.5, "item_embeddings": "cached"},
        ],
        "data__max_history": 24,  # 35 pieces: the second step has 2 for 3 ranks
        "evaluation__batch_users": 2,
    }


FUSIONS_AND_DENSE = [(fusion, dense) for fusion in ("early", "late", "none") for dense in ("ddp", "fsdp")]


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of `with_a_rank_without_users` on three ranks."""
    folder = tmp_path_factory.mktemp("three")
    settings = {
        f"{fusion}-{dense}": config(
            folder / f"{fusion}-{dense}", data__batch_users=11, **with_a_rank_without_users(fusion, dense)
        )
        for fusion, dense in FUSIONS_AND_DENSE
    }
    run_ranks(each_on_rank, 3, settings, timeout=300)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("fusion", "dense"), FUSIONS_AND_DENSE)
def test_a_rank_without_users_takes_part(fusion: str, dense: str, three_ranks: Path, tmp_path: Path) -> None:
    one = train(config(tmp_path / "one", data__batch_users=33, **with_a_rank_without_users(fusion, dense)))
    assert [loader.steps(0) for loader in one.loaders.values()][0] == 2
    assert len(next(iter(one.loaders.values())).pieces) == 35
    assert losses(three_ranks / f"{fusion}-{dense}") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dense", ["ddp", "fsdp"])
def test_ranks_without_items_to_encode_take_part(dense: str, tmp_path: Path) -> None:
    """Three ranks share two items."""
    settings = config(tmp_path / "run", parallel__dense=dense)
    expected = two_steps_of_two_items(settings)
    for found in run_ranks(two_steps_of_two_items, 3, settings):
        assert found == pytest.approx(expected, abs=1e-5)


def two_steps_of_two_items(settings: Config) -> list[float]:
    """The losses of two steps in which rank 0 has the first two events of one user, and the others nobody."""
    trainer = build_trainer(settings, init_distributed())
    user = next(piece for piece in fixtures.pieces() if len(set(piece.item_ids[:2])) == 2)
    pieces = [replace(user, **user[:2].columns)] if trainer.rank == 0 else []
    batch = trainer.validation.collator(pieces, 0, 0, trainer.rank)
    assert batch.unique_items.numel() == 2 * len(pieces)
    return [trainer.train_step([batch])["loss"] for _ in range(2)]


def another_trainer_on_rank_zero(settings: Config) -> float:
    """The sum of 1 and 2 over two ranks, after one of them has made a trainer of the parts that both have."""
    trainer = build_trainer(settings, init_distributed())
    drawn = torch.get_rng_state()
    if dist.get_rank() == 0:
        Trainer(trainer.experiment, trainer.checkpoints, trainer.checkpoint)
    assert torch.equal(torch.get_rng_state(), drawn)
    numbers = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(numbers)
    return float(numbers)


@pytest.mark.slow
def test_making_a_trainer_takes_no_other_rank(tmp_path: Path) -> None:
    assert run_ranks(another_trainer_on_rank_zero, 2, config(tmp_path / "run")) == [3.0, 3.0]


# --- stages and parts ------------------------------------------------------------------------------------


@pytest.mark.quick
def test_a_cached_stage_leaves_the_item_llm_exactly_as_it_is(tmp_path: Path) -> None:
    trainer = build_trainer(config(tmp_path / "run", stages=CACHED), init_distributed())
    before = {name: p.detach().clone() for name, p in trainer.hllm.named_parameters()}
    moved = trainer.run()["weights_moved"]
    assert moved["item_llm"] == moved["item_embeddings"] == 0.0 and moved["user"] > 0
    assert lines(tmp_path / "run", "end")[0]["live_steps"] == 0
    for name, parameter in trainer.hllm.named_parameters():
        if name.startswith("item_llm."):
            assert torch.equal(parameter, before[name]), name


@pytest.mark.slow
def test_adam_does_not_move_the_item_llm_in_a_cached_stage_after_a_trained_one(tmp_path: Path) -> None:
    """Adam's running means are not 0 then, and its decay would shrink what has a gradient of 0."""
    whole = {"evaluation__checkpoint_every": 1, "evaluation__keep_last": 100, "evaluation__every": 100}
    stages = [{"name": "live", "epochs": 0.3}, *CACHED]
    end = train(config(tmp_path / "run", stages=stages, **whole))
    (live_steps,) = [line["step"] for line in lines(tmp_path / "run", "stage") if line["name"] == "stored"]
    run = interrupted(tmp_path / "run", tmp_path / "cut", live_steps)
    start = build_trainer(config(run, stages=stages, resume=True, **whole), init_distributed())
    start._resume()
    item_llm = {name: value for name, value in weights(end).items() if name.startswith("item_llm.")}
    assert end.step > start.step == live_steps
    assert_equal_weights(item_llm, {n: v for n, v in weights(start).items() if n.startswith("item_llm.")})


def test_items_are_measured_once_before_the_first_step(tmp_path: Path) -> None:
    options = {"item_llm__standardise": True, "optim__item_llm_lr": 0.1}
    trainer = train(config(tmp_path / "one", max_steps=1, **options))
    start = build_trainer(config(tmp_path / "start", **options), init_distributed()).experiment.encode_catalogue()
    assert start is not None
    torch.testing.assert_close(trainer.hllm.standardise.mean, start[1:].mean(0))
    (measured,) = lines(tmp_path / "one", "measured")
    assert measured["common"] == pytest.approx(start[1:].mean(0).norm().item(), rel=1e-4)
    assert measured["length"] == pytest.approx(start[1:].norm(dim=1).mean().item(), rel=1e-4)
    torch.testing.assert_close(trainer.hllm.standardise.scale, start[1:].std(0) * 4)
    later = train(config(tmp_path / "later", max_steps=1, start_from=tmp_path / "one", **options))
    assert torch.equal(later.hllm.standardise.mean, trainer.hllm.standardise.mean)
    moved = later.experiment.encode_catalogue()
    assert moved is not None and not torch.allclose(moved[1:].mean(0), start[1:].mean(0), atol=1e-3)


@pytest.mark.parametrize(
    ("options", "still", "moving"),
    [
        ({"item_llm__trainable": False}, "item_llm", "user"),
        ({"user__trainable": False}, "user", "item_llm"),
    ],
)
def test_a_frozen_part_stays_exactly_as_it_is(options: dict[str, Any], still: str, moving: str, tmp_path: Path) -> None:
    trainer = build_trainer(config(tmp_path / "run", max_steps=3, **options), init_distributed())
    before = {name: p.detach().clone() for name, p in trainer.hllm.named_parameters()}
    moved = trainer.run()["weights_moved"]
    assert moved[still] == 0.0 and moved[moving] > 0
    for name, parameter in trainer.hllm.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith(f"{still}."), name


def test_frozen_words_stay_while_the_layers_learn(tmp_path: Path) -> None:
    trainer = build_trainer(config(tmp_path / "run", max_steps=2, item_llm__freeze_words=True), init_distributed())
    words = trainer.hllm.item_llm.backbone.get_input_embeddings().weight
    before = words.detach().clone()
    assert trainer.run()["weights_moved"]["item_llm"] > 0
    assert torch.equal(words, before)


def test_every_trainable_weight_moves(tmp_path: Path) -> None:
    options = {"objective__generative_weight": 0.5, "max_steps": 6}
    trainer = build_trainer(config(tmp_path / "run", **options), init_distributed())
    before = weights(trainer)
    trainer.run()
    after = weights(trainer)
    assert not [name for name in before if torch.equal(before[name], after[name])]


def test_cached_stages_of_a_model_of_ids_are_ordinary_ones(tmp_path: Path) -> None:
    stages = [{"name": "stored", "epochs": 2, "item_embeddings": "cached"}]
    trainer = train(config(tmp_path / "run", item_llm__enabled=False, stages=stages))
    assert trainer.step == 16 and len(lines(tmp_path / "run", "stage")) == 1


@pytest.mark.parametrize("fusion", ["late", "none"])
def test_leave_one_out_data_trains_and_retrieves(fusion: str, tmp_path: Path) -> None:
    options = {"data__dataset": fixtures.dataset("leave_one_out").root, "data__history": "positive"}
    options |= {"objective__fusion": fusion, "objective__generative_weight": 1, "evaluation__retrieval": True}
    train(config(tmp_path / "run", max_steps=3, **options))
    (line,) = lines(tmp_path / "run", "eval")
    assert 0 <= line["recall@10"] <= 1 and line["retrieval_rows"] > 0
    assert ("auc" in line) == (fusion == "late")


def test_stages_of_the_same_name_may_differ(tmp_path: Path) -> None:
    stages = [
        {"name": "a", "epochs": 0.2, "max_history": 8, "batch_users": 2},
        {"name": "a", "epochs": 0.2, "max_history": 500, "batch_users": 4},
    ]
    trainer = train(config(tmp_path / "run", stages=stages))
    assert [len(loader.pieces) for loader in trainer.loaders.values()][1] == 24
    assert len(trainer.loaders) == 2


# --- objective -------------------------------------------------------------------------------------------


def test_lambda_adds_the_generative_loss(tmp_path: Path) -> None:
    train(config(tmp_path / "run", objective__generative_weight=0.5))
    for line in lines(tmp_path / "run", "step"):
        assert line["loss"] == pytest.approx(line["loss_cls"] + 0.5 * line["loss_gen"])
        assert line["loss_gen"] > 0
        assert 0 < line["effective_negatives"] <= 8
        assert 0 <= line["gen_accuracy"] <= 1
        assert 0.01 <= line["temperature"] < 0.1
        assert -1 <= line["item_similarity"] <= 1


def test_without_lambda_there_is_no_generative_loss(tmp_path: Path) -> None:
    train(config(tmp_path / "run", max_steps=1))
    (line,) = lines(tmp_path / "run", "step")
    assert line["loss"] == line["loss_cls"]
    assert not {"loss_gen", "temperature", "effective_negatives"} & line.keys()


def test_generative_only_reports_retrieval(tmp_path: Path) -> None:
    train(config(tmp_path / "run", objective__fusion="none", evaluation__ks=[5, 10]))
    (line,) = lines(tmp_path / "run", "eval")
    assert "auc" not in line and 0 <= line["ndcg@5"] <= line["recall@10"] <= 1
    assert all(line["loss"] == line["loss_gen"] for line in lines(tmp_path / "run", "step"))


@pytest.mark.slow
def test_training_learns_its_training_data(tmp_path: Path) -> None:
    train(config(tmp_path / "run", stages=[{"name": "live", "epochs": 12}], evaluation__every=12, optim__lr=0.01))
    found = losses(tmp_path / "run")
    assert sum(found[-4:]) / 4 < 0.75 * sum(found[:4]) / 4


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_every_rank(tmp_path: Path) -> None:
    settings = config(tmp_path / "run", optim__table_lr=1e30)
    with pytest.raises(FloatingPointError, match=r"step \d: the loss is nan: lower optim.lr or optim.table_lr"):
        train(settings)
    two = replace(settings, output=str(tmp_path / "two"))
    with pytest.raises(RankFailed, match="FloatingPointError: step"):
        run_ranks(on_rank, 2, two)


@pytest.mark.slow
def test_collapsed_items_stop_every_rank(tmp_path: Path) -> None:
    settings = config(tmp_path / "run", objective__collapse_above=1e-9, objective__generative_weight=1)
    with pytest.raises(FloatingPointError, match="item embeddings have collapsed: .* lower optim.item_llm_lr"):
        train(settings)
    assert all(run_ranks(collapses, 2, replace(settings, output=str(tmp_path / "two"))))


def collapses(settings: Config) -> bool:
    with pytest.raises(FloatingPointError, match="collapsed"):
        train(settings)
    return True


# --- schedule, evaluation, averages ----------------------------------------------------------------------


def test_max_steps_ends_the_run_with_an_evaluation_and_a_checkpoint(tmp_path: Path) -> None:
    trainer = train(config(tmp_path / "run", max_steps=3))
    assert trainer.step == 3 and len(losses(tmp_path / "run")) == 3
    assert [line["step"] for line in lines(tmp_path / "run", "eval")] == [3]
    assert [path.name for path in checkpoints_by_step(tmp_path / "run" / "checkpoints")] == ["step-00000003"]


def test_checkpoints_come_every_so_many_steps_and_at_evaluations(tmp_path: Path) -> None:
    options = {"evaluation__checkpoint_every": 3, "evaluation__keep_last": 100}
    trainer = train(config(tmp_path / "run", **options))
    last = trainer.schedule.total_steps
    saved = [line["step"] for line in lines(tmp_path / "run", "checkpoint")]
    assert saved == sorted({*range(3, last, 3), last})
    assert [int(path.name[5:]) for path in checkpoints_by_step(tmp_path / "run" / "checkpoints")] == saved


@pytest.mark.slow
def test_fractions_of_epochs_are_evaluated(tmp_path: Path) -> None:
    trainer = train(config(tmp_path / "run", stages=[{"name": "x", "epochs": 1.5}], evaluation__every=0.5))
    evaluated = [line["step"] for line in lines(tmp_path / "run", "eval")]
    epoch = trainer.schedule.segments[0].steps
    assert evaluated == [math.ceil(epoch / 2), epoch, trainer.schedule.total_steps]


def test_before_the_first_step_the_model_is_the_regression_on_evidence_and_may_be_the_best(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "objective__fusion": "late",
        "data__evidence": ["factors", "items", "users", "crosses"],
        "evaluation__at_start": True,
        "evaluation__select_by": "auc_and_gauc",
        "max_steps": 1,
        "optim__lr": 0.0,
        "optim__item_llm_lr": 0.0,
        "optim__table_lr": 0.0,
    }
    trainer = train(config(tmp_path / "run", **options))
    first, last = lines(tmp_path / "run", "eval")
    assert (first["step"], last["step"]) == (0, 1)
    assert trainer.experiment.evidence is not None
    fitted, scores, labels = trainer.experiment.evidence.model, [], []
    for batch in trainer.validation.batches(0):
        assert batch.evidence is not None
        scores.append(batch.evidence.numpy() @ fitted.weights + fitted.intercept)
        labels.append(batch.labels.numpy())
    assert first["auc"] == pytest.approx(roc_auc_score(np.concatenate(labels), np.concatenate(scores)), abs=1e-6)
    assert trainer.early_stopping.best == pytest.approx((first["auc"] + first["gauc"]) / 2)
    best = best_checkpoint(tmp_path / "run" / "checkpoints")
    assert best is not None and best.name == "step-00000000"
    train(config(tmp_path / "run", resume=True, **options))
    assert len(lines(tmp_path / "run", "eval")) == 2


@pytest.mark.slow
def test_patience_stops_a_run_that_gets_no_better(tmp_path: Path) -> None:
    still = {"optim__lr": 0.0, "optim__item_llm_lr": 0.0, "optim__table_lr": 0.0}
    stages = [{"name": "a", "epochs": 1}, {"name": "b", "epochs": 5}]
    trainer = train(config(tmp_path / "run", stages=stages, evaluation__patience=2, **still))
    assert len(lines(tmp_path / "run", "eval")) == 3  # the first is the best, two are no better
    assert trainer.step == 3 * trainer.schedule.segments[0].steps
    again = train(config(tmp_path / "run", stages=stages, evaluation__patience=2, resume=True, **still))
    assert again.step == trainer.step


def test_the_average_is_evaluated_and_the_weights_come_back(tmp_path: Path) -> None:
    plain = train(config(tmp_path / "plain", max_steps=6))
    averaged = train(config(tmp_path / "ema", max_steps=6, optim__ema=0.99))
    assert losses(tmp_path / "ema") == losses(tmp_path / "plain")
    assert_equal_weights(weights(averaged), weights(plain))
    assert averaged.metrics["log_loss"] != plain.metrics["log_loss"]
    assert averaged.evaluate() == averaged.metrics
    averaged.ema = None
    assert averaged.evaluate()["log_loss"] == pytest.approx(plain.metrics["log_loss"], abs=1e-6)


@pytest.mark.slow
def test_evaluation_does_not_disturb_training(tmp_path: Path) -> None:
    options = {"objective__head_dropout": 0.3, "stages": MIXED}
    train(config(tmp_path / "rarely", **options))
    train(config(tmp_path / "often", evaluation__every=0.3, **options))
    assert losses(tmp_path / "often") == losses(tmp_path / "rarely")


def test_learning_rates_warm_up_and_fall(tmp_path: Path) -> None:
    train(
        config(
            tmp_path / "run",
            optim__warmup=0.5,
            optim__min_lr_ratio=0.1,
            optim__lr=0.01,
            optim__item_llm_lr=1e-3,
        )
    )
    rates = [line["lr"] for line in lines(tmp_path / "run", "step")]
    top = rates.index(max(rates))
    assert 0 < top < len(rates) - 1
    assert rates == sorted(rates[: top + 1]) + sorted(rates[top + 1 :], reverse=True)


# --- log and files ---------------------------------------------------------------------------------------


def test_the_log_has_every_event_and_its_numbers(tmp_path: Path) -> None:
    trainer = train(config(tmp_path / "run", stages=[*TRAINED, *CACHED]))
    events = [line["event"] for line in read_log(tmp_path / "run")]
    assert events[:2] == ["start", "stage"] and events[-3:] == ["eval", "checkpoint", "end"]
    assert events.count("step") == trainer.schedule.total_steps and events.count("stage") == 2
    (start,), (end,) = lines(tmp_path / "run", "start"), lines(tmp_path / "run", "end")
    assert start["world"] == 1 and start["total_steps"] == trainer.schedule.total_steps and start["matmul_peak"] > 1e8
    assert end["weights_moved"]["item_llm"] > 0 and end["weights_moved"]["item_embeddings"] > 0
    assert end["live_steps"] == trainer.schedule.segments[0].steps and end["host"] > 0
    for line in lines(tmp_path / "run", "step"):
        assert line["seconds"] > 0 and line["samples_per_second"] > 0 and line["user_tokens_per_second"] > 0
        assert (line["item_tokens_per_second"] > 0) == (line["stage"] == "live")
        assert 0 < line["mfu"] < 1 and line["grad_norm"] > 0
    assert {"auc", "log_loss", "rows"} <= lines(tmp_path / "run", "eval")[0].keys()
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_the_resolved_configuration_is_kept_beside_the_run(tmp_path: Path) -> None:
    settings = config(tmp_path / "run", max_steps=1)
    train(settings)
    assert config_from_file(tmp_path / "run" / "config.yaml") == settings


@pytest.mark.slow
def test_the_last_and_the_best_checkpoints_are_kept(tmp_path: Path) -> None:
    stages = [{"name": "x", "epochs": 2}]
    train(config(tmp_path / "run", stages=stages, evaluation__every=0.25, evaluation__keep_last=2))
    evaluations = lines(tmp_path / "run", "eval")
    best = max(evaluations, key=lambda line: line["auc"])["step"]
    kept = [int(path.name[5:]) for path in checkpoints_by_step(tmp_path / "run" / "checkpoints")]
    last = [line["step"] for line in evaluations][-2:]
    assert kept == sorted({best, *last})


def test_no_loader_thread_is_left_behind(tmp_path: Path) -> None:
    import threading

    with pytest.raises(FloatingPointError):
        train(config(tmp_path / "run", optim__table_lr=1e30))
    assert not [thread for thread in threading.enumerate() if thread.name == "hllm-loader"]
    assert dist.is_initialized()
