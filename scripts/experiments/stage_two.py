"""Two comparisons for stage II: AUC by length of histories, and frozen item embeddings against full training.

    python scripts/experiments/stage_two.py --stage-one runs/stages/seed-0 --output runs/stage-two [--epochs 3]

Every variant starts from the same stage I (`--stage-one` has 1/ and item-embeddings/, as written by
scripts/experiments/three_stages.sh), with about the same number of exposures per step and the same number of epochs.
`full` continues to train the Item LLM (a tenth of a step's items have gradients), `stored` reads item embeddings from
the store, and `adapter` adds a trained bottleneck to the stored ones. Each run has a separate directory, so the script
can be stopped and started again.
"""

import json
import sys
from pathlib import Path
from typing import Any

from jobs import ROOT, experiment_parser, train_and_evaluate

from hllm_torchrec.common.run_log import read_log
from hllm_torchrec.evaluation.model_comparison import compare, format_with_interval

VARIANTS = {
    "length_20": ["--data.max_history=20", "--data.batch_users=51"],
    "length_50": ["--data.max_history=50", "--data.batch_users=20"],
    "stored": [],
    "length_150": ["--data.max_history=150", "--data.batch_users=7"],
    "all": ["--data.max_history=1024", "--data.batch_users=5"],
    "adapter": ["--item_llm.adapter=64"],
    "full": ["--item_llm.store=null", "--item_llm.trained_share=0.1"],
}
"""Name -> options that override configs/stages/2.yaml; batch_users makes the numbers of exposures per step similar."""
REFERENCE = "stored"


def options_of(name: str, epochs: float) -> list[str]:
    """Options of a variant that is trained for `epochs` epochs."""
    source = "trained" if name == "full" else "stored"
    stages = json.dumps([{"name": name, "epochs": epochs, "item_embeddings": source}])
    return [*VARIANTS[name], f"--stages={stages}"]


def run_variant(name: str, stage_one: Path, output: Path, seed: int, epochs: float) -> Path:
    """Train and evaluate a variant, if not done; return its run directory, with predictions of the test part."""
    run = output / name
    start = ["--start_from", str(stage_one / "1"), f"--item_llm.store={stage_one / 'item-embeddings'}"]
    config = ["--config", str(ROOT / "configs" / "stages" / "2.yaml"), *start, *options_of(name, epochs)]
    train_and_evaluate(run, seed, run / "output.log", *config)
    return run


def best_validation(run: Path) -> float:
    """The best validation AUC in the run's log."""
    return max(line["auc"] for line in read_log(run) if line["event"] == "eval")


def markdown(metrics: dict[str, Any], runs: dict[str, Path]) -> str:
    """A line for each variant."""
    lines = ["| variant | validation AUC | test AUC | test AUC - stored [95% by users] |", "|---|---|---|---|"]
    for name, run in runs.items():
        one, paired = metrics["models"][name], metrics["paired"].get(name)
        difference = "–"
        if paired is not None:
            low, high = paired["bootstrap_low"], paired["bootstrap_high"]
            difference = format_with_interval(paired["difference"], low, high, signed=True)
        lines.append(f"| {name} | {best_validation(run):.4f} | {one['auc']:.4f} | {difference} |")
    return "\n".join(lines)


def main() -> int:
    """Run what is missing and print the table."""
    parser = experiment_parser(__doc__, "stage-two")
    parser.add_argument("--stage-one", type=Path, required=True, help="folder with 1/ and item-embeddings/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="VARIANT")
    options = parser.parse_args()
    names = [name for name in VARIANTS if name in {REFERENCE, *options.only}]
    stage_one, output = options.stage_one.absolute(), options.output.absolute()
    runs = {name: run_variant(name, stage_one, output, options.seed, options.epochs) for name in names}
    metrics = compare({name: run / "predictions" / "test" for name, run in runs.items()})
    print(markdown(metrics, runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
