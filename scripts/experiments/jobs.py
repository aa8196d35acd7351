"""Runs jobs of hllm for the scripts that train many models: each job is a process, with one thread unless
OMP_NUM_THREADS is set, and its output goes to a log file."""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hllm_torchrec.common.machine import LARGE_BUFFERS_KEPT

ROOT = Path(__file__).resolve().parents[2]

DEFAULTS = {"OMP_NUM_THREADS": "1", **LARGE_BUFFERS_KEPT}
"""Environment variables of a job; those that are already set are not overridden."""


def experiment_parser(
    description: str | None, folder: str | None, seeds: Sequence[int] = ()
) -> argparse.ArgumentParser:
    """Parser with `--output` and, unless `seeds` is empty, `--seeds`.

    folder: the default of `--output` is runs/`folder`; None: it is required. seeds: default of `--seeds`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = None if folder is None else ROOT / "runs" / folder
    parser.add_argument("--output", type=Path, default=default, required=folder is None)
    if seeds:
        parser.add_argument("--seeds", nargs="+", type=int, default=list(seeds))
    return parser


def run_job(job: str, arguments: Sequence[str], log: Path, done: Path | None = None) -> None:
    """Run a job, unless the file or folder `done`, which the job writes last, exists. Output is appended to `log`.

    Raises:
        subprocess.CalledProcessError: the job failed.
    """
    if done is not None and done.exists():
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{Path(sys.argv[0]).stem}: {job} {' '.join(arguments)}", flush=True)
    with log.open("a") as file:
        command = [sys.executable, "-m", f"hllm_torchrec.launch.{job}", *arguments]
        environment = DEFAULTS | os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=file, check=True)


def train_and_evaluate(run: Path, seed: int, log: Path, *options: str) -> None:
    """Train (resuming an interrupted run) and evaluate on the test part, unless this is done; run: its directory."""
    done = run / "metrics.json"
    run_job("train", [*options, "--seed", str(seed), "--output", str(run), "--resume", "true"], log, done)
    run_job("evaluate", ["--run", str(run), "--split", "test"], log, done)
