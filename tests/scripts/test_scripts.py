"""The scripts say what they take, and refuse what they cannot do before they change anything."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = ("docs", "install", "quickstart", "reliability/soak_two_nodes", "test", "experiments/three_stages")


def run_script(name: str, *args: str, root: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a script of the checkout at `root` with more environment variables."""
    command = ["bash", str(root / "scripts" / f"{name}.sh"), *args]
    return subprocess.run(command, cwd="/", env={**os.environ, **env}, capture_output=True, text=True, timeout=60)


@pytest.fixture
def bare(root: Path, tmp_path: Path) -> Path:
    """A checkout without .venv, of which only the scripts and the version table are there."""
    shutil.copytree(root / "scripts", tmp_path / "scripts")
    (tmp_path / "hllm_torchrec").mkdir()
    shutil.copy(root / "hllm_torchrec" / "_versions.py", tmp_path / "hllm_torchrec")
    return tmp_path


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_says_what_the_script_takes(name: str, bare: Path) -> None:
    result = run_script(name, "--help", root=bare)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"usage: bash scripts/{name}.sh ")
    assert not (bare / ".venv").exists()


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("install", ["--gpu"], "install: unknown argument: --gpu"),
        ("install", ["--torch", "2.7"], "error: torch 2.7 is not supported; supported: torch 2.11.0 with"),
        ("quickstart", ["--gpu"], "quickstart: unknown argument: --gpu"),
        ("quickstart", ["--config", "no.yaml"], "quickstart: --config no.yaml: there is no such file"),
        ("docs", ["--gpu"], "docs: unknown argument: --gpu"),
        ("experiments/three_stages", ["--gpu"], "three_stages: unknown argument: --gpu"),
        ("experiments/three_stages", ["--nproc", "3"], "three_stages: --nproc 3: must be 1, 2, 4 or 8"),
    ],
)
def test_wrong_argument_is_refused_before_anything_is_made(
    name: str, args: list[str], message: str, bare: Path
) -> None:
    result = run_script(name, *args, root=bare, PYTHON=sys.executable)
    assert result.returncode == 1
    assert message in result.stderr
    assert not (bare / ".venv").exists() and not (bare / "runs").exists()


def test_number_of_processes_must_be_a_number(root: Path) -> None:
    result = run_script("quickstart", "--nproc", "two", root=root)
    assert result.returncode == 1
    assert "quickstart: --nproc two: must be a whole number from 1" in result.stderr


def test_install_refuses_a_python_that_is_not_supported(bare: Path) -> None:
    old = bare / "python"
    old.write_text("#!/bin/sh\nexit 1\n")  # what a Python of another version answers to the question
    old.chmod(0o755)
    result = run_script("install", root=bare, PYTHON=str(old))
    assert result.returncode == 1
    assert f"PYTHON={old} is not a Python 3.11 to 3.13 with the venv module" in result.stderr


def test_install_without_any_suitable_python_says_how_to_get_one(bare: Path) -> None:
    tools = bare / "bin"
    tools.mkdir()
    for tool in ("bash", "cat", "dirname"):
        (tools / tool).symlink_to(shutil.which(tool) or "")
    result = run_script("install", root=bare, PATH=str(tools), PYTHON="")
    assert result.returncode == 1
    assert "install: no Python 3.11 to 3.13 with the venv module found" in result.stderr
    assert "apt install python3 python3-venv" in result.stderr
