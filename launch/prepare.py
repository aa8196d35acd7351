"""`hllm prepare`: turns MovieLens, PixelRec, Amazon reviews or your own tables into a dataset directory."""

import argparse
import json
import logging
import sys
from pathlib import Path

from hllm_torchrec.common.urls import display_url
from hllm_torchrec.data.bad_rows import BadRows
from hllm_torchrec.data.manifest import read_manifest
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.quickstart_files import fetch_movielens_100k
from hllm_torchrec.data.remote_datasets import writable_dataset
from hllm_torchrec.data.sources.amazon import amazon
from hllm_torchrec.data.sources.base import TIME_UNITS, Source
from hllm_torchrec.data.sources.movielens import movielens_1m, movielens_100k
from hllm_torchrec.data.sources.pixelrec import pixelrec
from hllm_torchrec.data.sources.table_mapping import table
from hllm_torchrec.data.split import RULES, Split
from hllm_torchrec.launch.entry import CommandParser

SOURCES = ("ml-100k", "ml-1m", "pixelrec", "amazon", "table")
EXAMPLES = """examples:
  hllm prepare --source ml-100k --output data/ml-100k
  hllm prepare --source ml-1m --path ml-1m --split leave_one_out --output data/ml-1m
  hllm prepare --source pixelrec --path Pixel200K.csv --items item_info.csv --split leave_one_out --output data/pixel
  hllm prepare --source amazon --path ratings_Books.csv --items meta_Books.json.gz --split leave_one_out \\
      --core published --output data/books
  hllm prepare --source table --path my_shop.yaml --bad-rows bad_time=drop --output data/shop
"""


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(prog="hllm prepare", description=__doc__, epilog=EXAMPLES, output_may_be_url=True)
    parser.add_argument("--source", required=True, choices=SOURCES)
    parser.add_argument("--output", required=True, type=Path, help="dataset directory to write, or its URL")
    parser.add_argument(
        "--path",
        type=Path,
        help="ml-100k, ml-1m: folder (ml-100k: fetched if left out); pixelrec: interaction CSV; amazon: "
        "rating CSV; table: mapping YAML",
    )
    parser.add_argument("--items", type=Path, help="pixelrec: item information CSV; amazon: metadata JSON lines")
    parser.add_argument("--split", default="time", choices=RULES, help="default: time")
    parser.add_argument(
        "--fractions",
        nargs=3,
        type=float,
        default=(0.8, 0.1, 0.1),
        metavar=("TRAIN", "VALID", "TEST"),
        help="shares of the parts (default: 0.8 0.1 0.1)",
    )
    parser.add_argument(
        "--hold-out-items",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the items without any event in train, to measure cold start (default: 0)",
    )
    parser.add_argument("--seed", type=int, default=0, help="which items are held out (default: 0)")
    parser.add_argument(
        "--bad-rows",
        action="append",
        default=[],
        metavar="KIND=error|drop|keep",
        help="what to do with a kind of bad row (repeatable); kinds: " + ", ".join(BadRows().to_dict()),
    )
    parser.add_argument("--time-unit", choices=TIME_UNITS, help="pixelrec: unit of the timestamps (default: seconds)")
    parser.add_argument("--min-events", type=int, help="k of the k-core; 0: none (default: 5 for amazon, else 0)")
    parser.add_argument(
        "--core",
        default="iterative",
        choices=("iterative", "published"),
        help="iterative: the true k-core; published: the single pass of the HLLM and HSTU Books protocol",
    )
    parser.add_argument("--users-per-row-group", type=int, default=256)
    parser.add_argument("--overwrite", action="store_true", help="replace another dataset in --output")
    parser.add_argument("--extend", action="store_true", help="prepare again, keep all ids, append the new ones")
    parser.add_argument("--cache-dir", type=Path, help="where fetched files are kept")
    return parser


def build_source(args: argparse.Namespace) -> Source:
    """The source that the arguments name. Raises ValueError for a missing argument or file."""
    if args.time_unit is not None and args.source != "pixelrec":
        raise ValueError(f"--time-unit belongs to pixelrec, not to {args.source} (table: set it in the mapping)")
    if args.items is not None and args.source not in ("pixelrec", "amazon"):
        raise ValueError(f"--items belongs to pixelrec and amazon, not to {args.source}")
    if args.source == "ml-100k" and args.path is None:
        return movielens_100k(fetch_movielens_100k(args.cache_dir))
    if args.path is None:
        raise ValueError(f"--path is missing: {args.source} cannot be fetched; see --help for what it names")
    if args.source in ("pixelrec", "amazon") and args.items is None:
        raise ValueError(f"--items is missing: {args.source} needs the file with the items' texts")
    match args.source:
        case "ml-100k":
            return movielens_100k(args.path)
        case "ml-1m":
            return movielens_1m(args.path)
        case "pixelrec":
            return pixelrec(args.path, args.items, time_unit=args.time_unit or "seconds")
        case "amazon":
            return amazon(args.path, args.items)
        case _:
            return table(args.path)


def build_policy(source: Source, settings: list[str]) -> BadRows:
    """The source's policy with `KIND=choice` settings applied. Raises ValueError for an unknown one."""
    choices = source.policy.to_dict()
    for setting in settings:
        kind, _, choice = setting.partition("=")
        if kind not in choices:
            raise ValueError(f"--bad-rows {setting}: no kind {kind!r}; kinds: {', '.join(choices)}")
        choices[kind] = choice
    return BadRows(**choices)


def summary(path: Path, name: str = "") -> str:
    """A few lines on a prepared dataset; name: what to call it, if not by its path."""
    manifest = read_manifest(path)
    counts = manifest["counts"]
    lines = [f"{name or path}: {counts['events']:,} events, {counts['users']:,} users, {counts['items']:,} items"]
    for part, facts in manifest["parts"].items():
        share = facts["positives"] / max(facts["exposures"], 1)
        lines.append(f"  {part}: {facts['events']:,} events of {facts['users']:,} users, {share:.1%} positive")
    for what in ("dropped", "kept"):
        if counts[what]:
            lines.append(f"  {what}: {json.dumps(counts[what])}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0, or 2 after one line on a mistake of the user's."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        source = build_source(args)
        if source.license_note and args.path is not None:  # what is fetched has shown it already
            print(source.license_note, file=sys.stderr)
        with writable_dataset(args.output) as folder:
            prepare(
                source,
                folder,
                split=Split(args.split, tuple(args.fractions), args.hold_out_items, args.seed),
                policy=build_policy(source, args.bad_rows),
                min_events=args.min_events,
                core=args.core,
                users_per_row_group=args.users_per_row_group,
                overwrite=args.overwrite,
                extend=args.extend,
            )
            said = summary(folder, display_url(args.output))
        print(said)
    except (ValueError, OSError) as error:
        print(f"hllm prepare: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
