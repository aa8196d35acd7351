"""Time and memory of the exact AUC of prediction files: `hllm evaluate`'s job on two ranks against scikit-learn.

    python scripts/bench/bench_auc.py --quick --output runs/bench_auc      (under 3 minutes, 3 x 10^7 rows)
    python scripts/bench/bench_auc.py --output runs/bench_auc              (also 10^8 rows, and all repeats)
    python scripts/bench/bench_auc.py --directory --rows 5000000 --output runs/bench_auc [--against OTHER_CHECKOUT]

Both read the same Parquet files (label and score, float32). Our job computes AUC, DeLong's interval and PR-AUC, and
sorts on disk the rows that do not fit into --memory; scikit-learn's roc_auc_score computes the AUC. Each run is a new
process, and the two sides alternate. Seconds are measured from opening the files to the result, without interpreter
start and imports; memory is the peak resident set of a process, including the imports. cpu_seconds is the CPU time of
the busiest rank, which depends less on other load of the machine. `scaling.png` plots both sides. The last line is one
JSON object; its `ratios` are scikit-learn's seconds / ours, and the largest rank's memory / scikit-learn's.

--directory measures the complete command `hllm evaluate --compare` (users, slices, report) on two ranks, for
synthetic predictions with the columns of a run's predictions; `hllm evaluate --run` does the same after scoring. It
reports the peak memory of each rank, seconds including imports, and CPU seconds of both ranks. With --against, the same
command of another checkout is measured alternately.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

CHUNK = 1_000_000
ROOT = Path(__file__).resolve().parents[2]


def write_rows(folder: Path, rows: int) -> Path:
    """Write rows of a synthetic click model (4% positives, logits) in files of up to 10^7 rows; returns the folder."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([("label", pa.float32()), ("score", pa.float32())])
    random = np.random.default_rng(0)
    for start in range(0, rows, 10 * CHUNK):
        with pq.ParquetWriter(folder / f"part-{start // CHUNK:05d}.parquet", schema, compression="none") as writer:
            for first in range(start, min(rows, start + 10 * CHUNK), CHUNK):
                size = min(CHUNK, rows - first)
                label = (random.random(size, dtype=np.float32) < 0.04).astype(np.float32)
                score = random.standard_normal(size, dtype=np.float32) + label - 3
                writer.write_table(pa.table([label, score], schema=schema))
    return folder


def worker_ours(folder: Path, memory: int) -> dict[str, Any]:
    """Run one rank of our side; RANK, WORLD_SIZE and BENCH_STORE are environment variables."""
    import torch.distributed as dist

    from hllm_torchrec.evaluation.offline_evaluation import EvaluationSettings, evaluate_predictions
    from hllm_torchrec.evaluation.prediction_layout import ColumnLayout, PredictionModel
    from hllm_torchrec.evaluation.prediction_rows import PredictionRows

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{os.environ['BENCH_STORE']}", rank=rank, world_size=ranks)
    dist.barrier()
    start, start_cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        metrics = evaluate_predictions(
            PredictionRows([PredictionModel("model", (folder,))], ColumnLayout(), Path(scratch)),
            EvaluationSettings(memory=memory),
        )
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    dist.destroy_process_group()
    block = metrics["models"]["model"]
    found = {"auc": block["auc"], "se": block["auc_se"], "spilled": metrics["memory"]["spilled"]}
    return {"seconds": seconds, "cpu_seconds": cpu} | found


def worker_sklearn(folder: Path) -> dict[str, Any]:
    """Run scikit-learn in this process."""
    import pyarrow.parquet as pq
    from sklearn.metrics import roc_auc_score

    start, start_cpu = time.perf_counter(), time.process_time()
    table = pq.read_table(folder)
    auc = roc_auc_score(table["label"].to_numpy(), table["score"].to_numpy())
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    return {"seconds": seconds, "cpu_seconds": cpu, "auc": float(auc)}


