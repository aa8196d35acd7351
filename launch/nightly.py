"""`hllm nightly`: nightly training as one job: appends the day's events, trains on them, compares, and publishes.

    hllm nightly --config night.yaml
    hllm nightly --config night.yaml --night 2023-11-22 --steps train evaluate
    torchrun --nproc_per_node 2 -m hllm_torchrec.launch.nightly --config night.yaml

Steps, in order: append (write a new version of the dataset, and hold out the latest of its new events), train (start
from the published run, and train on the events that are new to it), evaluate (both models on the same new exposures),
gate (decide from the comparison), embed (write changed vectors into the stores), publish (move the alias
FOLDER/current). Steps that are complete are not repeated, so a job that was killed is continued by the same command.
`hllm rollback` makes an earlier release current again.

exit status: 0; 2 after a user error; 3 if the gate refused the night's model, which is then not published.
"""

import argparse
import sys
from pathlib import Path

from hllm_torchrec.common.terminal import say
from hllm_torchrec.launch.entry import CommandParser, entry_point

STEPS = ("append", "train", "evaluate", "gate", "embed", "publish")
REJECTED = 3


def build_parser() -> CommandParser:
    """Build the command line parser, without the fields of the configuration."""
    parser = CommandParser(prog="hllm nightly", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--config",
        required=True,
        type=Path,
        help="configuration of the nightly job (YAML); options override its fields",
    )
    night_help = "name of the night (default: the oldest that was begun and not finished, else today's date, UTC)"
    parser.add_argument("--night", metavar="NAME", help=night_help)
    parser.add_argument(
        "--steps",
        nargs="+",
        choices=STEPS,
        default=STEPS,
        metavar="STEP",
        help=f"steps to run, some of {', '.join(STEPS)}",
    )
    return parser


def run(args: argparse.Namespace, options: list[str]) -> int:
    """Run the remaining steps of the night; returns the exit status.

    Raises:
        ValueError: the configuration, or an input of a step, is not usable.
    """
    from hllm_torchrec.config.loading import load_dataclass
    from hllm_torchrec.lifecycle.night_config import NightConfig

    given = [f"--config={args.config}", *options]
    config = load_dataclass(NightConfig, given, prog="hllm nightly", description="Run the nightly job.")
    for increment in (False, True):
        config.train_config({}, increment=increment)  # report errors before large imports

    from hllm_torchrec.distributed.coordination import rank
    from hllm_torchrec.distributed.process_group import distributed_device
    from hllm_torchrec.lifecycle.nightly import run_night

    with distributed_device(config.timeout) as device:
        show = rank() == 0
        state = run_night(config, args.night, device, args.steps, lambda text: say(text) if show else None)
    return REJECTED if state.is_rejected else 0


main = entry_point(build_parser, run, takes_options=True)

if __name__ == "__main__":
    sys.exit(main())
