"""`hllm prepare`: converts MovieLens, PixelRec, KuaiRec, Amazon reviews or custom tables to a dataset directory."""

import argparse
import json
import logging
import sys
from pathlib import Path

from hllm_torchrec.common.seconds import second_of
from hllm_torchrec.common.terminal import say
from hllm_torchrec.common.urls import display_url
from hllm_torchrec.data.append import append_events
from hllm_torchrec.data.bad_rows import BadRows
from hllm_torchrec.data.manifest import read_manifest
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.remote_datasets import writable_dataset
from hllm_torchrec.data.sources.base import Source
from hllm_torchrec.data.sources.registry import SOURCES, build_source
from hllm_torchrec.data.sources.values import TIME_UNITS
from hllm_torchrec.data.split import RULES, Split
from hllm_torchrec.data.table_facts import describe_append, user_notes
from hllm_torchrec.launch.entry import CommandParser, entry_point

EXAMPLES = "\n".join(
    ["examples:", *(f"  hllm prepare --source {name} {kind.example}" for name, kind in SOURCES.items())]
)


def build_parser() -> CommandParser:
    """Build the command line parser."""
    parser = CommandParser(prog="hllm prepare", description=__doc__, epilog=EXAMPLES, output_may_be_url=True)
    source_help = "kind of the data; table: your own files, described by a mapping"
    parser.add_argument("--source", required=True, choices=list(SOURCES), help=source_help)
    parser.add_argument("--output", required=True, type=Path, help="dataset directory to write, or its URL")
    parser.add_argument(
        "--path",
        type=Path,
        help="; ".join(f"{name}: {kind.path}{' (or fetched)' * bool(kind.fetch)}" for name, kind in SOURCES.items()),
    )
    parser.add_argument(
        "--items", type=Path, help="; ".join(f"{name}: {kind.items}" for name, kind in SOURCES.items() if kind.items)
    )
    parser.add_argument(
        "--users-per-row-group",
        type=int,
        default=256,
        help="most users in a row group, the unit that ranks read (default: 256)",
    )
    parser.add_argument("--cache-dir", type=Path, help="folder for downloaded files")
    parser.add_fractions(0.8, 0.1, 0.1, help="shares of the parts, for --split time and leave_last")
    _add_split(parser)
    _add_bad_rows(parser)
    _add_source_options(parser)
    _add_versions(parser)
    return parser


def _add_split(parser: CommandParser) -> None:
    group = parser.add_argument_group("split")
    group.add_argument(
        "--split", choices=RULES, help="division into train, valid and test (default: time, or date if dates are given)"
    )
    for name, what in (("--train-until", "train"), ("--valid-until", "valid")):
        text = f"split by date: events before it are {what} (UTC: 2023-11-22, 2023-11-22T18:00)"
        group.add_argument(name, type=moment, metavar="DATE", help=text)
    group.add_argument(
        "--hold-out-items",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the items excluded from train, to measure cold start (default: 0)",
    )
    group.add_argument("--seed", type=int, default=0, help="random seed of the choice of held-out items (default: 0)")


def _add_bad_rows(parser: CommandParser) -> None:
    group = parser.add_argument_group("bad rows")
    group.add_argument(
        "--bad-rows",
        action="append",
        default=[],
        metavar="KIND=error|drop|keep",
        help="handling of a kind of bad row (repeatable); kinds: " + ", ".join(BadRows().to_dict()),
    )
    group.add_argument(
        "--bad-share",
        type=float,
        metavar="SHARE",
        help="largest share of a table's rows that may be bad in one way; above it, drop and keep are errors, too, "
        "except for kinds whose handling the mapping chooses (default: 0.2)",
    )


def _add_source_options(parser: CommandParser) -> None:
    group = parser.add_argument_group("sources and filters")
    group.add_argument("--time-unit", choices=TIME_UNITS, help="pixelrec: unit of the timestamps (default: seconds)")
    group.add_argument("--stars", action="store_true", help="ml-100k, ml-1m: add the rating as an ordinal label")
    group.add_argument(
        "--html", choices=("clean", "keep"), help="amazon: remove HTML from texts, or keep it (default: clean)"
    )
    group.add_argument("--min-events", type=int, help="k of the k-core; 0: none (default: 5 for amazon, else 0)")
    group.add_argument(
        "--core",
        default="iterative",
        choices=("iterative", "published"),
        help="iterative: the true k-core; published: the single pass of the HLLM and HSTU Books protocol",
    )


