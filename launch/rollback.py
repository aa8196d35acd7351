"""`hllm rollback`: makes the release before the current one current again, or a named one.

    hllm rollback --folder nights
    hllm rollback --folder nights --to 2023-11-20

The alias FOLDER/current moves in one step, and FOLDER/previous names what was current. The next night starts from the
run that is current then. Repeated without --to, it does nothing more.
"""

import argparse
import sys
from pathlib import Path

from hllm_torchrec.launch.entry import CommandParser, entry_point


def build_parser() -> CommandParser:
    """Build the command line parser."""
    parser = CommandParser(prog="hllm rollback", description=__doc__)
    parser.add_argument("--folder", required=True, type=Path, help="folder of the nights (`folder` of night.yaml)")
    parser.add_argument("--to", metavar="NAME", help="release to make current (default: the previous one)")
    return parser


def run(args: argparse.Namespace) -> None:
    """Move the aliases, and print what is current.

    Raises:
        ValueError: nothing to go back to, or no such release.
    """
    from hllm_torchrec.lifecycle.releases import rollback

    before, after = rollback(args.folder, args.to)
    print(f"{args.folder / 'current'}: {after} (was {before})")


main = entry_point(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
