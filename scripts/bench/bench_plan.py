"""Compares the memory of a rank that `hllm plan` estimates with the memory that training uses.

    python scripts/bench/bench_plan.py [--quick] [--out FILE]

Each case trains a few steps in new processes, one per rank, in fp32 on the CPU. The measured memory is the peak
resident memory (VmHWM, reset before each step), the largest value of all steps and ranks, minus the resident memory
before the model was built. Before that, the same configuration has been trained for some steps at a small size and
deleted, so that the memory of libraries, threads and the process group is subtracted. glibc is set to return blocks of
at least 64 KiB to the system as soon as they are freed (MALLOC_MMAP_THRESHOLD_), so that resident memory is memory in
use; this is slow, so no times are reported. A ratio is estimated / measured; below 1 the estimate is too small.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from benchmarking import ROOT, arguments, report, reset_high_water_mark, resident, say

sys.path.insert(0, str(ROOT))  # for the tests' launcher of ranks

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000", "MALLOC_TRIM_THRESHOLD_": "65536"}
LLM = ".cache/models/smollm2-135m-instruct"
WIDE = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2}
WIDE |= {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 8}
ITEMS, TINY_ITEMS = 600_000, 300


def cases(tables: Path) -> dict[str, dict[str, Any]]:
    """Name -> configuration, options, number of ranks, and whether `--quick` runs it.

    tables: folder of the dataset with many items.
    """
    return {
        "trained": {"config": "configs/ml100k/trained.yaml", "options": [], "ranks": 1, "quick": True},
        "trained, 2 ranks": {"config": "configs/ml100k/trained.yaml", "options": [], "ranks": 2, "quick": False},
        "item tables, 2 ranks": {
            "config": "configs/retrieval/llama_id.yaml",
            "options": ["--data.dataset", str(tables), "--user.shape", json.dumps(WIDE)],
            "ranks": 2,
            "quick": True,
        },
        "HLLM, two SmolLM2 of 3 layers": {
            "config": "configs/retrieval/hllm.yaml",
            "options": ["--item_llm.layers", "3", "--item_llm.trained_share", "1", "--item_llm.freeze_words", "false"]
            + ["--user.shape", "null", "--user.pretrained", LLM, "--user.layers", "3", "--data.batch_users", "2"]
            + ["--data.max_history", "64", "--objective.negatives", "64"],
            "ranks": 1,
            "quick": False,
        },
    }


# ---------------------------------------------------------------------- one rank


def settle() -> int:
    """Free unused memory; return the resident bytes that remain."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return resident("VmRSS")


def measure(config: str, options: list[str], output: Path) -> dict[str, Any]:
    """Train up to three steps, among them the step with the most events; return the bytes and sizes of each.

    Called on each rank; the environment has rank and world size.
    """
    from hllm_torchrec.config.loading import load_config
    from hllm_torchrec.distributed.process_group import init_distributed
    from hllm_torchrec.training.trainer_setup import build_trainer

    def run(name: str, *more: str) -> None:
        words = ["--config", config, *options, "--evaluation.checkpoint_every", "0", "--output", str(output / name)]
        trainer: Any = build_trainer(load_config([*words, *more]), device)
        fullest, end = fullest_step(trainer)
        trainer.step = max(0, fullest - 1)
        trainer.schedule = replace(trainer.schedule, evaluation_steps=frozenset(), total_steps=min(fullest + 2, end))
        train_step = trainer.train_step

        def measured(batches: Any, following: Any = None) -> dict[str, float]:
            """Train a step; record its peak memory and the sizes of its batch."""
            reset_high_water_mark()
            found: dict[str, float] = train_step(batches, following)
            marks.append(resident("VmHWM"))
            (batch,) = batches
            sizes.append({"events": batch.item_ids.numel(), "items": batch.unique_items.numel()})
            return found

        trainer.train_step = measured
        trainer.run()

    marks: list[int] = []
    sizes: list[dict[str, int]] = []
    device = init_distributed(300)
    run("warm", "--data.batch_users", "1", "--data.max_history", "4", "--objective.negatives", "4")
    marks.clear(), sizes.clear()
    before = settle()
    run("run")
    return {"steps": [mark - before for mark in marks], "sizes": sizes, "before": before}


