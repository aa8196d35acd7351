"""`hllm embed`: writes new and changed item and user embeddings of a run into stores.

    hllm embed --run runs/quickstart --items stores/items
    hllm embed --run runs/quickstart --items stores/items --users stores/users --since 1998-04-01
    torchrun --nproc_per_node 2 -m hllm_torchrec.launch.embed --run-dir runs/quickstart --items stores/items

The job can be repeated every night: its cost depends on what has changed (texts of items, events of users). If both
stores are given, users are embedded from the stored item embeddings. A store made with other weights is an error.
"""

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hllm_torchrec.common.terminal import say
from hllm_torchrec.launch.entry import CommandParser, entry_point

if TYPE_CHECKING:
    from hllm_torchrec.evaluation.run_loader import LoadedRun


def build_parser() -> CommandParser:
    """Build the command line parser."""
    parser = CommandParser(prog="hllm embed", description=__doc__)
    parser.add_run()
    parser.add_argument("--items", type=Path, metavar="DIR", help="store of items, created if missing")
    parser.add_argument("--users", type=Path, metavar="DIR", help="store of users, created if missing")
    since_help = "do not update users without an event since then (UTC); default: consider all users"
    parser.add_argument("--since", type=second_of, default=0, metavar="YYYY-MM-DD", help=since_help)
    parser.add_argument(
        "--dtype", choices=("fp16", "bf16", "fp32"), default="fp16", help="data type of a new store (default: fp16)"
    )
    parser.add_argument(
        "--keys",
        choices=("string", "int64"),
        help="type of the keys of a new store: raw ids as texts (default), or as numbers, if all of them are",
    )
    return parser


def second_of(date: str) -> int:
    """First second of a date, UTC.

    Raises:
        argparse.ArgumentTypeError: not a date.
    """
    try:
        return int(datetime.combine(datetime.fromisoformat(date).date(), datetime.min.time(), UTC).timestamp())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{date!r} is not a date: write it as 1998-04-01") from None


def run(args: argparse.Namespace) -> None:
    """Load the run's model, embed new and changed items and users, and print a summary.

    Raises:
        ValueError: no store is named, the run or checkpoint does not exist, or a store is of another model.
    """
    if args.items is None and args.users is None:
        raise ValueError("name a store: --items, --users or both")
    if args.items is not None and args.users is not None and args.items.resolve() == args.users.resolve():
        raise ValueError(f"--items and --users are one folder, {args.items}: items and users need a store each")
    from hllm_torchrec.distributed.process_group import distributed_device
    from hllm_torchrec.evaluation.run_loader import load_run

    with distributed_device() as device:
        # The run's store may lack new items; it is not checked here, because this job embeds them. The texts that
        # evidence reads are encoded only for users.
        given: Any = {"dataset": args.dataset, "use_items": args.items is None, "encode": args.users is not None}
        loaded = load_run(args.run, args.checkpoint, device, **given)
        with loaded.weights:
            if args.items is not None:
                _embed_items(loaded, args)
            if args.users is not None:
                _embed_users(loaded, args)


def _embed_items(loaded: "LoadedRun", args: argparse.Namespace) -> None:
    from hllm_torchrec.inference.item_embedding import embed_items

    report = embed_items(loaded.experiment, args.items, args.dtype, args.keys)
    _say(f"embedded {report.encoded:,} of {report.items:,} items in {report.seconds:.1f} s", args.items, report.version)


def _embed_users(loaded: "LoadedRun", args: argparse.Namespace) -> None:
    from hllm_torchrec.distributed.coordination import rank
    from hllm_torchrec.inference.user_embedding import embed_users
    from hllm_torchrec.models.stored_items import use_stored_items

    if args.items is not None:
        use_stored_items(loaded.experiment, args.items)
    context = loaded.experiment.batch_spec.context
    if context and loaded.experiment.hllm.fusion.query_is_user and rank() == 0:
        say(f"caution: user vectors belong to no request: the context ({', '.join(context)}) is read as unknown")
    report = embed_users(loaded, args.users, since=args.since, dtype=args.dtype, keys=args.keys)
    done = f"embedded {report.encoded:,} of {report.active:,} active users ({report.users:,} in all)"
    _say(f"{done} in {report.seconds:.1f} s", args.users, report.version)


def _say(done: str, store: Path, version: int) -> None:
    from hllm_torchrec.common.urls import display_url
    from hllm_torchrec.distributed.coordination import rank

    if rank() == 0:
        say(f"{done}; {display_url(store)} is at version {version}")


main = entry_point(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
