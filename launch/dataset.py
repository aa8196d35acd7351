"""`hllm dataset`: shows a dataset's versions, folds appended ones, removes old ones."""

import argparse
import datetime
import logging
from pathlib import Path

import numpy as np

from hllm_torchrec.common.terminal import say
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.dataset_compaction import compact
from hllm_torchrec.data.manifest import chain_base, listed_files, read_manifest
from hllm_torchrec.data.pins import pinned_versions, remove_stale_pins
from hllm_torchrec.data.split import SPLITS
from hllm_torchrec.data.tombstones import ITEMS, USERS, Tombstones
from hllm_torchrec.data.versions import kept_versions, remove_superseded, remove_versions, write_lock
from hllm_torchrec.launch.entry import CommandParser, entry_point

EXAMPLES = """examples:
  hllm dataset info data/shop
  hllm dataset compact data/shop
  hllm dataset prune data/shop"""

ACTIONS = {
    "info": "print the versions, what each added, which runs pin it, and the parts of the newest",
    "compact": "write a version in which all appended events are in one base",
    "prune": "remove the versions that no run pins, except the newest, and old files with forgotten ids",
}


def build_parser() -> CommandParser:
    """Build the command line parser."""
    parser = CommandParser(prog="hllm dataset", description=__doc__, epilog=EXAMPLES)
    actions = parser.add_subparsers(dest="action", required=True)
    for name, text in ACTIONS.items():
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("dataset", type=Path, help="dataset directory")
    return parser


def info(root: Path) -> str:
    """Text about the versions of a dataset and the parts of the newest."""
    dataset = Dataset.open(root)
    pins, lines = pinned_versions(root), []
    for version, manifest in kept_versions(root).items():
        counts, appends = manifest["counts"], manifest.get("appends", [])
        size = sum(facts["bytes"] for facts in listed_files(manifest).values())
        what = f"{counts['events']:,} events, {counts['users']:,} users, {counts['items']:,} items"
        if appends and appends[-1]["version"] == version:
            what += f"; +{manifest['added']['events']:,} events"
        gone = Tombstones.read(root, manifest)
        what += "".join(f"; {n.size:,} {name} forgotten" for name in (USERS, ITEMS) if (n := gone.numbers(name)).size)
        runs = "".join(f"; pinned by {run}" for run in pins.get(version, ()))
        lines.append(f"version {version}: {what}; {len(appends)} appends, {size / 1e6:,.1f} MB{runs}")
    lines.append(f"of version {dataset.version}:")
    for part in SPLITS:
        lines.append(f"  {part}: {part_facts(dataset, part)}")
    first, last = (_moment(second) for second in dataset.manifest.get("seconds", (0, 0)))
    return "\n".join([*lines, f"  events from {first} to {last}"] if "seconds" in dataset.manifest else lines)


def part_facts(dataset: Dataset, part: str) -> str:
    """Number of events, users and positive labels of a part, in words."""
    events = users = exposures = positives = 0
    for group in dataset.row_groups(part):
        rows = dataset.sequences([group], ["user_id", "target_start", "labels"])
        labels = rows.labels[rows.own_events]
        users += rows.user_ids.size
        events += labels.size
        exposures += int(np.count_nonzero(~np.isnan(labels)))
        positives += int(np.count_nonzero(labels > 0.5))
    return f"{events:,} events of {users:,} users, {positives / max(exposures, 1):.1%} positive"


def _moment(second: int) -> str:
    return datetime.datetime.fromtimestamp(second, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")


def prune(root: Path) -> str:
    """Remove versions; returns which, in words."""
    with write_lock(root):
        read_manifest(root, check_files=False)  # of a damaged dataset nothing is removed
        remove_stale_pins(root)
        pins = pinned_versions(root)
        first = kept_versions(root).get(1)
        if first is not None and chain_base(first) is None:  # its runs could not pin it
            pins.setdefault(1, []).append("perhaps runs of an earlier release")
        removed, freed = remove_versions(root, pins.keys())
        freed += remove_superseded(root)
    kept = ", ".join(f"{version} ({', '.join(runs)})" for version, runs in sorted(pins.items()))
    return f"removed {len(removed)} versions, {freed / 1e6:,.1f} MB" + (f"; pinned: {kept}" if kept else "")


def run(args: argparse.Namespace) -> None:
    """Do what is asked, and print the result.

    Raises:
        ValueError, OSError: there is no dataset, it is damaged, or another process is writing to it.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.action == "info":
        say(info(args.dataset))
    elif args.action == "prune":
        say(prune(args.dataset))
    else:
        version = compact(args.dataset)
        say("nothing to fold: there are no appends" if version is None else f"version {version} is one base")


main = entry_point(build_parser, run)

if __name__ == "__main__":
    raise SystemExit(main())
