"""The retrieval table of docs/results.md: trains every configuration with every seed, and evaluates each run once.

    python scripts/experiments/retrieval_table.py --output runs/retrieval [--only sasrec hstu] [--seeds 0 1 2]

Models are the configurations of configs/retrieval named by --only; popularity, EASE and the Markov chain are computed
by `hllm retrieval`; --others names models that another program has trained into OUTPUT/NAME-SEED (see
`scripts/experiments/compare_rectools.py`). Each run has a separate directory, so the script can be stopped and started
again; with --done it trains no model and tabulates the runs that are complete (and the baselines, which it computes if
they are missing). A second table has the paired differences of NDCG@10 from each of the --references. Options after
`--` are passed to every training (`-- --data.dataset elsewhere`).
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jobs import ROOT, experiment_parser, run_job, train_and_evaluate

from hllm_torchrec.config.loading import load_config
from hllm_torchrec.evaluation.retrieval_comparison import (
    MetricEstimate,
    compare_models,
    markdown,
    markdown_of_differences,
)

CONFIGS = ROOT / "configs" / "retrieval"
BASELINES = ("popularity", "ease", "markov")
MODELS = (
    *("sasrec", "esasrec", "hstu", "hstu_large", "llama_id"),
    *("hllm", "hllm_id", "hllm_id_time", "hllm_hstu", "learn"),
)
METRICS = ("recall@10", "ndcg@10", "recall@50", "ndcg@50", "recall@200", "ndcg@200")


def run_model(name: str, seed: int, output: Path, more: list[str]) -> Path:
    """Train and evaluate one model with one seed, if not done; return the folder of the test targets' ranks."""
    run = output / f"{name}-{seed}"
    train_and_evaluate(run, seed, run / "output.log", "--config", str(CONFIGS / f"{name}.yaml"), *more)
    return run / "retrieval" / "test"


def run_baselines(output: Path, dataset: str) -> dict[str, list[Path]]:
    """Run the baselines, if not done; return the folders of the test targets' ranks."""
    if not all((output / name / "metrics.json").is_file() for name in BASELINES):
        run_job("retrieval", ["--dataset", dataset, "--output", str(output)], output / "baselines.log")
    return {name: [output / name / "retrieval" / "test"] for name in BASELINES}


def finished(output: Path, names: list[str], seeds: list[int]) -> dict[str, list[Path]]:
    """Model -> folders of the ranks of its complete runs; models without complete runs are left out."""
    paths = {name: [output / f"{name}-{seed}" for seed in seeds] for name in names}
    found = {
        name: [run / "retrieval" / "test" for run in runs if (run / "metrics.json").is_file()]
        for name, runs in paths.items()
    }
    return {name: runs for name, runs in found.items() if runs}


def as_json(figures: Mapping[str, MetricEstimate]) -> dict[str, dict[str, float | None]]:
    """Metric -> the fields of its estimate."""
    return {metric: dataclasses.asdict(figure) for metric, figure in figures.items()}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = experiment_parser(__doc__, "retrieval", seeds=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=list(MODELS), help="configurations of configs/retrieval")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one process each")
    parser.add_argument("--others", nargs="+", default=[], help="models trained elsewhere into OUTPUT/NAME-SEED")
    references = ["sasrec", "hstu", "llama_id", "markov"]
    parser.add_argument("--references", nargs="+", default=references, help="models that all are compared with")
    parser.add_argument("--done", action="store_true", help="train nothing, tabulate what is complete")
    parser.add_argument("more", nargs="*", help="options of every training, after --")
    return parser.parse_args()


def main() -> int:
    """Run what is missing, then write `retrieval.json` and print the table."""
    options = parse()
    options.output = options.output.resolve()
    dataset = load_config(["--config", str(CONFIGS / f"{options.only[0]}.yaml"), *options.more]).data.dataset
    models = run_baselines(options.output, dataset)
    jobs = [] if options.done else [(name, seed) for seed in options.seeds for name in options.only]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda job: run_model(*job, options.output, options.more), jobs))
    models |= finished(options.output, [*options.others, *options.only], options.seeds)
    references = [name for name in options.references if name in models] or list(models)[:1]
    found = {reference: compare_models(models, METRICS, reference) for reference in references}
    runs = {name: len(paths) for name, paths in models.items()}
    first = found[references[0]]
    values = {name: as_json(row["value"]) for name, row in first.items()}
    minus = {ref: {name: as_json(row["difference"]) for name, row in rows.items()} for ref, rows in found.items()}
    (options.output / "retrieval.json").write_text(
        json.dumps({"runs": runs, "models": values, "minus": minus}, indent=1)
    )
    print(markdown(first))
    print()
    print(markdown_of_differences(found, "ndcg@10"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
