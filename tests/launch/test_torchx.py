"""`torchx run` from the root, as the README writes it, starts the ranks with the right arguments.

The program behind `train.py` is a small one here: what is under test is .torchxconfig, train.py and TorchX.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from torchx.components import dist
from torchx.workspace.api import walk_workspace

ARGUMENTS = ["--config", "configs/quickstart.yaml"]
COMPONENT = "dist.torchrun" if hasattr(dist, "torchrun") else "dist.ddp"
"""The name in the nightly (scripts/reliability/test_torchx_nightly.sh runs these tests with it), and in 0.7.0."""

STAND_IN = """
import json, os, pathlib
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "MALLOC_MMAP_MAX_")

def main(argv):
    rank = {"argv": argv, **{name: os.environ.get(name) for name in NAMES}}
    pathlib.Path(f"started-{rank['RANK']}.json").write_text(json.dumps(rank))
    return 3 if "--fail" in argv else 0
"""


@pytest.fixture
def checkout(root: Path, tmp_path: Path) -> Path:
    """A root with the real .torchxconfig and train.py, and a stand-in for the training job."""
    for name in (".torchxconfig", "train.py"):
        shutil.copy(root / name, tmp_path)
    launch = tmp_path / "hllm_torchrec" / "launch"
    launch.mkdir(parents=True)
    (tmp_path / "hllm_torchrec" / "__init__.py").touch()
    (launch / "__init__.py").touch()
    (launch / "train.py").write_text(STAND_IN)
    return tmp_path


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of this Python's environment in `cwd`."""
    bin_folder = Path(sys.executable).parent  # TorchX starts `torchrun` from the path
    env = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "MALLOC_MMAP_MAX_": "0"}
    env.pop("PYTHONPATH", None)
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def started(checkout: Path) -> list[dict]:
    """What each rank saw, in rank order."""
    return [json.loads(file.read_text()) for file in sorted(checkout.glob("started-*.json"))]


def free_port() -> str:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return str(listener.getsockname()[1])


@pytest.mark.slow
def test_two_agents_of_two_ranks_find_one_another(checkout: Path) -> None:
    port = free_port()  # the default, 29500, may be taken by another test run on this machine
    command = ["torchx", "run", COMPONENT, "-j", "2x2", "--rdzv_port", port, "train.py", *ARGUMENTS]
    result = run(command, checkout)
    assert result.returncode == 0, result.stdout + result.stderr
    ranks = started(checkout)
    assert [rank["RANK"] for rank in ranks] == ["0", "1", "2", "3"]
    assert [rank["LOCAL_RANK"] for rank in ranks] == ["0", "1", "0", "1"]
    assert sorted(rank["GROUP_RANK"] for rank in ranks) == ["0", "0", "1", "1"]
    assert all(rank["MALLOC_MMAP_MAX_"] == "0" for rank in ranks)  # the caller's environment arrives
    assert all(rank["WORLD_SIZE"] == "4" and rank["argv"] == ARGUMENTS for rank in ranks)


@pytest.mark.slow
def test_a_failing_rank_fails_the_command(checkout: Path) -> None:
    result = run(["torchx", "run", COMPONENT, "-j", "1x2", "train.py", "--fail"], checkout)
    assert result.returncode != 0
    assert "exitcode  : 3" in result.stdout + result.stderr


@pytest.mark.slow
def test_torchrun_takes_the_same_script(checkout: Path) -> None:
    result = run(["torchrun", "--nproc_per_node", "2", "train.py", *ARGUMENTS], checkout)
    assert result.returncode == 0, result.stderr
    assert [rank["argv"] for rank in started(checkout)] == [ARGUMENTS] * 2


@pytest.mark.parametrize("own_name", [[], ["train.py"], ["./train.py"]])
def test_script_drops_its_own_name_and_nothing_else(own_name: list[str], checkout: Path) -> None:
    result = run([sys.executable, "train.py", *own_name, *ARGUMENTS, "train.py"], checkout)
    assert result.returncode == 0, result.stderr
    (rank,) = started(checkout)
    assert rank["argv"] == [*ARGUMENTS, "train.py"]
    assert rank["RANK"] is None  # no launcher


@pytest.mark.slow
def test_slurm_job_is_the_same_command(checkout: Path) -> None:
    command = ["torchx", "run", "-s", "slurm", "-cfg", "partition=gpu", "--dryrun", COMPONENT, "-j", "4x8"]
    result = run([*command, "train.py", *ARGUMENTS], checkout)
    assert result.returncode == 0, result.stderr
    assert re.search(r"--nnodes\W+4\W.*--nproc_per_node\W+8\W", result.stdout, re.DOTALL)
    assert re.search(r"train\.py train\.py --config configs/quickstart\.yaml", result.stdout)


@pytest.mark.parametrize("ignore_file", [".torchxignore", ".dockerignore"])
def test_workspace_copy_takes_the_program_and_leaves_data_and_builds(
    ignore_file: str, root: Path, tmp_path: Path
) -> None:
    shutil.copy(root / ignore_file, tmp_path)
    kept = ("train.py", "hllm_torchrec/data/loader.py", "configs/quickstart.yaml")
    left = (
        ".git/HEAD",
        ".venv/bin/python",
        ".cache/m/x",
        "data/x",
        "runs/x",
        "build/x",
        "launch/__pycache__/x",
    )
    for name in (*kept, *left):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    copied = {
        os.path.relpath(os.path.join(folder, file), tmp_path)
        for folder, _, files in walk_workspace(fsspec.filesystem("file"), str(tmp_path), ignore_file)
        for file in files
    }
    assert copied == {ignore_file, *kept}
