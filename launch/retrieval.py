"""`hllm retrieval`: fits and evaluates popularity, EASE and a decayed Markov chain on a leave-one-out dataset.

    hllm retrieval --dataset data/ml-100k-loo --output runs/retrieval

Settings are selected on the validation part and the test part is scored once. Each baseline gets a folder with
metrics.json in the layout of `hllm evaluate`. Options such as --ease_l2 "[100, 300]" change the grids;
--print_config prints all settings and exits.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from hllm_torchrec.common.terminal import say
from hllm_torchrec.config.loading import load_dataclass
from hllm_torchrec.launch.entry import CommandParser, entry_point


def build_parser() -> CommandParser:
    """Build the command line parser, without the grids."""
    from hllm_torchrec.baselines.settings import RETRIEVAL_NAMES

    parser = CommandParser(prog="hllm retrieval", description=__doc__, allow_abbrev=False)
    parser.add_baselines(Path("runs/retrieval"), RETRIEVAL_NAMES, help="dataset prepared with --split leave_one_out")
    return parser


def run(args: argparse.Namespace, options: list[str]) -> None:
    """Fit and evaluate the given baselines.

    Raises:
        ValueError: the grids or the dataset are not usable.
    """
    from hllm_torchrec.baselines.retrieval_baselines import run_retrieval_baseline
    from hllm_torchrec.baselines.settings import RetrievalBaselinesConfig
    from hllm_torchrec.config.eval_protocols import SPLIT_RULE
    from hllm_torchrec.data.dataset import Dataset
    from hllm_torchrec.data.predictions import save_predictions
    from hllm_torchrec.distributed.coordination import run_on_rank_zero
    from hllm_torchrec.distributed.process_group import distributed_device

    config = load_dataclass(
        RetrievalBaselinesConfig, options, prog="hllm retrieval", description="Grids of retrieval baselines."
    )
    dataset = Dataset.open(args.dataset)
    rule = dataset.manifest["split"]["rule"]
    if rule != SPLIT_RULE:
        raise ValueError(f"--dataset {args.dataset}: split by {rule!r}; prepare one with --split {SPLIT_RULE}")
    with distributed_device():
        for name in args.only:
            found = run_retrieval_baseline(name, dataset, config, partial(print, file=sys.stderr))
            save_predictions(found.pop("ranks"), args.output / name / "retrieval" / "test")
            run_on_rank_zero(partial(_write, args.output / name, name, found, dataset, config))


def _write(directory: Path, name: str, found: dict[str, Any], dataset: Any, config: Any) -> None:
    from hllm_torchrec.common.machine import machine_info
    from hllm_torchrec.evaluation.metrics_schema import retrieval_alone

    measured_as = {
        "protocol": None if config.positive_only or not config.filter_seen else "leave_one_out",
        "filter_seen": config.filter_seen,
        "targets": "positive" if config.positive_only else "all",
        "candidates": dataset.num_items - 1 - dataset.excluded_items.size,
    }
    provenance = {
        "settings": found["settings"],
        "tried": found["tried"],
        "dataset": {"name": dataset.name, "fingerprint": dataset.fingerprint},
        "machine": machine_info(),
    }
    directory.mkdir(parents=True, exist_ok=True)
    for split, file in (("valid", "metrics-valid.json"), ("test", "metrics.json")):
        metrics = retrieval_alone(split, found[split] | measured_as, provenance)
        (directory / file).write_text(json.dumps(metrics, indent=1, allow_nan=False))
    shown = ", ".join(
        f"{key} {value:.4f}" for key, value in found["test"].items() if key.startswith(("recall", "ndcg"))
    )
    say(f"{name} {found['settings']}: test, {found['test']['rows']} targets: {shown}")


main = entry_point(build_parser, run, takes_options=True)

if __name__ == "__main__":
    sys.exit(main())
