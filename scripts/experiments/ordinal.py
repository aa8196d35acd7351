"""Ratings as an additional ordinal label, against the binary label alone, on MovieLens-100k.

    python scripts/experiments/ordinal.py --output runs/ordinal [--seeds 0 1 2] [--arms binary ordinal] [--path FOLDER]

All settings are fixed. Each arm is `configs/ml100k/no_text.yaml` with the same seeds and these labels:

    binary     only the label rating >= 4
    value      the same, and the squared error of the rating (objective.value_weight 0.5), as in the configuration
    ordinal    two tasks on a shared bottom: the label, and a softmax over the five stars with weight 0.5

OUTPUT/ordinal.json has the test AUC by seed, the MAE of the expected stars, the paired differences from the first arm
by seed, and those of the mean score over all seeds with their intervals over users. Complete runs are reused.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from jobs import ROOT, experiment_parser, run_job

from hllm_torchrec.data.predictions import write_predictions
from hllm_torchrec.evaluation.model_comparison import compare

ARMS: dict[str, list[str]] = {
    "binary": ["--objective.value_weight", "0"],
    "value": ["--objective.value_weight", "0.5"],
    "ordinal": ["--objective.value_weight", "0", "--objective.tasks", "{liked: {}, stars: {weight: 0.5}}"],
}


def run_arm(output: Path, arm: str, seed: int, dataset: Path, options: Sequence[str]) -> Path:
    """Train and score an arm, unless it is complete; returns its run directory."""
    run = output / f"{arm}-{seed}"
    named = ["--output", str(run), "--data.dataset", str(dataset), "--seed", str(seed), "--resume", "true"]
    config = ["--config", str(ROOT / "configs" / "ml100k" / "no_text.yaml")]
    log = output / f"{arm}-{seed}.log"
    run_job("train", [*config, *named, *ARMS[arm], *options], log, run / "checkpoints" / "best.json")
    scored = ["--run-dir", str(run), "--split", "test", "--draws", "0", "--no-tensorboard"]
    run_job("evaluate", scored, log, run / "predictions" / "test")
    return run


def mean_of_seeds(predictions: Sequence[Path], target: Path) -> Path:
    """Write predictions with the mean score over the seeds of an arm; returns their folder."""
    order = [("user_id", "ascending"), ("position", "ascending")]
    tables = [pq.read_table(path).sort_by(order) for path in predictions]
    columns = {name: tables[0][name].to_numpy() for name in ("user_id", "position", "item_id", "label", "timestamp")}
    score = np.mean([table["score"].to_numpy() for table in tables], axis=0)
    columns |= {"score": score, "probability": 1 / (1 + np.exp(-score))}
    return write_predictions(columns, target, 0).parent


def results(output: Path, arms: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Metrics and differences of the arms."""
    runs = {arm: [output / f"{arm}-{seed}" / "predictions" / "test" for seed in seeds] for arm in arms}
    found: dict[str, Any] = {"seeds": {}}
    for index, seed in enumerate(seeds):
        one = compare({arm: paths[index] for arm, paths in runs.items()}, draws=0)
        found["seeds"][seed] = {arm: model["auc"] for arm, model in one["models"].items()} | {
            f"{arm} - {arms[0]}": pair["difference"] for arm, pair in one["paired"].items()
        }
    means = {arm: mean_of_seeds(own, output / "means" / arm) for arm, own in runs.items()}
    together = compare(means, draws=200)
    found["mean_score"] = {arm: model["auc"] for arm, model in together["models"].items()}
    found["paired"] = together["paired"]
    if "ordinal" in arms:
        stars = [pq.read_table(path) for path in runs["ordinal"]]
        found["mae_stars"] = [
            float(np.abs(one["prediction_stars"].to_numpy() - one["label_stars"].to_numpy()).mean()) for one in stars
        ]
    return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the arms that are not complete, and write the comparison; other options are passed to `hllm train`."""
    parser = experiment_parser(__doc__, None, seeds=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--path", help="folder of MovieLens-100k (default: fetched)")
    options, more = parser.parse_known_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    dataset = options.output / "dataset"
    source = ["--source", "ml-100k", "--stars", "--output", str(dataset)]
    source += ["--path", options.path] if options.path else []
    run_job("prepare", source, options.output / "prepare.log", dataset / "manifest.json")
    for seed in options.seeds:
        for arm in options.arms:
            run_arm(options.output, arm, seed, dataset, more)
    found = results(options.output, options.arms, options.seeds)
    (options.output / "ordinal.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return found


if __name__ == "__main__":
    main()
