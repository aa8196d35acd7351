"""The ranking task of `benchmark.py`: the unchanged recipe on every dataset, against baselines on the same exposures.

    python scripts/experiments/benchmark_ranking.py --sets data/ml-100k data/ml_small --output runs/benchmark

A set is a dataset with labels, written by `hllm prepare` (splits time and leave_last). The models are
configs/recipes/ranking.yaml (`hybrid`), the same without IDs, item factors and evidence (`text`), and all of
`hllm baselines`; no settings are tuned. Every job has a separate directory, so the script can be stopped and started
again; with --done it runs no jobs.

Writes OUTPUT/ranking.json: for each set and seed the AUC, GAUC and log loss of every model, the hybrid's AUC minus each
baseline's with a 95% interval over users, and AUC by the item's number of training events; prints the tables of
docs/results.md.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jobs import ROOT, experiment_parser, run_job

from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.predictions import read_predictions
from hllm_torchrec.metrics.auc import roc_auc

RECIPE = ROOT / "configs" / "recipes" / "ranking.yaml"
BASELINES = ("item_mean", "running_bias", "gaussian", "dlrm")
TEXT_ALONE = ("--data.evidence=[]", "--data.item_vectors=[]", "--features.item_id=false", "--evaluation.at_start=false")
MODELS = {"hybrid": (), "text": TEXT_ALONE}
"""Model -> options that differ from the recipe."""
COUNTS = {"0": (0, 0), "1-5": (1, 5), "6-20": (6, 20), "> 20": (21, sys.maxsize)}
"""Name of a group of items -> range of their numbers of training events."""


def run_set(
    dataset: Path,
    folder: Path,
    models: Sequence[str],
    baselines: Sequence[str],
    seeds: Sequence[int],
    more: list[str],
) -> None:
    """Run the training and evaluation jobs that are not complete; more: options of the training jobs."""
    for name in baselines:
        options = ["--dataset", str(dataset), "--output", str(folder), "--only", name]
        run_job("baselines", options, folder / f"{name}.log", folder / name / "predictions" / "test")
    for model in models:
        for seed in seeds:
            run = folder / model / f"seed-{seed}"
            common = ["--config", str(RECIPE), "--data.dataset", str(dataset), "--output", str(run), "--resume", "true"]
            done, log = run / "metrics.json", run.with_suffix(".log")
            run_job("train", [*common, "--seed", str(seed), *MODELS[model], *more], log, run / "trained")
            (run / "trained").touch()
            compared = [str(folder / name) for name in baselines] if model == "hybrid" else []
            options = ["--run-dir", str(run), *(["--compare", *compared] if compared else []), "--draws", "0"]
            run_job("evaluate", [*options, "--no-tensorboard"], log, done)


def figures(folder: Path, models: Sequence[str], seeds: Sequence[int], dataset: Dataset) -> dict[str, Any]:
    """Model -> seed -> metrics of the test part, for the runs that are complete."""
    found: dict[str, Any] = {}
    for model in models:
        for seed in seeds:
            run = folder / model / f"seed-{seed}"
            if not (run / "metrics.json").exists():
                continue
            metrics = json.loads((run / "metrics.json").read_text())
            for name, block in metrics["models"].items():
                label = model if name == metrics["reference"] else name
                one = {key: block[key] for key in ("auc", "gauc", "log_loss")}
                if pair := metrics["paired"].get(name):
                    low, high = (pair[f"clustered_{end}"] for end in ("low", "high"))
                    one |= {"hybrid_minus": -pair["difference"], "low": _negative(high), "high": _negative(low)}
                predictions = run if label == model else folder / name
                one["by_item_events"] = by_count(predictions / "predictions" / "test", dataset)
                found.setdefault(label, {})[str(seed)] = one
    return found


def _negative(value: float | None) -> float | None:
    return None if value is None else -value


def by_count(predictions: Path, dataset: Dataset) -> dict[str, dict[str, float | int | None]]:
    """AUC and number of exposures by the item's number of training events."""
    rows = read_predictions(predictions)
    counts = dataset.training_item_counts()[rows.item_id]
    found = {}
    for name, (low, high) in COUNTS.items():
        chosen = (counts >= low) & (counts <= high)
        auc = roc_auc(rows.label[chosen], rows.score[chosen]) if chosen.any() else np.nan
        found[name] = {"exposures": int(chosen.sum()), "auc": None if np.isnan(auc) else auc}
    return found


def markdown(name: str, found: dict[str, Any]) -> str:
    """The table of a set: AUC and GAUC are means over seeds; all other columns are of the first seed."""
    groups = list(COUNTS)
    sliced_by = " | ".join(f"AUC of items with {group} training events" for group in groups)
    lines = [
        f"| {name} | seeds | AUC | GAUC | hybrid's AUC minus this model's | {sliced_by} |",
        "|---" * (5 + len(groups)) + "|",
    ]
    for model, seeds in found.items():
        first, means = (
            next(iter(seeds.values())),
            [np.mean([s[key] for s in seeds.values()]) for key in ("auc", "gauc")],
        )
        difference = "" if "hybrid_minus" not in first else f"{first['hybrid_minus']:+.4f}"
        if first.get("low") is not None:
            difference += f" [{first['low']:+.4f}, {first['high']:+.4f}]"
        sliced = [first["by_item_events"][group]["auc"] for group in groups]
        cells = [f"{mean:.4f}" for mean in means] + [difference, *("–" if x is None else f"{x:.4f}" for x in sliced)]
        lines.append(f"| {model} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, set by set; write the JSON after each, and print the tables."""
    parser = experiment_parser(__doc__, "benchmark", seeds=[0, 1, 2])
    parser.add_argument("--sets", nargs="+", type=Path, required=True, help="directories of datasets with labels")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--baselines", nargs="*", choices=BASELINES, default=list(BASELINES), metavar="NAME")
    parser.add_argument("--options", nargs="*", default=[], metavar="FIELD=VALUE", help="of all trainings")
    parser.add_argument("--done", action="store_true", help="run nothing, tabulate what is complete")
    options = parser.parse_args(arguments)
    output, report = options.output.absolute(), {}
    for path in options.sets:
        dataset, folder = path.absolute(), output / path.name
        if not options.done:
            more = [f"--{option}" for option in options.options]
            run_set(dataset, folder, options.only, options.baselines, options.seeds, more)
        report[path.name] = figures(folder, options.only, options.seeds, Dataset.open(dataset))
        if report[path.name]:
            (output / "ranking.json").write_text(json.dumps(report, indent=1))
            print(markdown(path.name, report[path.name]), end="\n\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
