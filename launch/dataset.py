"""`hllm dataset`: shows the versions of a dataset, merges appended events into one base, or removes old versions."""

import argparse
import datetime
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hllm_torchrec.common.terminal import say
from hllm_torchrec.common.urls import url_of
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.dataset_compaction import compact
from hllm_torchrec.data.manifest import chain_base, listed_files, manifest_path, read_manifest
from hllm_torchrec.data.pins import pinned_versions, remove_stale_pins
from hllm_torchrec.data.remote_changes import mirrored_dataset
from hllm_torchrec.data.remote_datasets import local_dataset, writable_dataset
from hllm_torchrec.data.split import SPLITS
from hllm_torchrec.data.tombstones import ITEMS, USERS, Tombstones
from hllm_torchrec.data.versions import kept_versions, remove_superseded, remove_versions, write_lock
from hllm_torchrec.launch.entry import CommandParser, entry_point

EXAMPLES = """examples:
  hllm dataset info data/shop
  hllm dataset compact data/shop
  hllm dataset prune data/shop
  hllm dataset prune s3://bucket/shop --keep 12 15"""

ACTIONS = {
    "info": "print the versions (their events, and the runs that pin them) and the parts of the newest version",
    "compact": "write a version in which all events, also the appended ones, are in one base",
    "prune": "remove old files that contain forgotten ids, and all versions except the newest and those that runs pin",
}


def build_parser() -> CommandParser:
    """Build the command line parser."""
    parser = CommandParser(prog="hllm dataset", description=__doc__, epilog=EXAMPLES)
    actions = parser.add_subparsers(dest="action", required=True)
    for name, text in ACTIONS.items():
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("dataset", type=Path, help="dataset directory or URL")
        if name == "prune":
            text = "further versions to keep (required at a URL, where runs cannot pin them)"
            action.add_argument("--keep", type=int, nargs="+", metavar="VERSION", help=text)
    return parser


def info(root: Path) -> str:
    """Text that describes the versions of a dataset and the parts of the newest version."""
    dataset = Dataset.open(root)
    pins, lines = pinned_versions(root), []
    for version, manifest in kept_versions(root).items():
        counts, appends = manifest["counts"], manifest.get("appends", [])
        size = sum(file["bytes"] for file in listed_files(manifest).values())
        facts = f"{counts['events']:,} events, {counts['users']:,} users, {counts['items']:,} items"
        if appends and appends[-1]["version"] == version:
            facts += f"; +{manifest['added']['events']:,} events"
        gone = Tombstones.read(root, manifest)
        facts += "".join(f"; {n.size:,} {name} forgotten" for name in (USERS, ITEMS) if (n := gone.numbers(name)).size)
        runs = "".join(f"; pinned by {run}" for run in pins.get(version, ()))
        lines.append(f"version {version}: {facts}; {len(appends)} appends, {size / 1e6:,.1f} MB{runs}")
    lines.append(f"parts of version {dataset.version}:")
    for part in SPLITS:
        lines.append(f"  {part}: {part_facts(dataset, part)}")
    first, last = (_moment(second) for second in dataset.manifest.get("seconds", (0, 0)))
    return "\n".join([*lines, f"  events from {first} to {last}"] if "seconds" in dataset.manifest else lines)


def part_facts(dataset: Dataset, part: str) -> str:
    """Text with the numbers of events and users of a part, and its share of positive labels."""
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


def prune(location: Path, keep: Sequence[int] | None = None) -> str:
    """Remove versions of a dataset, in a folder or at a URL, except the newest, the pinned ones and those of `keep`.

    Returns:
        Text with the number of removed versions and the pinned ones.

    Raises:
        ValueError: a version of `keep` does not exist; or `keep` is not given for a URL.
    """
    url = url_of(location)
    if url is None:
        return _prune_folder(location, keep or ())
    if keep is None:
        newest = Dataset.open(url).version
        raise ValueError(
            f"{url}: at a URL no run pins its version: name the versions that runs use or, if there are "
            f"none, the newest: hllm dataset prune {url} --keep {newest}"
        )
    with mirrored_dataset(url, contents=False) as folder:
        return _prune_folder(folder, keep)


def _prune_folder(root: Path, keep: Sequence[int]) -> str:
    with write_lock(root):
        read_manifest(root, check_files=False)  # raises if the dataset is damaged, so that nothing is removed
        remove_stale_pins(root)
        pins = pinned_versions(root)
        for version in keep:
            manifest_path(root, version)  # raises if there is no such version
            pins.setdefault(version, []).append("--keep")
        first = kept_versions(root).get(1)
        if first is not None and chain_base(first) is None:  # written by a release whose runs could not pin versions
            pins.setdefault(1, []).append("perhaps runs of an earlier release")
        removed, freed = remove_versions(root, pins.keys())
        freed += remove_superseded(root)
    kept = ", ".join(f"{version} ({', '.join(runs)})" for version, runs in sorted(pins.items()))
    return f"removed {len(removed)} versions, {freed / 1e6:,.1f} MB" + (f"; pinned: {kept}" if kept else "")


def run(args: argparse.Namespace) -> None:
    """Run the action, and print the result.

    Raises:
        ValueError, OSError: there is no dataset, it is damaged, or another process is writing to it.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.action == "info":
        url = url_of(args.dataset)
        say(info(args.dataset if url is None else local_dataset(url)))
    elif args.action == "prune":
        say(prune(args.dataset, args.keep))
    else:
        with writable_dataset(args.dataset) as folder:
            version = compact(folder)
        say("nothing to compact: there are no appends" if version is None else f"version {version} has a single base")


main = entry_point(build_parser, run)

if __name__ == "__main__":
    raise SystemExit(main())
