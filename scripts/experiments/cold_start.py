"""Cold start on MovieLens-100k: a fifth of the items is excluded from training, and models are compared on them.

    python scripts/experiments/cold_start.py --output runs/cold [--seeds 0 1 2] [--only dlrm hllm stage3 ...]

The seed chooses the items (`hllm prepare --hold-out-items 0.2 --seed ...`) and initializes the models. AUC is computed
on the test exposures of items without training events (cold) and on those of the other items (warm). For Recall, the
complete catalogue is ranked for the positive exposures of both kinds. Each job has a separate directory, so the script
can be stopped and started again.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from jobs import ROOT, experiment_parser, run_job, train_and_evaluate

from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.predictions import Predictions, read_predictions
from hllm_torchrec.metrics.auc import delong_interval, delong_test

CONFIGS = ROOT / "configs"
SHARE = 0.2
COLD_DROPOUT = "--data.cold_dropout=0.2"
IDS = ["--data.item_features=[]", "--data.item_vectors=[]"]
HSTU = json.dumps(
    {
        "preset": "research",
        "width": 64,
        "layers": 2,
        "heads": 2,
        "max_positions": 128,
        "divide_by": "length",
        "time_of": "event",
    }
)
SASREC = json.dumps({"width": 64, "layers": 2, "heads": 1, "max_positions": 128, "dropout": 0.2})


@dataclass(frozen=True)
class Job:
    """A training job: a configuration and the options that override it."""

    config: str
    options: tuple[str, ...] = ()


TRAININGS = {
    "hstu_ids": Job("ml100k/no_text", (*IDS, "--user.encoder=hstu", f"--user.shape={HSTU}")),
    "hllm": Job("ml100k/late", (COLD_DROPOUT,)),
    "hllm_plain": Job("ml100k/late"),
    "sasrec_next": Job(
        "ml100k/generative",
        (
            *IDS,
            "--item_llm.enabled=false",
            "--item_llm.pretrained=null",
            "--user.encoder=sasrec",
            f"--user.shape={SASREC}",
        ),
    ),
    "hllm_next": Job("ml100k/generative", (COLD_DROPOUT,)),
}
"""Model -> training job. `*_next` predict the next item (Recall); the others score exposures (AUC)."""
NAMES = ("dlrm", *TRAININGS, "stage3")
REFERENCE = "dlrm"
KS = (10, 50)


def run_seed(output: Path, seed: int, names: list[str], source: list[str]) -> Path:
    """Run all jobs of a seed; returns its folder."""
    folder = output / f"seed-{seed}"
    data, log = folder / "data", folder / "output.log"
    prepare = [*source, "--output", str(data), "--hold-out-items", str(SHARE), "--seed", str(seed)]
    run_job("prepare", prepare, log, data / "manifest.json")
    if "dlrm" in names:
        baselines = ["--dataset", str(data), "--output", str(folder), "--only", "dlrm", "--dlrm.seed", str(seed)]
        run_job("baselines", baselines, log, folder / "dlrm" / "baseline.json")
    for name, job in TRAININGS.items():
        if name in names:
            config = ["--config", str(CONFIGS / f"{job.config}.yaml"), "--data.dataset", str(data), *job.options]
            train_and_evaluate(folder / name, seed, log, *config)
    if "stage3" in names:
        stores = {kind: str(folder / f"{kind}-vectors") for kind in ("users", "items")}
        exposures = ["--run", str(folder / "hllm"), "--modes", "nearline"]
        exposures += ["--users", stores["users"], "--items", stores["items"]]
        done = folder / "stage3" / "both_nearline" / "downstream.json"
        run_job("exposures", exposures, log, done)
        downstream = ["--dataset", str(data), "--output", str(folder / "stage3"), "--dlrm.seed", str(seed)]
        stored = ["--item_store", stores["items"], "--user_stores", f"[{stores['users']}/nearline]"]
        rows = ["--rows", "[items,both_nearline]"]
        run_job("downstream", [*downstream, *stored, *rows], log, done)
    return folder


def predictions_of(folder: Path) -> dict[str, Path]:
    """Model -> directory of its predictions of the test part; the DLRM comes first."""
    runs = {"dlrm": "dlrm", "hstu_ids": "hstu_ids", "hllm_plain": "hllm_plain", "hllm": "hllm"}
    runs |= {"dlrm_items": "stage3/items", "dlrm_both": "stage3/both_nearline"}
    paths = {name: folder / run / "predictions" / "test" for name, run in runs.items()}
    return {name: path for name, path in paths.items() if path.is_dir()}


def measure_auc(folder: Path) -> dict[str, dict[str, Any]]:
    """Model -> AUC on cold and warm items with DeLong's interval, and the paired difference from the DLRM."""
    scored = {name: read_predictions(path) for name, path in predictions_of(folder).items()}
    reference = scored.get(REFERENCE)
    found: dict[str, dict[str, Any]] = {}
    for name, one in scored.items():
        found[name] = {}
        for kind, rows in (("cold", one.item_is_cold), ("warm", ~one.item_is_cold)):
            interval = delong_interval(one.label[rows], one.score[rows])
            found[name][kind] = {
                "rows": int(rows.sum()),
                "auc": interval.auc,
                "interval": [interval.low, interval.high],
            }
            if reference is not None and name != REFERENCE:
                found[name][kind] |= _difference(one, reference, rows)
    return found