def _add_versions(parser: CommandParser) -> None:
    group = parser.add_argument_group("existing datasets")
    group.add_argument("--overwrite", action="store_true", help="replace another dataset in --output")
    group.add_argument(
        "--append",
        nargs="*",
        type=Path,
        metavar="FILE",
        help="add new events as a new version of the dataset; table: FILE has the new events (default: the mapping's)",
    )
    group.add_argument(
        "--extend", action="store_true", help="prepare a full export again, keep all ids, append the new ones"
    )
    group.add_argument(
        "--allow-fewer", action="store_true", help="let --extend accept fewer events than the dataset has"
    )


def build_policy(source: Source, settings: list[str], share: float | None = None) -> BadRows:
    """Apply `KIND=choice` settings and the largest share of bad rows to the source's policy.

    Raises:
        ValueError: an unknown kind or choice, or a share outside 0..1.
    """
    choices: dict[str, str] = {}
    kinds = source.policy.to_dict()
    for setting in settings:
        kind, _, choice = setting.partition("=")
        if kind not in kinds:
            raise ValueError(f"--bad-rows {setting}: no kind {kind!r}; kinds: {', '.join(kinds)}")
        choices[kind] = choice
    return source.policy.changed(choices, largest_share=share)


def moment(text: str) -> int:
    """Second UTC of a date or date-time, for argparse."""
    try:
        return second_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def split_of(args: argparse.Namespace) -> Split:
    """The split selected by the options. Raises ValueError if they do not fit together."""
    dates = (args.train_until, args.valid_until)
    rule = args.split or ("time" if dates == (None, None) else "date")
    return Split(rule, tuple(args.fractions), args.hold_out_items, args.seed, *dates)


def check_append_options(args: argparse.Namespace, rule: str) -> None:
    """Raise ValueError for an option that an append to a dataset split by `rule` does not support."""
    if (args.train_until, args.valid_until) == (None, None) and args.split not in (None, rule):
        raise ValueError(
            f"--append --split {args.split}: the dataset is split by {rule}, and only dates can move (--train-until, "
            "--valid-until); leave --split out"
        )
    if args.min_events:
        raise ValueError(f"--append --min-events {args.min_events}: a k-core needs all events; leave it out")
    if args.hold_out_items:
        raise ValueError(f"--append --hold-out-items {args.hold_out_items:g}: held-out items are fixed; leave it out")


def summary(path: Path, name: str = "") -> str:
    """Printed summary of a prepared dataset; name: shown instead of its path."""
    manifest = read_manifest(path)
    counts = manifest["counts"]
    version = f", version {manifest['version']}" if "version" in manifest else ""
    lines = [
        f"{name or path}: {counts['events']:,} events, {counts['users']:,} users, {counts['items']:,} items{version}"
    ]
    for part, facts in manifest["parts"].items():
        share = facts["positives"] / max(facts["exposures"], 1)
        lines.append(f"  {part}: {facts['events']:,} events of {facts['users']:,} users, {share:.1%} positive")
    for what in ("dropped", "kept"):
        if counts[what] and "version" not in manifest:
            lines.append(f"  {what}: {json.dumps(counts[what])}")
    users = () if manifest.get("appends") else user_notes(manifest)  # for an append, `describe_append` reports it
    lines += [f"  {note}" for note in (*users, *manifest.get("notes", ()))]
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    """Prepare the dataset, and print its counts.

    Raises:
        ValueError, OSError: the source, its files or an option are not usable.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    given = [f"--{name}" for name in ("append", "extend", "overwrite") if getattr(args, name) not in (None, False)]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} exclude each other; give one of them")
    options = (args.time_unit, args.cache_dir, args.append, args.html, args.stars)
    source = build_source(args.source, args.path, args.items, *options)
    if source.license_note and args.path is not None:  # a download has printed it already
        say(source.license_note, sys.stderr)
    policy = build_policy(source, args.bad_rows, args.bad_share)
    with writable_dataset(args.output) as folder:
        if args.append is not None:
            check_append_options(args, read_manifest(folder)["split"]["rule"])
            moves_cuts = (args.train_until, args.valid_until) != (None, None)
            split = split_of(args) if moves_cuts else None
            entry = append_events(source, folder, policy=policy, split=split)
            text = summary(folder, display_url(args.output))
            say(text if entry is None else f"{text}\n{describe_append(entry)}")
            return
        prepare(
            source,
            folder,
            split=split_of(args),
            policy=policy,
            min_events=args.min_events,
            core=args.core,
            users_per_row_group=args.users_per_row_group,
            overwrite=args.overwrite,
            extend=args.extend,
            allow_fewer=args.allow_fewer,
        )
        text = summary(folder, display_url(args.output))
    say(text)


main = entry_point(build_parser, run)

if __name__ == "__main__":
    raise SystemExit(main())
