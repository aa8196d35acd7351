"""`hllm creatives`: makes and shows tables of personalized texts of items, and evaluates a run on them.

hllm creatives build --dataset data/ml-100k --writer template --name lines
hllm creatives build --dataset data/ml-100k --writer openai --base-url http://localhost:8000/v1 --model M --name titles
hllm creatives import --source hllm_creator --files train.parquet --dataset data/books --name published
hllm creatives info --dataset data/ml-100k --name lines
hllm creatives show --dataset data/ml-100k --name lines --split test --rows 5
hllm creatives evaluate --run runs/creator/ml100k --split test
"""

import argparse
import json
import sys
from pathlib import Path

from hllm_torchrec.common.terminal import say
from hllm_torchrec.launch.creatives_build import add_build_options, run_build
from hllm_torchrec.launch.creatives_import import add_import_options, run_import
from hllm_torchrec.launch.entry import CommandParser, entry_point


def build_parser() -> CommandParser:
    """Build the command line parser."""
    parser = CommandParser(prog="hllm creatives", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="{build,import,info,show,evaluate}")
    build = actions.add_parser("build", help="write a table: <dataset>/creatives/<name>")
    add_build_options(build)
    importer = actions.add_parser("import", help="write a table of texts that were made elsewhere")
    add_import_options(importer)
    info = actions.add_parser("info", help="print a table's counts and origin")
    show = actions.add_parser("show", help="print rows of a table")
    show.add_argument("--split", choices=("train", "valid", "test"), default="test", help="part (default: test)")
    show.add_argument("--dropped", action="store_true", help="rows that were left out, with the reasons")
    show.add_argument("--rows", type=int, default=10, help="number of rows (default: 10)")
    evaluate = actions.add_parser("evaluate", help="likelihoods of a run's texts with the right user, none and another")
    evaluate.add_argument("--run", type=Path, required=True, metavar="DIR", help="run that was trained on a table")
    evaluate.add_argument("--checkpoint", default="best", help="best (default), latest, or a checkpoint's folder")
    evaluate.add_argument("--split", choices=("train", "valid", "test"), default="test", help="part (default: test)")
    evaluate.add_argument("--most", type=int, default=0, help="score at most this many, spread evenly (default: all)")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    for action in (build, importer, info, show):
        action.add_argument("--dataset", type=Path, required=True, metavar="DIR", help="prepared dataset")
        action.add_argument("--name", required=True, help="name of the table")
    return parser


def run(args: argparse.Namespace) -> None:
    """Run an action.

    Raises:
        ValueError: the dataset or the table does not exist, or does not fit.
    """
    {"build": run_build, "import": run_import, "info": _info, "show": _show, "evaluate": _evaluate}[args.action](args)


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

    table = CreativeTable.open(Dataset.open(args.dataset), args.name)
    rows = table.dropped() if args.dropped else table.part(args.split).rows
    for row in rows.slice(0, args.rows).to_pylist():
        why = f" [{'; '.join(row['reasons'])}]" if args.dropped else ""
        say(f"user {row['raw_user_id']}, item {row['raw_item_id']}: {row['response']}{why}")


def _evaluate(args: argparse.Namespace) -> None:
    from hllm_torchrec.creative.metrics import summarize
    from hllm_torchrec.distributed.coordination import rank
    from hllm_torchrec.distributed.process_group import distributed_device
    from hllm_torchrec.evaluation.creative_scores import score_creatives
    from hllm_torchrec.evaluation.run_loader import load_run, run_config

    if not run_config(args.run).creative.enabled:
        raise ValueError(f"--run {args.run}: was trained without texts (creative.enabled is false); name one with them")
    with distributed_device() as device:
        loaded = load_run(args.run, args.checkpoint, device)
        with loaded.weights:
            found = summarize(score_creatives(loaded.experiment, args.split, most=args.most))
        if rank() != 0:
            return
    if args.json:
        say(json.dumps(found))
        return
    say(f"{found['creatives']:,} texts of {found['users']:,} users of {args.split}, nats per text (per token)")
    for name, nats in found["nll"].items():
        say(f"  {name:<9} {nats:8.4f}  ({found['nll_per_token'][name]:.4f})")
    for name, one in found["differences"].items():
        say(f"  {name:<17} {one['mean']:8.4f}  95% over users [{one['interval'][0]:.4f}, {one['interval'][1]:.4f}]")


main = entry_point(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
