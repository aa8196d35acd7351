"""What `hllm plan` says a rank's memory will be, against what training really takes.

    python scripts/bench_plan.py [--quick] [--out FILE]

Each case trains a few steps in fresh processes, one per rank, in fp32 on the CPU. Measured is the kernel's high-water
mark of resident memory (VmHWM) within the steps, reset before each, the largest of all steps and ranks, less what was
resident before the model was built: by then the same configuration has taken one step at a small size and been
dropped, so that libraries, threads and the process group are there. glibc gives blocks from 64 KiB on back to the
system as soon as they are freed (MALLOC_MMAP_THRESHOLD_), so that resident memory is memory in use; that is slow, and
no time is reported. A ratio is estimated / measured: 1 is right, below 1 too little was estimated.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import benchmarking
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000", "MALLOC_TRIM_THRESHOLD_": "65536"}
LLM = ".cache/models/smollm2-135m-instruct"
WIDE = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2}
WIDE |= {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 8}
QUIET = ["--evaluation.checkpoint_every", "0", "--optim.warmup", "0.5"]


def cases(tables: Path) -> dict[str, dict[str, Any]]:
    """Name -> configuration, options, ranks, and whether `--quick` runs it. tables: a dataset of many items."""
    return {
        "quickstart": {"config": "configs/quickstart.yaml", "options": [], "ranks": 1, "quick": True},
        "quickstart, 2 ranks": {"config": "configs/quickstart.yaml", "options": [], "ranks": 2, "quick": False},
        "item tables, 2 ranks": {
            "config": "configs/retrieval/llama_id.yaml",
            "options": ["--data.dataset", str(tables), "--user.shape", json.dumps(WIDE)],
            "ranks": 2,
            "quick": True,
        },
        "HLLM, two SmolLM2 of 6 layers": {
            "config": "configs/retrieval/hllm.yaml",
            "options": ["--item_llm.layers", "6", "--item_llm.trained_share", "1", "--item_llm.freeze_words", "false"]
            + ["--user.shape", "null", "--user.pretrained", LLM, "--user.layers", "6", "--data.batch_users", "2"]
            + ["--data.max_history", "64", "--objective.negatives", "128"],
            "ranks": 1,
            "quick": True,
        },
    }


# ---------------------------------------------------------------------- one rank


def resident(what: str) -> int:
    """Bytes: VmRSS now, or VmHWM since it was reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {what}: Linux is needed")


def reset_high_water_mark() -> None:
    """VmHWM becomes VmRSS."""
    Path("/proc/self/clear_refs").write_text("5")


def settle() -> int:
    """Drop what is unused; the bytes that stay."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return resident("VmRSS")


def measure(config: str, options: list[str], output: Path, steps: int) -> dict[str, Any]:
    """On one rank of those that the environment names: bytes of the busiest step, and of each."""
    from hllm_torchrec.config import load_config
    from hllm_torchrec.parallelize import start_process
    from hllm_torchrec.trainer import Trainer

    class Measured(Trainer):
        """Notes the high-water mark of every step."""

        def train_step(self, batches: Any, following: Any = None) -> dict[str, float]:
            reset_high_water_mark()
            found = super().train_step(batches, following)
            marks.append(resident("VmHWM"))
            sizes.append([int(b.item_ids.numel()) for b in batches] + [int(b.unique_items.numel()) for b in batches])
            return found

    def run(name: str, number: int, *more: str) -> Trainer:
        words = ["--config", config, *options, *QUIET, "--output", str(output / name), "--max_steps", str(number)]
        trainer = Measured(load_config([*words, *more]), device)
        trainer.evaluate_after = frozenset()
        trainer.run()
        return trainer

    marks: list[int] = []
    sizes: list[list[int]] = []
    device = start_process(120)
    run("warm", 1, "--data.batch_users", "1", "--data.max_history", "4")
    marks.clear(), sizes.clear()
    before = settle()
    reset_high_water_mark()
    trainer = run("run", steps)
    return {
        "peak": max(marks) - before,
        "steps": [mark - before for mark in marks],
        "sizes": sizes,
        "before": before,
        "after": settle() - before,
        "rank": trainer.rank,
    }


# ---------------------------------------------------------------------- all of a case


def estimated(case: dict[str, Any]) -> dict[str, Any]:
    """What `hllm plan` says of it."""
    words = [sys.executable, "-m", "hllm_torchrec.launch.plan", "--config", case["config"], "--hardware", "cpu"]
    words += ["--gpus", str(case["ranks"]), "--memory", "64", "--json", *case["options"]]
    result = subprocess.run(
        words, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    if result.returncode != 0:
        raise RuntimeError(result.stderr + result.stdout)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def measured(name: str, case: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """Of each rank."""
    from tests.launch.processes import environment, free_port

    with tempfile.TemporaryDirectory() as folder:
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "WORLD_SIZE": case["ranks"]}
        address |= GIVE_BACK | {"LOCAL_WORLD_SIZE": case["ranks"]}
        words = [sys.executable, __file__, "--measure", json.dumps(case), "--steps", str(steps), "--into", folder]
        ranks = [
            subprocess.Popen(
                words,
                cwd=ROOT,
                env=environment(ROOT, RANK=rank, LOCAL_RANK=rank, **address),
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(case["ranks"])
        ]
        printed = [rank.communicate()[0] for rank in ranks]
        if any(rank.returncode for rank in ranks):
            raise RuntimeError(f"{name}: a rank failed")
    return [json.loads(text.splitlines()[-1]) for text in printed]


def many_items(folder: Path, items: int, users: int = 4000, events: int = 12) -> Path:
    """A prepared dataset of so many items, with so many events of each user."""
    from hllm_torchrec.data.prepare import prepare
    from hllm_torchrec.data.sources.table import table

    rng = np.random.default_rng(0)
    names = pa.array([f"i{number}" for number in range(items)])
    columns = {
        "user": np.repeat(np.arange(users), events).astype(str),
        "item": names.take(rng.integers(items, size=users * events)),
    }
    columns["time"] = np.tile(np.arange(events) * 86_400, users) + 1_700_000_000
    pq.write_table(pa.table(columns), folder / "events.parquet")
    pq.write_table(pa.table({"item": names, "title": names}), folder / "items.parquet")
    mapping = {
        "name": "many-items",
        "events": {"path": "events.parquet", "user": "user", "item": "item", "time": "time"},
        "items": {"path": "items.parquet", "item": "item", "text": ["title"]},
    }
    (folder / "mapping.yaml").write_text(json.dumps(mapping))
    return prepare(table(folder / "mapping.yaml"), folder / "dataset", split="leave_one_out")


def main() -> int:
    """Compare all cases."""
    parser = benchmarking.arguments(__doc__)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=8, help="of each case")
    options = parser.parse_args()
    if options.measure:
        case = json.loads(options.measure)
        print(json.dumps(measure(case["config"], case["options"], options.into, options.steps)), flush=True)
        return 0
    for name, case in cases(Path("/tmp/S/items/dataset")).items():
        if options.only and not name.startswith(options.only):
            continue
        plan = estimated(case)
        ranks = measured(name, case, options.steps)
        peak = max(rank["peak"] for rank in ranks)
        print(name, f"{plan['peak'] / peak:.3f}")
        print({k: round(v / 1e6) for k, v in plan["memory"].items()}, plan["counts"])
        for rank in ranks:
            print(rank["rank"], [round(s / 1e6) for s in rank["steps"]], rank["sizes"], rank["before"], rank["after"])
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