def fullest_step(trainer: Any) -> tuple[int, int]:
    """Return the step of the first epoch of the planned stage in which a rank has the most events, and the step at
    which this epoch ends."""
    from hllm_torchrec.planning.estimate import planned_stage

    segment = next(segment for segment in trainer.schedule.segments if segment.stage == planned_stage(trainer.config))
    loader = trainer._loader(segment.stage)
    events = [
        max(
            int(loader.pieces.lengths[batches[step]].sum())
            for batches in loader.rank_batches(segment.epoch)
            if step < len(batches)
        )
        for step in range(segment.steps)
    ]
    return segment.first_step + int(np.argmax(events)), segment.first_step + segment.steps


# ---------------------------------------------------------------------- all ranks of a case


def estimated(case: dict[str, Any]) -> Any:
    """The `Estimate` of `hllm plan` for a case."""
    from hllm_torchrec.config.loading import load_config
    from hllm_torchrec.launch.plan import build_parser, workload
    from hllm_torchrec.planning.estimate import HARDWARE, Machine, estimate

    args = build_parser().parse_args(["--config", case["config"], "--gpus", str(case["ranks"])])
    config = load_config(["--config", case["config"], *case["options"]])
    machine = Machine(1, case["ranks"], **HARDWARE["cpu"] | {"memory": 64e9})
    work, tables = workload(args, config)
    return estimate(config, work, machine, tables)


def measured(name: str, case: dict[str, Any]) -> list[dict[str, Any]]:
    """Results of `measure` of each rank, run in new processes."""
    from tests.helpers.processes import environment, free_port

    with tempfile.TemporaryDirectory() as folder:
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "WORLD_SIZE": case["ranks"]}
        address |= GIVE_BACK | {"LOCAL_WORLD_SIZE": case["ranks"]}
        words = [sys.executable, __file__, "--measure", json.dumps(case), "--into", folder]
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


def many_items(folder: Path, items: int) -> Path:
    """Prepare a dataset of random events of 4,000 users; return its folder."""
    from hllm_torchrec.data.prepare import prepare
    from hllm_torchrec.data.sources.table_mapping import table

    rng, users, events = np.random.default_rng(0), 4000, 12  # events of each user
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


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Estimates by part, measured bytes by step, and their ratio, for each case."""
    ratios: dict[str, float] = {}
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        items = TINY_ITEMS if options.tiny else ITEMS
        for name, case in cases(many_items(Path(folder), items)).items():
            if (options.quick or options.tiny) and not case["quick"] or options.tiny and "tables" not in name:
                continue
            plan, ranks = estimated(case), measured(name, case)
            peak = max(mark for rank in ranks for mark in rank["steps"])
            ratios[name] = plan.peak / peak
            rows[name] = {
                "config": case["config"],
                "options": [word.replace(folder, "GENERATED") for word in case["options"]],
                "estimated": plan.peak,
                "measured": peak,
                "by_part": {part: size for part, size in plan.memory.items() if size},
                "ranks": ranks,
            }
            say(f"{name}: {plan.peak / 1e6:.0f} of {peak / 1e6:.0f} MB, {ratios[name]:.3f}")
    return {"ratios": ratios, "rows": rows, "shapes": {"items of the tables": items}}


def main() -> int:
    """Compare all cases."""
    parser = arguments(__doc__)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        case = json.loads(options.measure)
        print(json.dumps(measure(case["config"], case["options"], options.into)), flush=True)
        return 0
    options.out = options.out and options.out.resolve()
    os.chdir(ROOT)  # configurations name their data relative to it
    report("plan", options, compare(options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
