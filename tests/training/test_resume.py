"""A run that was interrupted goes on as if it had not been; one that cannot says why."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.evaluation.run_loader import load_run
from hllm_torchrec.evaluation.scoring import quick_metrics, score_split
from tests.helpers.distributed import run_ranks
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


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


RESUMABLE = {
    "stages": MIXED,
    "item_llm__standardise": True,
    "data__stochastic_length": 1.3,
    "objective__head_dropout": 0.2,
    "objective__generative_weight": 0.5,
    "optim__ema": 0.9,
    "evaluation__checkpoint_every": 2,
    "evaluation__keep_last": 100,
    "evaluation__every": 1,
}


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    whole = train(config(tmp_path / "whole", **RESUMABLE))
    stages = [line["stage"] for line in lines(tmp_path / "whole", "step")]
    assert stages == ["live"] * 3 + ["stored"] * 10 + ["live again"] * 2
    for step in (2, 4, 12):  # within a stage of each kind, and in the second epoch of one
        run = interrupted(tmp_path / "whole", tmp_path / f"from-{step}", step)
        resumed = train(config(run, resume=True, **RESUMABLE))
        assert losses(run) == losses(tmp_path / "whole"), f"resumed at step {step}"
        assert resumed.metrics == whole.metrics
        assert_equal_weights(weights(resumed), weights(whole))
        assert [e["auc"] for e in lines(run, "eval")] == [e["auc"] for e in lines(tmp_path / "whole", "eval")]
        assert lines(run, "end")[-1]["weights_moved"] == lines(tmp_path / "whole", "end")[0]["weights_moved"]


@pytest.mark.slow
def test_two_ranks_resume_bit_for_bit(tmp_path: Path) -> None:
    options = {name: {**RESUMABLE, "data__batch_users": 2, "parallel__dense": name} for name in ("ddp", "fsdp")}
    whole = run_ranks(each_on_rank, 2, {name: config(tmp_path / name, **own) for name, own in options.items()})
    runs = {name: interrupted(tmp_path / name, tmp_path / f"resumed-{name}", 12) for name in options}
    resumed = run_ranks(each_on_rank, 2, {n: config(runs[n], resume=True, **own) for n, own in options.items()})
    for name, run in runs.items():
        assert losses(run) == losses(tmp_path / name)
        for found, expected in zip(resumed, whole, strict=True):
            assert_equal_weights(found[name]["weights"], expected[name]["weights"])


@pytest.mark.slow
def test_the_number_of_ranks_may_change_at_every_restart(tmp_path: Path) -> None:
    """2 -> 1 -> 2 -> 4 ranks, each going on from a checkpoint of the one before."""
    options = {"evaluation__checkpoint_every": 2, "evaluation__keep_last": 100, "optim__lr": 0.002}
    options |= {"data__stochastic_length": 1.3, "user__actions": "interleaved"}
    run_ranks(on_rank, 2, config(tmp_path / "whole", data__batch_users=2, **options))
    expected, before = losses(tmp_path / "whole"), tmp_path / "whole"
    kept = [line["history_kept"] for line in lines(before, "step")]
    assert len(expected) == 8 and min(kept) < 1
    for step, world in ((2, 1), (4, 2), (6, 4)):
        run = interrupted(before, tmp_path / f"on-{world}-from-{step}", step)
        run_ranks(on_rank, world, config(run, data__batch_users=4 // world, resume=True, **options))
        assert losses(run) == pytest.approx(expected, abs=1e-4), f"{world} ranks from step {step}"
        assert [line["history_kept"] for line in lines(run, "step")] == kept
        assert lines(run, "start")[-1]["world"] == world and lines(run, "start")[-1]["step"] == step
        before = run


def auc_of(run: Path) -> float:
    """Validation AUC of a run's last checkpoint, on however many ranks this is called."""
    device = init_distributed()
    loaded = load_run(run, "latest", device)
    experiment = loaded.experiment
    with loaded.weights:
        experiment.use_cached_items()
        scored = score_split(experiment, experiment.loader("valid", 4))
    return quick_metrics(scored)["auc"]


