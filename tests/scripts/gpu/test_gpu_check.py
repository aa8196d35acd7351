"""gpu_check.py: every check that a CPU can run passes there, and one that fails, hangs or dies stops no other."""

import json
import os
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.helpers.distributed import forks
from tests.helpers.scripts import SCRIPTS, bench_module

GPU = SCRIPTS / "gpu"

CHEAP = ("table_kernels", "int8_tables", "text_attention", "infonce", "item_llm_packed")
"""Checks that need no interpreter of Triton, which has to be chosen before the first import of it."""


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, in this process; the checks are processes forked from the tests' own server."""
    monkeypatch.setenv("PYTHONPATH", "")
    for folder in (GPU, Path(__file__).parent):
        monkeypatch.syspath_prepend(folder)
    forks()
    return bench_module("gpu_check")


@pytest.mark.slow
def test_one_that_fails_hangs_or_dies_stops_no_other(
    gpu_check: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.json"
    status = gpu_check.main(["--cpu", "--out", str(out)], modules=("checks_that_end",))
    found = json.loads(out.read_text())
    states = {name: result["state"] for name, result in found["checks"].items()}
    assert states == {
        "finds": "ok",
        "fails": "failed",
        "has_no_business_here": "skipped",
        "hangs": "failed",
        "dies": "failed",
        "comes_after": "ok",
    }
    reasons = {name: result.get("reason", "") for name, result in found["checks"].items()}
    assert reasons["fails"].startswith("AssertionError: 3 is not 4") and "said before" in reasons["fails"]
    assert reasons["has_no_business_here"] == "there is no such thing"
    assert reasons["hangs"] == "took more than 1 s" and "exit code 7" in reasons["dies"]
    assert found["checks"]["finds"]["found"] == {"tiny": True, "device": "cpu"}
    assert found["counts"] == {"ok": 2, "failed": 3, "skipped": 1} and status == 1
    assert "not to be seen" not in "".join(capfd.readouterr())
    assert found["versions"]["torch"] == torch.__version__ and found["device"]["device"] == "cpu"


@pytest.mark.slow
def test_what_a_cpu_can_run_passes_there(gpu_check: ModuleType, tmp_path: Path) -> None:
    out, chosen = tmp_path / "found.json", (*CHEAP, "sparse_dist_pipeline", "adam_tables", "hstu_speed")
    status = gpu_check.main(["--cpu", "--out", str(out), "--only", *chosen])
    found = json.loads(out.read_text())
    states = {name: result["state"] for name, result in found["checks"].items()}
    assert states.keys() == set(chosen) and status == 0, found
    assert {name for name, state in states.items() if state == "skipped"} == {"adam_tables", "hstu_speed"}, found
    tables = found["checks"]["table_kernels"]["found"]
    assert 0 < tables["exact_row_wise_adagrad"] < 1e-3


@pytest.mark.long
def test_the_command_runs_the_kernels_in_the_interpreter(tmp_path: Path) -> None:
    """The kernels themselves do so in tests/modules/hstu/test_triton_backend.py."""
    out = tmp_path / "found.json"
    command = [sys.executable, str(GPU / "gpu_check.py"), "--cpu", "--out", str(out), "--only", "hstu_kernels"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    found = json.loads(out.read_text())
    assert done.returncode == 0, done.stderr
    assert found["checks"]["hstu_kernels"]["found"]["causal, bias"]["float32"] < 1e-4


def test_the_checks_find_the_benches_that_they_time(gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if Path(folder) != SCRIPTS / "bench"])
    gpu_check.Processes("cpu", True, ())
    assert PathFinder.find_spec("bench_hstu", sys.path) is not None
    assert str(SCRIPTS / "bench") in os.environ["PYTHONPATH"].split(os.pathsep)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_module("gpu_check").main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "gpu_check: torch sees no CUDA device here; --cpu runs what a CPU can\n"
