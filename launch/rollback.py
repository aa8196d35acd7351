"""`hllm rollback`: makes the previous release, or a named one, the current release.

    hllm rollback --folder nights
    hllm rollback --folder nights --to 2023-11-20

The alias FOLDER/current moves in one step, and FOLDER/previous then names the release that was current. The next night
starts from the run of the current release. A second rollback without --to changes nothing.
"""

import argparse
import sys
from pathlib import Path

from hllm_torchrec.common.terminal import say
from hllm_torchrec.launch.entry import CommandParser, entry_point


def build_parser() -> CommandParser:
    """Build the command line parser."""
    parser = CommandParser(prog="hllm rollback", description=__doc__)
    parser.add_argument("--folder", required=True, type=Path, help="folder of the nights (`folder` of night.yaml)")
    parser.add_argument("--to", metavar="NAME", help="release to make current (default: the previous one)")
    return parser


def run(args: argparse.Namespace) -> None:
    """Move the aliases, and print the current release.

    Raises:
        ValueError: there is no other release, or none with the given name.
    """
    from hllm_torchrec.lifecycle.releases import rollback

    before, after = rollback(args.folder, args.to)
    say(f"{args.folder / 'current'}: {after} (was {before})")


main = entry_point(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
