"""`hllm baselines`: fits the baselines, and scores them on the exposures on which models are evaluated.

It runs as a single process, or as ranks: torchrun --nproc_per_node 2 -m hllm_torchrec.launch.baselines --dataset ...
The defaults in configs/baselines/*.yaml are overridden by --config and by options such as --dlrm.lr 0.002;
`--print_config` prints all settings and exits.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from hllm_torchrec import configs
from hllm_torchrec.baselines.settings import BaselinesConfig
from hllm_torchrec.common.terminal import say
from hllm_torchrec.config.loading import load_dataclass
from hllm_torchrec.launch.entry import CommandParser, entry_point

NAMES = ("item_mean", "running_bias", "gaussian", "dlrm")


def build_parser() -> CommandParser:
    """Build the command line parser, without the settings of the baselines."""
    parser = CommandParser(prog="hllm baselines", description=__doc__, allow_abbrev=False)
    parser.add_baselines(Path("runs/baselines"), NAMES, help="directory written by hllm prepare")
    parser.add_argument("--config", nargs="+", default=[], metavar="FILE", help="YAML files with settings")
    return parser


def load_settings(files: list[str], options: list[str]) -> BaselinesConfig:
    """Load the packaged settings, overridden by those of `files` and then by `options` (`["--dlrm.lr", "0.002"]`).

    Raises:
        ConfigError: unknown keys or options, wrong types, values out of range.
    """
    folder = Path(configs.__file__).parent / "baselines"
    named = [f"--config={file}" for file in [*(folder / f"{name}.yaml" for name in NAMES), *files]]
    return load_dataclass(
        BaselinesConfig, [*named, *options], prog="hllm baselines", description="Settings of the baselines."
    )


def run(args: argparse.Namespace, options: list[str]) -> None:
    """Run the given baselines, and print their metrics.

    Raises:
        ValueError: settings or dataset are not usable.
    """
    settings = load_settings(args.config, options)
    from hllm_torchrec.baselines.runner import run_baseline
    from hllm_torchrec.data.dataset import Dataset
    from hllm_torchrec.distributed.coordination import run_on_rank_zero
    from hllm_torchrec.distributed.process_group import distributed_device

    dataset = Dataset.open(args.dataset)
    with distributed_device() as device:
        for name in args.only:
            is_new = run_baseline(name, settings, dataset, device, args.output / name)
            run_on_rank_zero(partial(say_done, args.output / name, is_new))
        print_tables(args.output, args.only)


def say_done(directory: Path, is_new: bool) -> None:
    """Print the directory of a model's predictions, whose name is the model's name."""
    status = "predictions written" if is_new else "reused, same data and settings"
    say(f"{directory.name}: {status}: {directory}")


def print_tables(output: Path, names: Sequence[str]) -> None:
    """Print the metrics of models on the validation and test part, compared with the first model. Collective.

    output: folder with a folder for each model in `names`.
    """
    from hllm_torchrec.distributed.coordination import rank
    from hllm_torchrec.evaluation.cached_predictions import SPLITS
    from hllm_torchrec.evaluation.model_comparison import compare, metrics_table

    for split in SPLITS:
        directories = {name: output / name / "predictions" / split for name in names}
        metrics = compare(directories, split=split, draws=200)
        if rank() == 0:
            say(metrics_table(metrics) + "\n")


main = entry_point(build_parser, run, takes_options=True)

if __name__ == "__main__":
    sys.exit(main())
