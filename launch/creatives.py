"""`hllm creatives`: makes and shows tables of personalized texts of items.

hllm creatives build --dataset data/ml-100k --writer template --name lines
hllm creatives info --dataset data/ml-100k --name lines
hllm creatives show --dataset data/ml-100k --name lines --split test --rows 5
"""

import argparse
import sys
from pathlib import Path

from hllm_torchrec.common.terminal import say
from hllm_torchrec.launch.entry import CommandParser, entry_point


def build_parser() -> CommandParser:
    """Build the command line parser."""
    parser = CommandParser(prog="hllm creatives", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="{build,info,show}")
    build = actions.add_parser("build", help="write a table: <dataset>/creatives/<name>")
    build.add_argument("--writer", choices=("template",), default="template", help="who writes the texts")
    build.add_argument("--feature", default="genres", help="item feature that a text stresses (default: genres)")
    build.add_argument("--title", default="title", help="text column with an item's name (default: title)")
    build.add_argument("--recent", type=int, default=20, help="latest likes that the rule reads (default: 20)")
    build.add_argument("--least", type=int, default=5, help="earlier likes that a text needs (default: 5)")
    build.add_argument(
        "--template", default="{value}, for fans of {liked}", help="text (default: '{value}, for fans of {liked}')"
    )
    build.add_argument(
        "--fractions",
        type=float,
        nargs=3,
        default=(0.7, 0.1, 0.2),
        metavar=("TRAIN", "VALID", "TEST"),
        help="shares of the users in each part (default: 0.7 0.1 0.2)",
    )
    info = actions.add_parser("info", help="print a table's counts and origin")
    show = actions.add_parser("show", help="print rows of a table")
    show.add_argument("--split", choices=("train", "valid", "test"), default="test", help="part (default: test)")
    show.add_argument("--rows", type=int, default=10, help="number of rows (default: 10)")
    for action in (build, info, show):
        action.add_argument("--dataset", type=Path, required=True, metavar="DIR", help="prepared dataset")
        action.add_argument("--name", required=True, help="name of the table")
    return parser


def run(args: argparse.Namespace) -> None:
    """Run an action.

    Raises:
        ValueError: the dataset or the table does not exist, or does not fit.
    """
    {"build": _build, "info": _info, "show": _show}[args.action](args)


def _build(args: argparse.Namespace) -> None:
    import numpy as np
    import pyarrow as pa

    from hllm_torchrec.creative.template import TemplateRule, write_by_template
    from hllm_torchrec.data.creative_table import split_by_user, table_path, write_table
    from hllm_torchrec.data.dataset import Dataset
    from hllm_torchrec.data.split import SPLITS

    if min(args.fractions) < 0 or abs(sum(args.fractions) - 1) > 1e-6:
        raise ValueError(f"--fractions {args.fractions}: three shares, none negative, that sum to 1")
    if args.recent < 1 or args.least < 1:
        raise ValueError(f"--recent {args.recent} --least {args.least}: both at least 1")
    dataset = Dataset.open(args.dataset)
    if table_path(dataset, args.name).exists():
        raise ValueError(f"--name {args.name}: {table_path(dataset, args.name)} exists; choose another, or remove it")
    rule = TemplateRule(args.feature, args.title, args.recent, args.least, args.template)
    rows, dropped = write_by_template(dataset, rule)
    of_row = np.array(list(split_by_user(rows["raw_user_id"].to_pylist(), args.fractions)))
    parts = {split: rows.filter(pa.array(of_row == split)) for split in SPLITS}
    facts = {"writer": "template", "rule": vars(rule), "left_out": dropped, "fractions": list(args.fractions)}
    path = write_table(dataset, args.name, parts, facts=facts)
    counts = ", ".join(f"{split} {len(part):,}" for split, part in parts.items())
    say(f"{path}: {len(rows):,} texts by rule ({counts}); {sum(dropped.values()):,} likes without one")


def _info(args: argparse.Namespace) -> None:
    from hllm_torchrec.data.creative_table import CreativeTable
    from hllm_torchrec.data.dataset import Dataset

    manifest = CreativeTable.open(Dataset.open(args.dataset), args.name).manifest
    for split, count in manifest["counts"].items():
        say(f"{split:<6} {count:>10,} texts of {manifest['users'][split]:,} users")
    for reason, count in manifest.get("left_out", {}).items():
        say(f"left out: {count:,}: {reason}")
    say(f"writer: {manifest.get('writer', 'unknown')}")


def _show(args: argparse.Namespace) -> None:
    from hllm_torchrec.data.creative_table import CreativeTable
    from hllm_torchrec.data.dataset import Dataset

    rows = CreativeTable.open(Dataset.open(args.dataset), args.name).part(args.split).rows
    for row in rows.slice(0, args.rows).to_pylist():
        say(f"user {row['raw_user_id']}, item {row['raw_item_id']}: {row['response']}")


main = entry_point(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
