"""hllm's jobs as the scripts run them that train many models: each a process of one thread, its output in a log."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hllm_torchrec.common.machine import LARGE_BUFFERS_KEPT

ROOT = Path(__file__).resolve().parents[2]

DEFAULTS = {"OMP_NUM_THREADS": "1", **LARGE_BUFFERS_KEPT}
"""Of the environment, where it says nothing else."""


def run_job(job: str, arguments: Sequence[str], log: Path, done: Path | None = None) -> None:
    """Run a job, unless what it makes in the end, `done`, is there.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    if done is not None and done.exists():
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{Path(sys.argv[0]).stem}: {job} {' '.join(arguments)}", flush=True)
    with log.open("a") as file:
        command = [sys.executable, "-m", f"hllm_torchrec.launch.{job}", *arguments]
        environment = DEFAULTS | os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=file, check=True)