def _difference(one: Predictions, reference: Predictions, rows: np.ndarray) -> dict[str, Any]:
    test = delong_test(one.label[rows], one.score[rows], reference.score[rows])
    return {"difference": test.difference, "difference_interval": [test.low, test.high], "p": test.p_value}


def measure_recall(folder: Path) -> dict[str, dict[str, Any]]:
    """Model -> Recall@10 and @50 of cold and of warm targets, ranked among the complete catalogue."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*_next/retrieval/test")):
        counts = Dataset.open(folder / "data").training_item_counts()
        table = pq.read_table(path)
        cold, rank = counts[table["item_id"].to_numpy()] == 0, table["rank"].to_numpy()
        found[path.parents[1].name] = {
            kind: {"targets": int(rows.sum())} | {f"recall@{k}": float((rank[rows] <= k).mean()) for k in KS}
            for kind, rows in (("cold", cold), ("warm", ~cold))
        }
    return found


def markdown(folders: dict[int, Path]) -> str:
    """Tables of all seeds, a line for each model and seed."""
    lines = ["| seed | model | AUC cold | AUC warm | cold - DLRM (DeLong) |", "|---|---|---|---|---|"]
    for seed, folder in folders.items():
        for name, one in measure_auc(folder).items():
            cold, warm = one["cold"], one["warm"]
            difference = "–"
            if "difference" in cold:
                low, high = cold["difference_interval"]
                difference = f"{cold['difference']:+.4f} [{low:+.4f}, {high:+.4f}], p = {cold['p']:.1e}"
            low, high = cold["interval"]
            shown = f"{cold['auc']:.4f} [{low:.4f}, {high:.4f}]"
            lines.append(f"| {seed} | {name} | {shown} | {warm['auc']:.4f} | {difference} |")
    lines += ["", "| seed | model | Recall@10 cold | Recall@50 cold | Recall@10 warm | Recall@50 warm |"]
    lines += ["|---|---|---|---|---|---|"]
    for seed, folder in folders.items():
        for name, one in measure_recall(folder).items():
            cells = [f"{one[kind][f'recall@{k}']:.4f}" for kind in ("cold", "warm") for k in KS]
            lines.append(f"| {seed} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Run what is missing, then write `cold_start.json` and print the tables."""
    parser = experiment_parser(__doc__, "cold", seeds=[0])
    parser.add_argument(
        "--only", nargs="+", choices=NAMES, default=NAMES, metavar="MODEL", help=f"of {', '.join(NAMES)}"
    )
    parser.add_argument("--path", help="folder of MovieLens-100k; fetched if left out")
    options = parser.parse_args()
    source = ["--source", "ml-100k", *(["--path", options.path] if options.path else [])]
    output = options.output.absolute()
    folders = {seed: run_seed(output, seed, list(options.only), source) for seed in options.seeds}
    found = {seed: {"auc": measure_auc(f), "recall": measure_recall(f)} for seed, f in folders.items()}
    (output / "cold_start.json").write_text(json.dumps(found, indent=1))
    print(markdown(folders))
    return 0


if __name__ == "__main__":
    sys.exit(main())
