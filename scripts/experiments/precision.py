"""Effect of `parallel.precision: bf16` on quality: the same configurations in fp32 and in bf16, with the same seeds.

    python scripts/experiments/precision.py --output runs/precision

It needs a processor with bf16, `data/ml-100k`, `data/ml-100k-loo` and the configurations' models (`hllm fetch`). Jobs
are trained one after the other, a seed at a time, each in a separate directory, so the script can be stopped and
started again; with --done it runs no jobs. Each run's test part is scored once.

Prints, for each configuration, its metric in both precisions (mean and standard deviation over seeds) and the paired
difference bf16 minus fp32 (mean over seeds, 95% interval over users), and writes OUTPUT/precision.json.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jobs import ROOT, experiment_parser, train_and_evaluate

from hllm_torchrec.common.run_log import read_log
from hllm_torchrec.data.predictions import read_predictions
from hllm_torchrec.evaluation.retrieval_comparison import compare_models
from hllm_torchrec.metrics.auc import roc_auc
from hllm_torchrec.metrics.bootstrap import percentile_interval, user_bootstrap

CONFIGS = {
    "recipes/ranking": "auc",
    "ml100k/trained": "auc",
    "retrieval/hllm": "ndcg@10",
}
"""Configuration -> its metric. The first has a frozen sentence encoder, the others train their Item LLM."""
PRECISIONS = ("fp32", "bf16")
DATASET = {"recipes/ranking": ("--data.dataset", "data/ml-100k")}
"""Options of the configurations that name no dataset."""


def run_directory(output: Path, name: str, precision: str, seed: int) -> Path:
    """Directory of a run."""
    return output / f"{name.replace('/', '-')}-{precision}-{seed}"


def train_and_score(output: Path, name: str, precision: str, seed: int) -> None:
    """Train a run and score its test part, unless this is done."""
    run = run_directory(output, name, precision, seed)
    options = ["--config", str(ROOT / "configs" / f"{name}.yaml"), *DATASET.get(name, ())]
    train_and_evaluate(run, seed, run.with_suffix(".log"), *options, "--parallel.precision", precision)


def step_seconds(run: Path) -> float:
    """Median seconds of a logged step of the first stage: only there a trained Item LLM has gradients."""
    steps = [line for line in read_log(run) if line["event"] == "step"]
    return float(np.median([line["seconds"] for line in steps if line["stage"] == steps[0]["stage"]]))


def compare_auc(runs: dict[str, Sequence[Path]]) -> tuple[dict[str, list[float]], list[float]]:
    """AUC of every run by precision, and the paired difference: mean, low, high."""
    rows = {(p, i): read_predictions(run / "predictions" / "test") for p in runs for i, run in enumerate(runs[p])}
    values = {p: [roc_auc(rows[p, i].label, rows[p, i].score) for i in range(len(runs[p]))] for p in runs}
    first = rows["fp32", 0]  # labels and users are the same in all runs
    draws = user_bootstrap(first.label, {f"{p}{i}": one.score for (p, i), one in rows.items()}, first.user_id)
    paired = np.mean([draws[f"bf16{i}"] - draws[f"fp32{i}"] for i in range(len(runs["fp32"]))], axis=0)
    return values, [float(np.mean(values["bf16"]) - np.mean(values["fp32"])), *percentile_interval(paired)]


def compare_ranks(runs: dict[str, Sequence[Path]], metric: str) -> tuple[dict[str, list[float]], list[float]]:
    """A retrieval metric of every run by precision, and the paired difference: mean, low, high."""
    ranks = {p: [run / "retrieval" / "test" for run in runs[p]] for p in runs}
    one = compare_models(ranks, [metric], "fp32")["bf16"]["difference"][metric]
    values = {
        p: [float(json.loads((run / "metrics.json").read_text())["retrieval"][metric]) for run in runs[p]] for p in runs
    }
    return values, [one.mean, one.low, one.high]


def compare(output: Path, name: str, seeds: Sequence[int]) -> dict[str, Any] | None:
    """Result of a configuration for the seeds that are complete in both precisions; None if there is none."""
    both = {p: [run_directory(output, name, p, seed) for seed in seeds] for p in PRECISIONS}
    complete = [i for i in range(len(seeds)) if all((both[p][i] / "metrics.json").is_file() for p in PRECISIONS)]
    if not complete:
        return None
    runs: dict[str, Sequence[Path]] = {p: [both[p][i] for i in complete] for p in PRECISIONS}
    metric = CONFIGS[name]
    values, difference = compare_auc(runs) if metric == "auc" else compare_ranks(runs, metric)
    seconds = {p: [step_seconds(run) for run in runs[p]] for p in PRECISIONS}
    return {
        "metric": metric, "seeds": [seeds[i] for i in complete], "values": values,
        "bf16_minus_fp32": difference, "step_seconds": seconds,
    }  # fmt: skip


def markdown(found: dict[str, dict[str, Any]]) -> str:
    """The table of the configurations, in Markdown."""
    lines = ["| configuration | metric | seeds | fp32 | bf16 | bf16 minus fp32 [95%, users] |", "|---" * 6 + "|"]
    for name, one in found.items():
        cells = []
        for precision in PRECISIONS:
            values = one["values"][precision]
            spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.4f}{spread}")
        mean, low, high = one["bf16_minus_fp32"]
        cells.append(f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]")
        lines.append(f"| `{name}` | {one['metric']} | {len(one['seeds'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing; write the JSON and print the table of the complete runs after each seed."""
    parser = experiment_parser(__doc__, "precision", seeds=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=CONFIGS, default=list(CONFIGS), metavar="CONFIGURATION")
    parser.add_argument("--done", action="store_true", help="run nothing, tabulate what is complete")
    options = parser.parse_args(arguments)
    output = options.output.absolute()
    for seed in options.seeds[:1] if options.done else options.seeds:
        for name in () if options.done else options.only:
            for precision in PRECISIONS:
                train_and_score(output, name, precision, seed)
        found = {name: one for name in options.only if (one := compare(output, name, options.seeds))}
        (output / "precision.json").write_text(json.dumps(found, indent=1))
        print(markdown(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
