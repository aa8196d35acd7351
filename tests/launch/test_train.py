"""The training job as users start it: one line for a mistake, a whole run otherwise, and never a hang."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hllm_torchrec.config.loading import config_from_file
from hllm_torchrec.distributed.process_group import destroy_distributed
from hllm_torchrec.launch.train import main
from tests.helpers.processes import end, environment, free_port, start_ranks, until_step
from tests.helpers.training_fixtures import arguments, config, lines, losses

MODULE = "hllm_torchrec.launch.train"


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


def run(command: list[str], root: Path, tmp_path: Path, **variables: object) -> subprocess.CompletedProcess[str]:
    env = environment(root, **variables)
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300)


# --- mistakes --------------------------------------------------------------------------------------------


def test_mistakes_in_the_configuration_are_reported_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data.histry", "all", "--seed", "one"]) == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [
        "train: error: 2 problems in the configuration:",
        "  - --data.histry: unknown option (did you mean 'data.history'?)",
        "  - --seed: 'one': must be an integer",
    ]
    assert printed.out == ""


def test_a_single_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", "no/such.yaml"]) == 2
    assert capsys.readouterr().err == "train: error: --config: no/such.yaml: no such file\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data__dataset": "nowhere"}, "nowhere is not a prepared dataset: no manifest.json. Make one with `hllm"),
        ({"item_llm__tokenizer": "nowhere"}, "nowhere has no tokenizer"),
        ({"data__item_features": ["genre"]}, "data.item_features: 'genre': not in the dataset; it has ['genres']"),
        ({"features__sharding": "row_wise"}, "choose table_wise or column_wise"),
        ({"optim__table_lr": 1e30}, "the loss is nan: lower optim.lr or optim.table_lr"),
        ({"user__shape": None, "user__pretrained": "nowhere"}, "user.pretrained: nowhere: not a Hugging Face"),
    ],
)
def test_what_is_wrong_is_one_line_and_leaves_no_checkpoint(
    options: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path / "run", **options)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("train: error: ") and message in line
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_help_and_the_printed_configuration_end_well(capsys: pytest.CaptureFixture[str]) -> None:
    for option, text in (("--help", "--optim.lr"), ("--print_config", "fusion: late")):
        with pytest.raises(SystemExit) as exited:
            main([option])
        assert exited.value.code == 0
        assert text in capsys.readouterr().out


# --- runs ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_from_the_shell_leaves_all_of_it_behind_and_resumes(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    result = run([sys.executable, "-m", MODULE, *arguments(output)], root, tmp_path)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in output.iterdir()} == {
        ".lock",
        "config.yaml",
        "log.jsonl",
        "checkpoints",
        "tensorboard",
    }
    assert config_from_file(output / "config.yaml") == config(output)
    assert len(losses(output)) == 8 and "auc" in lines(output, "eval")[0]
    assert "trained 8 steps, 8 of them (100%) end to end through the Item LLM; moved: item_llm " in result.stdout
    others = [line for line in result.stderr.splitlines() if line and not line.startswith("train:")]
    assert others == [], "what the user cannot use"

    capsys.readouterr()
    assert main(arguments(output)) == 2  # a second run is not mixed with the first
    assert "holds a run, up to step-00000008: continue it (resume: true)" in capsys.readouterr().err
    assert main([*arguments(output), "--resume", "true"]) == 0
    assert len(losses(output)) == 8


GENTLE = {"optim__lr": 0.002, "optim__item_llm_lr": 0.002}


@pytest.mark.long  # test_torchx.py starts its ranks with a small program
def test_ranks_of_torchx_train_as_one(root: Path, tmp_path: Path) -> None:
    """Those of torchrun do, too: test_torchrun_ends_when_a_rank_is_killed."""
    assert main(arguments(tmp_path / "one", **GENTLE)) == 0
    programs = Path(sys.executable).parent
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"  # TorchX starts `torchrun` from there
    command = [str(programs / "torchx"), "run", "dist.ddp", "-j", "1x2", "train.py"]
    two = run([*command, *arguments(tmp_path / "two", data__batch_users=2, **GENTLE)], root, root, PATH=path)
    assert two.returncode == 0, two.stdout + two.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    assert lines(tmp_path / "two", "start")[0]["world"] == 2


# --- what goes wrong between ranks -----------------------------------------------------------------------


def test_a_port_in_use_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        listener.listen()
        port = listener.getsockname()[1]
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 2}
        for name, value in address.items():
            monkeypatch.setenv(name, str(value))
        assert main(arguments(tmp_path / "run", parallel__timeout=10)) == 2
    errors = capfd.readouterr().err
    assert f"train: error: rank 0 of 2 could not join the others at localhost:{port}: the port is in use" in errors
    assert "--rdzv_port (torchx) or --master_port (torchrun)" in errors
    assert "Traceback" not in errors


LONG = {"stages": [{"name": "long", "epochs": 1000}], "data__batch_users": 2, "evaluation__every": 1000}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("blow", "reason"), [(signal.SIGKILL, "reset|closed|broken"), (signal.SIGSTOP, "timed out|timeout")]
)
def test_a_rank_that_dies_or_hangs_ends_the_others_with_one_line(
    blow: signal.Signals, reason: str, root: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    given = arguments(output, parallel__timeout=10, **LONG)
    processes = start_ranks(MODULE, [given, given], root, tmp_path)
    try:
        until_step(2, output, processes[0])
        processes[1].send_signal(blow)
        _, errors = processes[0].communicate(timeout=60)
    finally:
        end(processes)
    assert processes[0].returncode == 1
    assert re.search(r"train: rank 0 stops after step \d+ because of another rank, see its messages: ", errors), errors
    assert any(word in errors.lower() for word in reason.split("|")), errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_a_mistake_on_one_rank_ends_the_others(root: Path, tmp_path: Path) -> None:
    right = arguments(tmp_path / "run", parallel__timeout=20)
    wrong = arguments(tmp_path / "run", parallel__timeout=20, data__dataset="nowhere")
    processes = start_ranks(MODULE, [right, wrong], root, tmp_path)
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        end(processes)
    assert [process.returncode for process in processes] == [1, 2]
    assert "train: rank 0 stops because of another rank" in errors[0]
    assert "train: error: nowhere is not a prepared dataset" in errors[1]


@pytest.mark.slow
def test_torchrun_ends_when_a_rank_is_killed(root: Path, tmp_path: Path) -> None:
    torchrun = str(Path(sys.executable).parent / "torchrun")
    output, options = tmp_path / "run", LONG | GENTLE
    launcher = [torchrun, "--nproc_per_node", "2", "--master_port", str(free_port())]
    command = [*launcher, "-m", MODULE, *arguments(output, parallel__timeout=30, **options)]
    job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment(root))
    try:
        until_step(2, output, job)
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        assert len(children) >= 2
        os.kill(int(children[1]), signal.SIGKILL)
        _, errors = job.communicate(timeout=90)
    finally:
        job.terminate()
        job.wait(timeout=60)
    assert job.returncode == 1
    assert "Signal 9 (SIGKILL)" in errors
    one = start_ranks(MODULE, [arguments(tmp_path / "one", **options | {"data__batch_users": 4})], root, tmp_path)
    try:
        until_step(2, tmp_path / "one", one[0])
    finally:
        end(one)
    assert losses(output)[:2] == pytest.approx(losses(tmp_path / "one")[:2], abs=1e-4)
