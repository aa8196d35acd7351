"""`hllm adopt`: records the ids that a run of an earlier version was trained with, so that later jobs can check them.

    hllm adopt --run runs/quickstart --dataset data/ml-100k

The dataset must be the one on which the run was trained, or a later version of it. Checkpoints written by this version
of the library have the record already.
"""

import argparse
import sys
from pathlib import Path

from hllm_torchrec.common.terminal import say
from hllm_torchrec.launch.entry import CommandParser, entry_point


def build_parser() -> CommandParser:
    """Build the command line parser."""
    parser = CommandParser(prog="hllm adopt", description=__doc__)
    parser.add_run(checkpoint=False)
    parser.add_argument("--dataset", type=Path, required=True, metavar="DIR", help="the run's dataset")
    return parser


def run(args: argparse.Namespace) -> None:
    """Write the record into the run, and print how many ids of each kind it has.

    Raises:
        ValueError: the run or dataset does not exist, or the dataset does not fit the run.
    """
    from hllm_torchrec.checkpoint.remote_runs import RunStorage, local_run
    from hllm_torchrec.common.urls import url_of
    from hllm_torchrec.evaluation.adoption import adopt

    storage = RunStorage(local_run(args.run, "latest"), url_of(args.run))
    marks = adopt(storage.folder, args.dataset)
    storage.publish()
    say(f"{args.run}: {', '.join(f'{mark.count:,} {name}' for name, mark in marks.items())}")


main = entry_point(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
