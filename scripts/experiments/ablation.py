"""The ablation table of docs/results.md: trains, evaluates and compares every variant with every seed.

    python scripts/experiments/ablation.py --output runs/ablation [--only late early] [--seeds 0 1 2] [--jobs 2]

A variant is a configuration of configs/ml100k, or one with the options of a suffix: early_generative is early with the
generative loss (lambda 0.1), so that it also has Recall and NDCG. A question compares two variants. Each run has a
separate directory, so the script can be stopped and started again. Differences are means over seeds of paired
differences on the same exposures; their 95% intervals resample users (exposures of one user are not independent).
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jobs import ROOT, experiment_parser, train_and_evaluate

from hllm_torchrec.data.predictions import read_predictions
from hllm_torchrec.metrics.bootstrap import percentile_interval, user_bootstrap

CONFIGS = ROOT / "configs" / "ml100k"

SUFFIXES = {
    "_generative": ["--objective.generative_weight=0.1", "--objective.negatives=256", "--evaluation.retrieval=true"],
    "_quarter": ["--item_llm.trained_share=0.25", "--item_llm.refresh_after=20"],
}

QUESTIONS = {
    "early against late fusion": ("early", "late"),
    "generative loss (lambda 0.1) against none": ("early_generative", "early"),
    "timestamps against none": ("timestamps", "early"),
    "item IDs and factors against text alone": ("early", "no_id"),
    "factors against IDs learned from scratch": ("early", "no_factors"),
    "text against IDs alone": ("early", "no_text"),
    "trained against frozen Item LLM": ("trained", "early"),
    "pretrained against scratch Item LLM": ("trained", "scratch"),
    "a quarter of a step's items trained against all": ("trained_quarter", "trained"),
}


def run_variant(variant: str, seed: int, output: Path) -> Path:
    """Train and evaluate one variant with one seed, if not done; return the run directory."""
    run = output / f"{variant}-{seed}"
    train_and_evaluate(run, seed, run / "output.log", *configuration(variant))
    return run


def configuration(variant: str) -> list[str]:
    """Command-line options of a variant."""
    for suffix, options in SUFFIXES.items():
        if variant.endswith(suffix):
            return configuration(variant.removesuffix(suffix)) + options
    return ["--config", str(CONFIGS / f"{variant}.yaml")]


def summarise(runs: dict[tuple[str, int], Path], seeds: list[int]) -> dict:
    """AUC and retrieval metrics of every variant (mean and standard deviation over seeds), and answers to QUESTIONS."""
    variants = sorted({variant for variant, _ in runs})
    scored = {key: read_predictions(run / "predictions" / "test") for key, run in runs.items() if has_auc(run)}
    first = next(iter(scored.values()))  # labels and users are the same in all runs
    draws = user_bootstrap(first.label, {f"{v}/{s}": p.score for (v, s), p in scored.items()}, first.user_id)
    table, answers = {}, {}
    for variant in variants:
        rows = [json.loads((runs[variant, seed] / "metrics.json").read_text()) for seed in seeds]
        table[variant] = {
            name: mean_and_deviation([pick(row, name) for row in rows]) for name in ("auc", "recall@10", "ndcg@10")
        }
    for question, (a, b) in QUESTIONS.items():
        if all((v, s) in scored for v in (a, b) for s in seeds):
            paired = np.mean([draws[f"{a}/{s}"] - draws[f"{b}/{s}"] for s in seeds], axis=0)
            low, high = percentile_interval(paired)
            answers[question] = {
                "a": a,
                "b": b,
                "difference": table[a]["auc"]["mean"] - table[b]["auc"]["mean"],
                "low": low,
                "high": high,
            }
    return {"seeds": seeds, "variants": table, "questions": answers}


def has_auc(run: Path) -> bool:
    """True if the run scores exposures (generative-only runs do not)."""
    return (run / "predictions" / "test").is_dir()


def pick(metrics: dict, name: str) -> float | None:
    """AUC or a retrieval metric of the run itself, not of the models it is compared with."""
    if name == "auc":
        models = metrics.get("models") or {}
        return models[metrics["reference"]]["auc"] if models else None
    return (metrics.get("retrieval") or {}).get(name)


def mean_and_deviation(values: list[float | None]) -> dict[str, float] | None:
    """Mean and standard deviation over seeds; None if the variant does not have the metric."""
    known = [v for v in values if v is not None]
    if not known:
        return None
    return {"mean": float(np.mean(known)), "deviation": float(np.std(known, ddof=1 if len(known) > 1 else 0))}


def markdown(summary: dict) -> str:
    """Two tables in Markdown: the variants, and the answers to QUESTIONS."""
    lines = ["| variant | test AUC | Recall@10 | NDCG@10 |", "|---|---|---|---|"]
    for variant, row in summary["variants"].items():
        cells = [
            f"{row[n]['mean']:.4f} ± {row[n]['deviation']:.4f}" if row[n] else "–"
            for n in ("auc", "recall@10", "ndcg@10")
        ]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    lines += ["", "| question | AUC difference | 95% interval over users |", "|---|---|---|"]
    for question, answer in summary["questions"].items():
        lines.append(f"| {question} | {answer['difference']:+.4f} | {answer['low']:+.4f} to {answer['high']:+.4f} |")
    return "\n".join(lines)


def every_variant() -> list[str]:
    """Every configuration, those with a head and texts also with the suffix _generative, and the _quarter variants."""
    names = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    both = [f"{name}_generative" for name in names if name not in ("generative", "no_text")]
    return [*names, *both, "trained_quarter", "trained_quarter_generative"]


def main() -> int:
    """Run what is missing, then write `ablation.json` and print the tables."""
    parser = experiment_parser(__doc__, "ablation", seeds=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=every_variant(), help="variants (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one process each")
    options = parser.parse_args()
    jobs = [(variant, seed) for seed in options.seeds for variant in options.only]
    with ThreadPoolExecutor(options.jobs) as pool:
        done = pool.map(lambda job: run_variant(*job, options.output), jobs)
        runs = dict(zip(jobs, done, strict=True))
    summary = summarise(runs, options.seeds)
    (options.output / "ablation.json").write_text(json.dumps(summary, indent=2))
    print(markdown(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