@pytest.mark.slow
def test_a_checkpoint_loaded_at_another_world_size_has_the_same_auc(tmp_path: Path) -> None:
    options = {"max_steps": 3, "optim__ema": 0.9}
    (two, _) = run_ranks(on_rank, 2, config(tmp_path / "two", data__batch_users=2, **options))
    for world in (1, 4):
        aucs = run_ranks(auc_of, world, tmp_path / "two")
        assert aucs == pytest.approx([two["metrics"]["auc"]] * world, abs=1e-6)
    one = train(config(tmp_path / "one", **options))
    assert run_ranks(auc_of, 2, tmp_path / "one") == pytest.approx([one.metrics["auc"]] * 2, abs=1e-6)


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    first = train(config(tmp_path / "run"))
    again = train(config(tmp_path / "run", resume=True))
    assert again.step == first.step
    assert_equal_weights(weights(again), weights(first))
    assert len(losses(tmp_path / "run")) == first.schedule.total_steps


@pytest.mark.slow
@pytest.mark.parametrize("resume", [True, False])
def test_a_run_that_died_before_its_first_checkpoint_starts_anew(resume: bool, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError):
        train(config(tmp_path / "run", optim__table_lr=1e30))
    assert losses(tmp_path / "run")
    train(config(tmp_path / "run", resume=resume))
    assert [line["step"] for line in lines(tmp_path / "run", "step")] == list(range(1, 9))


def test_a_run_is_not_mixed_with_another(tmp_path: Path) -> None:
    train(config(tmp_path / "run", max_steps=1))
    with pytest.raises(ConfigError, match=r"holds a run, up to step-00000001: continue it \(resume: true\)"):
        train(config(tmp_path / "run"))


def flip_a_bit(checkpoint: Path) -> None:
    file = checkpoint / "__0_0.distcp"
    contents = bytearray(file.read_bytes())
    contents[len(contents) // 2] ^= 1
    file.write_bytes(contents)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_and_without_a_whole_one_the_run_stops(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"evaluation__checkpoint_every": 2, "max_steps": 4}
    whole = train(config(tmp_path / "run", **options))
    older, newer = sorted((tmp_path / "run" / "checkpoints").iterdir())
    flip_a_bit(newer)
    resumed = train(config(tmp_path / "run", resume=True, **options))
    assert "step-00000004 is damaged: the contents of __0_0.distcp" in caplog.text
    assert lines(tmp_path / "run", "start")[-1]["step"] == 2
    assert_equal_weights(weights(resumed), weights(whole))
    for checkpoint in (older, newer):
        flip_a_bit(checkpoint)
    with pytest.raises(
        ConfigError, match=r"resume: none of the checkpoints .*\(step-00000002, step-00000004\) is complete"
    ):
        train(config(tmp_path / "run", resume=True, **options))
    with pytest.raises(ConfigError, match="holds a run, up to step-00000004"):
        train(config(tmp_path / "run", **options))
    train(config(tmp_path / "run", resume=True, reliability__no_checkpoint_left="begin", **options))
    assert lines(tmp_path / "run", "start")[-1]["step"] == 0


def test_resume_with_other_batches_is_refused(tmp_path: Path) -> None:
    train(config(tmp_path / "run", max_steps=1))
    with pytest.raises(ConfigError, match=r"resume: the epochs .* keep the dataset, the stages and batch_users"):
        train(config(tmp_path / "run", resume=True, data__batch_users=2))


def test_resume_says_which_settings_are_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config(tmp_path / "run", max_steps=1, optim__betas=[0.9, 0.99]))
    capsys.readouterr()
    same = {"resume": True, "optim__betas": [0.9, 0.99], "reliability__max_skipped": 3}
    train(config(tmp_path / "run", max_steps=2, **same))
    assert "settings that changed" not in capsys.readouterr().out
    train(config(tmp_path / "run", max_steps=3, optim__lr=0.5, data__history="positive", **same))
    said = capsys.readouterr().out
    assert "continues with settings that changed since training: data.history: 'all' -> 'positive'; " in said
    assert "optim.lr: 0.01 -> 0.5\n" in said


def test_resume_with_another_architecture_is_refused(tmp_path: Path) -> None:
    train(config(tmp_path / "run", max_steps=1))
    with pytest.raises(ValueError, match="is not of this model"):
        train(config(tmp_path / "run", resume=True, objective__head_hidden=9))
