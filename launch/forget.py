"""`hllm forget`: removes users and items from a dataset, and from the runs, stores and files made from it.

    hllm forget --dataset data/shop --user u7 --runs runs nights --stores stores
    hllm forget --dataset data/shop --users-file leavers.txt --runs runs --stores stores --erase
    hllm forget --dataset data/shop --item i31 --dry-run

The events of these users and items are removed from every version of the dataset, and later appends skip them. Below
the folders of --runs, --stores and --predictions, the command recognizes runs, nights, stores, predictions, indexes,
journals, event logs of services, clusters of users and titles by their contents, and prints the number of entries that
it found in each of them. Dense ids of other users and items do not change, and runs can still be loaded.

--erase also removes every byte: old files of the dataset, the rows of item tables and their optimizer state, and
deleted vectors. Then it searches all files for the raw ids. Without --erase, `hllm dataset prune` removes the old files
later. The source files from which the dataset was prepared are not changed: clean them yourself. If the command was
killed, repeat it.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hllm_torchrec.common.terminal import say
from hllm_torchrec.common.text_files import read_list
from hllm_torchrec.launch.entry import CommandParser, entry_point

if TYPE_CHECKING:  # `--help` needs no torch
    from hllm_torchrec.lifecycle.forgetting_job import JobReport


def build_parser() -> CommandParser:
    """Build the command line parser."""
    parser = CommandParser(prog="hllm forget", description=__doc__)
    parser.add_argument("--dataset", type=Path, required=True, metavar="DIR", help="dataset that forgets, or its URL")
    for name in ("user", "item"):
        parser.add_argument(f"--{name}", action="append", default=[], metavar="RAW", help=f"raw {name} id (repeatable)")
        parser.add_argument(f"--{name}s-file", type=Path, metavar="FILE", help=f"file of raw {name} ids, one per line")
    parser.add_argument("--runs", type=Path, nargs="+", default=[], metavar="DIR", help="folders with runs or nights")
    parser.add_argument("--stores", type=Path, nargs="+", default=[], metavar="DIR", help="folders with stores")
    predictions = "folders with predictions of exposures of this dataset, outside of its runs"
    parser.add_argument("--predictions", type=Path, nargs="+", default=[], metavar="DIR", help=predictions)
    parser.add_argument("--erase", action="store_true", help="remove every byte of the ids, then search for them")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and change nothing")
    return parser


def run(args: argparse.Namespace) -> int:
    """Forget the users and items, and print a report.

    Returns:
        1 if something was left unchanged or an id still exists in a file, else 0.

    Raises:
        ValueError: no ids are given, the dataset or a folder does not exist, or another process is writing to one.
    """
    from hllm_torchrec.data.forgetting import Names
    from hllm_torchrec.lifecycle.forgetting_job import forget_everywhere

    users, items = (
        [*getattr(args, name), *(read_list(file) if (file := getattr(args, f"{name}s_file")) else ())]
        for name in ("user", "item")
    )
    if not users and not items:
        raise ValueError("nothing to forget: name --user, --users-file, --item or --items-file")
    folders = [*args.runs, *args.stores]
    report = forget_everywhere(
        args.dataset, Names(users, items), folders, args.predictions, erase=args.erase, dry_run=args.dry_run
    )
    say(describe(report, args))
    return int(bool(report.left or report.remaining))


def describe(report: "JobReport", args: argparse.Namespace) -> str:
    """Text of the report: a line for the dataset, and one for each run, store or other folder that was found."""
    found = ", ".join(f"{number:,} {what}" for what, number in sorted(report.dataset.found.items()) if number)
    missing = sum(not number for one in report.dataset.numbers.values() for number in one.values())
    unknown = f"; {missing} ids it never had, which later appends leave out" if missing else ""
    version = "" if report.dataset.version is None else f"; version {report.dataset.version} is without them"
    freed = f"; {report.dataset.freed / 1e6:,.1f} MB removed" if report.dataset.freed else ""
    lines = ["dry run: nothing is changed"] if args.dry_run else []
    lines.append(f"{args.dataset}: {found or 'nothing found'}{unknown}{version}{freed}")
    for trace in report.traces:
        lines.append(
            f"{trace.place}: {trace.kind}: {trace.found:,} found" + (f"; LEFT: {trace.left}" * bool(trace.left))
        )
    lines += [f"{path}: one of the ids is STILL THERE: look into it" for path in report.remaining]
    if args.erase and not args.dry_run and not report.remaining and not report.left:
        lines.append("searched all files of these folders for the raw ids: none is left")
    return "\n".join(lines)


main = entry_point(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