def write_directory(folder: Path, rows: int) -> Path:
    """Write synthetic predictions in the format of two ranks of `hllm evaluate --run`: 25 exposures per user, 20%
    positives; returns the folder."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    random, users = np.random.default_rng(0), np.random.default_rng(1).permutation(-(-rows // 25))
    for rank in range(2):
        writer = None
        for first in range(rows * rank // 2, rows * (rank + 1) // 2, CHUNK):
            place = np.arange(first, min(first + CHUNK, rows * (rank + 1) // 2))
            size = len(place)
            label = (random.random(size) < 0.2).astype(np.float32)
            score = random.standard_normal(size).astype(np.float32) + label - 2
            table = pa.table(
                {
                    "user_id": users[place // 25],
                    "position": (place % 25).astype(np.int32),
                    "item_id": random.integers(1, 50_000, size),
                    "timestamp": 1_700_000_000 + random.integers(0, 7 * 86_400, size),
                    "label": label,
                    "score": score,
                    "probability": (1 / (1 + np.exp(-score))).astype(np.float32),
                    "history_length": random.integers(0, 300, size).astype(np.int32),
                    "item_is_cold": random.random(size) < 0.1,
                }
            )
            writer = writer or pq.ParquetWriter(folder / f"part-{rank:05d}.parquet", table.schema)
            writer.write_table(table)
        if writer:
            writer.close()
    return folder


DIRECTORY_WORKER = """
import json, resource, sys, time
from pathlib import Path
start = time.perf_counter()
from hllm_torchrec.launch.evaluate import main
folder, memory = Path(sys.argv[1]), sys.argv[2]
out = folder.with_name("out")
options = ["--draws", "0", "--no-tensorboard", "--output", str(out), "--memory", memory]
assert main(["--compare", str(folder), *options]) == 0
used = {"seconds": round(time.perf_counter() - start, 2), "cpu_seconds": round(time.process_time(), 2)}
auc = json.loads((out / "metrics.json").read_text())["models"][folder.name]["auc"]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps(used | {"auc": auc, "peak_mb": round(peak)}))
"""
"""One rank of the command, with the code of the checkout in which it is started; seconds include its imports."""


def measure_directory(rows: int, work: Path, memory: int, repeats: int, against: Path | None) -> dict[str, Any]:
    """Medians for the command on a directory of `rows` rows, with this checkout and alternately with another one."""
    folder = write_directory(work / "predictions", rows)
    sides = {"this": ROOT} | ({"other": against.resolve()} if against else {})
    found: dict[str, list[list[dict[str, Any]]]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side, tree in sides.items():
            found[side].append(run_ranks(["-c", DIRECTORY_WORKER, str(folder), str(memory)], 2, tree))
    result: dict[str, Any] = {"rows": rows}
    for side, runs in found.items():
        result[side] = {
            "seconds": statistics.median(max(rank["seconds"] for rank in ranks) for ranks in runs),
            "cpu_seconds": statistics.median(round(sum(rank["cpu_seconds"] for rank in ranks), 2) for ranks in runs),
            "rank_0_peak_mb": statistics.median(ranks[0]["peak_mb"] for ranks in runs),
            "rank_1_peak_mb": statistics.median(ranks[1]["peak_mb"] for ranks in runs),
            "auc": runs[0][0]["auc"],
        }
        print(f"{rows:>11,} rows  {side:<8} {json.dumps(result[side])}", flush=True)
    return result


def run_ranks(arguments: list[str], ranks: int, tree: Path) -> list[dict[str, Any]]:
    """Run new Python processes with a checkout's code; return the JSON of each rank's last line."""
    with tempfile.TemporaryDirectory() as scratch, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        base = os.environ | {"OMP_NUM_THREADS": "1", "BENCH_STORE": f"{scratch}/store", "PYTHONPATH": str(tree)}
        base |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
        free.close()
        processes = [
            subprocess.Popen(
                [sys.executable, *arguments],
                cwd=tree,
                env=base | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]
        outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("a process failed")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def run_processes(kind: str, folder: Path, memory: int, ranks: int) -> dict[str, Any]:
    """Run a side in new processes; return the largest seconds and the largest memory of its ranks."""
    started = time.perf_counter()
    command = [__file__, "--worker", kind, "--memory", str(memory), "--output", str(folder)]
    found = run_ranks(command, ranks, ROOT)
    wall = time.perf_counter() - started
    worst = {name: max(result[name] for result in found) for name in ("seconds", "cpu_seconds", "peak_mb")}
    return found[0] | worst | {"seconds_with_start": wall}


def measure(rows: int, work: Path, memory: int, repeats: int, with_sklearn: bool = True) -> dict[str, Any]:
    """Medians for both sides, measured alternately on files of `rows` rows, and ratios of times."""
    from benchmarking import ratio  # imports torch, which the process of scikit-learn must not have in memory

    folder = write_rows(work / f"rows-{rows}", rows)
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "sklearn": []}
    for _ in range(repeats):
        runs["ours"].append(run_processes("ours", folder, memory, 2))
        if with_sklearn:
            runs["sklearn"].append(run_processes("sklearn", folder, memory, 1))
    shutil.rmtree(folder)
    result: dict[str, Any] = {"rows": rows}
    if with_sklearn:
        result["ratios"] = {
            f"auc_{name}_vs_sklearn": ratio(*([run[key] for run in runs[side]] for side in ("sklearn", "ours")))
            for name, key in (("time", "seconds"), ("cpu", "cpu_seconds"))
        }
    for name, found in runs.items():
        if found:
            result[name] = found[0] | {
                key: round(statistics.median(run[key] for run in found), 3)
                for key in ("seconds", "cpu_seconds", "seconds_with_start", "peak_mb")
            }
            print(f"{rows:>11,} rows  {name:<8} {json.dumps(result[name])}", flush=True)
    if with_sklearn:
        assert abs(result["ours"]["auc"] - result["sklearn"]["auc"]) < 1e-9
    return result


def plot(results: list[dict[str, Any]], file: Path) -> None:
    """Plot seconds and memory against the number of rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    labels = {"ours": "ours, 2 ranks", "sklearn": "scikit-learn, 1 process"}
    for axis, key, title in zip(figure.subplots(1, 2), ("seconds", "peak_mb"), ("seconds", "peak MB of a process")):
        for name, label in labels.items():
            points = [(result["rows"], result[name][key]) for result in results if name in result]
            axis.plot(*zip(*points), marker="o", label=label)
        axis.set(xscale="log", yscale="log", xlabel="rows", title=title)
        axis.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    """Run the benchmark, or one of its processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    rows_help = "numbers of rows (default: 10^5, 10^6, 10^7, 3 x 10^7 and, without --quick, 10^8)"
    parser.add_argument("--rows", type=int, nargs="+", help=rows_help)
    parser.add_argument("--memory", type=int, default=512 << 20, help="bytes for rows on a rank")
    parser.add_argument("--output", type=Path, default=Path("runs/bench_auc"))
    parser.add_argument("--directory", action="store_true", help="measure `hllm evaluate --compare` instead")
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout, for --directory")
    parser.add_argument("--worker", choices=("ours", "sklearn"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        found = worker_ours(args.output, args.memory) if args.worker == "ours" else worker_sklearn(args.output)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(found | {"peak_mb": round(peak)}))
        return
    sizes = args.rows or [10**5, 10**6, 10**7, 3 * 10**7, *([] if args.quick else [10**8])]
    repeats = 1 if args.quick else 3
    if args.directory:
        with tempfile.TemporaryDirectory(prefix="bench-auc-") as work:
            sizes = args.rows or [5_000_000]
            found = [measure_directory(n, Path(work) / str(n), args.memory, repeats, args.against) for n in sizes]
        print(json.dumps({"benchmark": "auc-directory", "memory_option": args.memory, "results": found}))
        return
    with tempfile.TemporaryDirectory(prefix="bench-auc-") as work:
        # scikit-learn is left out for 10^8 rows, for which it needs about 7 GB.
        results = [measure(rows, Path(work), args.memory, repeats, rows < 10**8) for rows in sizes]
    args.output.mkdir(parents=True, exist_ok=True)
    plot(results, args.output / "scaling.png")
    compared = [result for result in results if "sklearn" in result][-1]
    from benchmarking import refuse_noisy

    ratios, refused = refuse_noisy(compared["ratios"])
    memory = compared["ours"]["peak_mb"] / compared["sklearn"]["peak_mb"]
    packages = {name: version(name) for name in ("numpy", "pyarrow", "scikit-learn", "torch")}
    summary = {
        "benchmark": "auc",
        "device": platform.machine(),
        "processors": os.cpu_count(),
        "packages": packages,
        "memory_option": args.memory,
        "results": results,
        "ratios": {"rows": compared["rows"], **ratios, "auc_memory_vs_sklearn": memory},
        "refused": refused,
    }
    (args.output / "bench_auc.json").write_text(json.dumps(summary, indent=1))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
