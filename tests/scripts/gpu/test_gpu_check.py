"""gpu_check.py: every check that a CPU can run passes there, and one that fails, hangs or dies stops no other."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.scripts import SCRIPTS, bench_module

GPU = SCRIPTS / "gpu"

RUN = """
import sys
sys.path[:0] = [{scripts!r}, {here!r}]
import gpu_check
sys.exit(gpu_check.main({arguments!r}, modules=({module!r},)))
"""


def run(out: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, JSON and stderr of the script on the CPU."""
    command = [sys.executable, str(GPU / "gpu_check.py"), "--cpu", "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done.returncode, json.loads(out.read_text()), done.stderr


@pytest.mark.slow
def test_one_that_fails_hangs_or_dies_stops_no_other(tmp_path: Path) -> None:
    out, here = tmp_path / "found.json", str(Path(__file__).parent)
    arguments = ["--cpu", "--out", str(out)]
    code = RUN.format(scripts=str(GPU), here=here, arguments=arguments, module="checks_that_end")
    environment = {"PYTHONPATH": f"{GPU}:{here}:{SCRIPTS.parent}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
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
    assert found["counts"] == {"ok": 2, "failed": 3, "skipped": 1} and done.returncode == 1
    assert "not to be seen" not in done.stdout + done.stderr
    assert found["versions"]["torch"] == torch.__version__ and found["device"]["device"] == "cpu"


@pytest.mark.slow
def test_what_a_cpu_can_run_passes_there(tmp_path: Path) -> None:
    cheap = ("table_kernels", "int8_tables", "text_attention", "infonce", "item_llm_packed", "hstu_kernels")
    chosen = (*cheap, "sparse_dist_pipeline", "adam_tables", "hstu_speed")
    status, found, stderr = run(tmp_path / "found.json", "--only", *chosen)
    states = {name: result["state"] for name, result in found["checks"].items()}
    assert states.keys() == set(chosen) and status == 0, stderr
    assert {name for name, state in states.items() if state == "skipped"} == {"adam_tables", "hstu_speed"}, found
    assert found["checks"]["hstu_kernels"]["found"]["causal, bias"]["float32"] < 1e-4
    tables = found["checks"]["table_kernels"]["found"]
    assert 0 < tables["exact_row_wise_adagrad"] < 1e-3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_module("gpu_check").main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "gpu_check: torch sees no CUDA device here; --cpu runs what a CPU can\n"
