"""SIGTERM and Ctrl-C: the step is finished, the state saved, and the run that continues equals an uninterrupted one."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from hllm_torchrec.common.errors import Preempted
from hllm_torchrec.config.schema import Config
from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.data.loader import Loader
from hllm_torchrec.distributed.preemption import PreemptionHandler, raise_if_preempted
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.launch.entry import INTERRUPTED, PREEMPTED
from hllm_torchrec.launch.train import main
from hllm_torchrec.training.trainer_setup import build_trainer
from tests.helpers.distributed import forks, run_ranks
from tests.helpers.processes import environment, free_port, until_step
from tests.helpers.training_fixtures import arguments, assert_equal_weights, config, lines, losses, train, weights


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


# --- one process -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_is_noted_and_the_handler_given_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with PreemptionHandler() as request:
        assert not request.requested
        raise_if_preempted()
        signal.raise_signal(number)
        assert request.requested
        with pytest.raises(Preempted, match=f"asked to leave .{number.name}.") as asked:
            raise_if_preempted()
        assert asked.value.interrupted == (number == signal.SIGINT)
    assert signal.getsignal(number) is before
    raise_if_preempted()  # nobody listens: nothing


def test_a_job_in_the_background_goes_on_ignoring_ctrl_c() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with PreemptionHandler() as request:
            signal.raise_signal(signal.SIGINT)
            assert not request.requested
    finally:
        signal.signal(signal.SIGINT, before)


def ask_twice_then_again(said: Path, number: signal.Signals) -> None:
    with PreemptionHandler():
        signal.raise_signal(number)
        signal.raise_signal(number)
        said.write_text("noted")
        time.sleep(1.1)
        signal.raise_signal(number)
        said.write_text("still here")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, INTERRUPTED)])
def test_a_second_request_ends_the_process_but_the_first_may_come_twice(
    number: signal.Signals, status: int, tmp_path: Path
) -> None:
    process = forks().Process(target=ask_twice_then_again, args=(tmp_path / "said", number))
    process.start()
    process.join()
    assert (process.exitcode, (tmp_path / "said").read_text()) == (status, "noted")


class AskedWhileRead(Loader):
    """A loader in the midst of which SIGTERM comes, before batch number `at`."""

    at = 0

    def batches(self, epoch: int, first_step: int = 0) -> Generator[HybridBatch, None, None]:
        for number, batch in enumerate(super().batches(epoch, first_step)):
            if number == self.at:
                signal.raise_signal(signal.SIGTERM)
            yield batch


OPTIONS = {"stages": [{"name": "a", "epochs": 0.5}, {"name": "b", "epochs": 0.75, "item_embeddings": "cached"}]}
OPTIONS |= {"optim__ema": 0.9, "objective__head_dropout": 0.2, "evaluation__every": 0.5}


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["in a step", "in a step after which an evaluation is due", "in an evaluation"])
def test_an_interrupted_run_goes_on_as_if_it_had_been_left_alone(moment: str, tmp_path: Path) -> None:
    whole = train(config(tmp_path / "whole", **OPTIONS))
    trainer = build_trainer(config(tmp_path / "run", **OPTIONS), init_distributed())
    loader = trainer.validation if moment == "in an evaluation" else trainer._loader(trainer.schedule.segments[0].stage)
    loader.__class__ = AskedWhileRead
    loader.prefetch = 0  # or batches are made ahead, on a thread
    loader.at = {"in a step": 1, "in an evaluation": 1}.get(moment, trainer.schedule.segments[0].steps - 1)
    left_at = {"in a step": 2}.get(moment, trainer.schedule.segments[0].steps)
    with pytest.raises(Preempted, match=rf"after step {left_at}, which is saved: continue with resume: true"):
        trainer.run()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{left_at:08d}"]
    assert lines(tmp_path / "run", "preempted")[0]["step"] == left_at and not lines(tmp_path / "run", "eval")

    resumed = train(config(tmp_path / "run", resume=True, **OPTIONS))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert_equal_weights(weights(resumed), weights(whole))
    evaluations = [(line["step"], line["auc"]) for line in lines(tmp_path / "run", "eval")]
    assert evaluations == [(line["step"], line["auc"]) for line in lines(tmp_path / "whole", "eval")]


# --- several ranks ---------------------------------------------------------------------------------------


def ask_rank_one(settings: Config, part: str) -> tuple[str, int]:
    """Train until rank 1 is asked, while it reads the training or the validation part."""
    trainer = build_trainer(settings, init_distributed())
    if trainer.rank == 1:
        loader = trainer.validation if part == "valid" else trainer._loader(trainer.schedule.segments[0].stage)
        loader.__class__, loader.prefetch, loader.at = AskedWhileRead, 0, 1
    with pytest.raises(Preempted) as left:
        trainer.run()
    return str(left.value), trainer.step


PARTS = ("train", "valid")


def ask_rank_one_twice(settings: dict[str, Config]) -> list[tuple[str, int]]:
    return [ask_rank_one(of_part, part) for part, of_part in settings.items()]


@pytest.mark.slow
def test_ranks_leave_together_when_one_of_them_is_asked(tmp_path: Path) -> None:
    options = {"data__batch_users": 2, "evaluation__batch_users": 4, "max_steps": 3}
    outcomes = run_ranks(ask_rank_one_twice, 2, {part: config(tmp_path / part, **options) for part in PARTS})
    assert outcomes[0] == outcomes[1]
    assert [step for _, step in outcomes[0]] == [2, 3]
    assert all(f"after step {step}, which is saved" in line for line, step in outcomes[0])


LONG = {"stages": [{"name": "long", "epochs": 1000}], "data__batch_users": 2, "evaluation__every": 1000}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, PREEMPTED), (signal.SIGINT, INTERRUPTED)])
def test_the_command_says_so_in_one_line_and_has_a_status_of_its_own(
    number: signal.Signals, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask() -> None:
        while not (tmp_path / "run" / "log.jsonl").exists() or len(lines(tmp_path / "run", "step")) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    assert main(arguments(tmp_path / "run", **LONG)) == status
    last = lines(tmp_path / "run", "step")[-1]["step"]
    said = f"train: asked to leave ({number.name}) after step {last}, which is saved: continue with resume: true"
    assert said in capsys.readouterr().err.splitlines()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{last:08d}"]


@pytest.mark.long  # ranks that leave together, and the command that is asked, are tested above
def test_torchrun_hands_the_request_on_and_gives_the_time_to_save(root: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    launcher = [str(Path(sys.executable).parent / "torchrun"), "--nproc_per_node", "2"]
    launcher += ["--master_port", str(free_port()), "--max_restarts", "3"]
    command = [*launcher, "-m", "hllm_torchrec.launch.train", *arguments(output, parallel__timeout=60, **LONG)]
    job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment(root))
    try:
        until_step(2, output, job)
        job.send_signal(signal.SIGTERM)
        _, errors = job.communicate(timeout=60)
    finally:
        job.kill()
        job.wait()
    last = lines(output, "step")[-1]["step"]
    assert [path.name for path in (output / "checkpoints").iterdir()] == [f"step-{last:08d}"], errors
    assert len(lines(output, "start")) == 1  # no restart
    assert f"asked to leave (SIGTERM) after step {last}" in errors
    assert job.returncode not in (0, PREEMPTED) and os.WIFEXITED(job.returncode << 8)
