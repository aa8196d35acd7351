"""`hllm seal`: checks the files of a dataset that another program wrote, and writes the manifest."""

import argparse
import logging
from pathlib import Path

from hllm_torchrec.common.terminal import say
from hllm_torchrec.data import sealing
from hllm_torchrec.launch.entry import CommandParser, entry_point
from hllm_torchrec.launch.prepare import summary

EXAMPLES = f"""{sealing.__doc__}
examples:
  hllm seal data/from-spark"""


def build_parser() -> CommandParser:
    """Build the command line parser."""
    parser = CommandParser(prog="hllm seal", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("dataset", type=Path, help="folder with the files and contract.yaml")
    return parser


def run(args: argparse.Namespace) -> None:
    """Check the files, write the manifest, and print its counts.

    Raises:
        ValueError, OSError: a file breaks a rule, or cannot be read.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    say(summary(sealing.seal(args.dataset).root))


main = entry_point(build_parser, run)

if __name__ == "__main__":
    raise SystemExit(main())
