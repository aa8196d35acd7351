import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_benchmark_ends_with_its_ratios(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(root / "scripts" / "bench" / "bench_auc.py"), "--quick", "--rows", "20000"]
    result = subprocess.run(
        [*command, "--memory", "200000", "--output", str(tmp_path)],
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])
    assert {"auc_time_vs_sklearn", "auc_memory_vs_sklearn"} <= summary["ratios"].keys()
    assert [found["rows"] for found in summary["results"]] == [20000]
    assert summary["results"][0]["ours"]["spilled"] > 0
    assert summary["results"][0]["ours"]["auc"] == pytest.approx(summary["results"][0]["sklearn"]["auc"], abs=1e-9)
    assert (tmp_path / "scaling.png").stat().st_size > 1000
    assert json.loads((tmp_path / "bench_auc.json").read_text()) == summary
